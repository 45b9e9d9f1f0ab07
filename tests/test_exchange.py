"""Items and answers as files: Label Studio JSON, its JSON-MIN, and CSV; all of a file is imported, or nothing."""

from __future__ import annotations

import base64
import contextlib
import csv
import io
import json
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from queue_helpers import N_CLASSES
from review_helpers import picture

from guard.errors import DataError
from guard.files import decoded
from guard.relabel.exchange import (
    Imported,
    import_answers,
    items_in,
    labelling_config,
    read_csv,
    read_label_studio,
    write_csv,
    write_label_studio,
)
from guard.relabel.items import FlaggedInput, State
from guard.relabel.queue import Queue
from guard.review.pictures import picture_of_tensor

NAMES = ["Stop", "Give way", *(str(label) for label in range(2, N_CLASSES))]


@pytest.fixture
def queue(sqlite_template: Path, tmp_path: Path) -> Iterator[Queue]:
    shutil.copy(sqlite_template, tmp_path / "queue.db")
    with Queue.open(f"sqlite:///{tmp_path / 'queue.db'}") as opened:
        opened.enqueue([picture(0), picture(1, backup_label=None, backup_confidence=None), picture(2, backup_label=1)])
        yield opened


def names_of(_: FlaggedInput) -> list[str]:
    return NAMES


def exported(queue: Queue, *states: State) -> list[dict[str, Any]]:
    items = items_in(queue, states or (State.PENDING,))
    tasks: list[dict[str, Any]] = json.loads(
        "".join(write_label_studio(items, names_of, lambda first: picture_of_tensor(first.inputs)))
    )
    return tasks


def exported_csv(queue: Queue, *states: State) -> list[dict[str, str]]:
    text = "".join(write_csv(items_in(queue, states or (State.PENDING,)), names_of))
    return list(csv.DictReader(io.StringIO(text)))


def annotated(task: dict[str, Any], verdict: str, label: str, **more: Any) -> dict[str, Any]:
    """Return a task as Label Studio exports it after somebody has labelled it."""
    choices = {"verdict": verdict, "true_label": label}
    result = [
        {"id": f"x{name}", "from_name": name, "to_name": "image", "type": "choices", "value": {"choices": [choice]}}
        for name, choice in choices.items()
    ]
    done = {"id": 7, "completed_by": 1, "result": result, "was_cancelled": False, "lead_time": 4.2, **more}
    return {**task, "id": 1000 + task["data"]["item"], "annotations": [*task.get("annotations", []), done]}


def import_json(queue: Queue, tasks: Any, reviewer: str = "ada") -> Imported:
    return import_answers(queue, reviewer, read_label_studio(json.dumps(tasks)), names_of)


def test_label_studio_export_holds_picture_prediction_and_facts(queue):
    first, second, third = exported(queue)
    kind, _, data = first["data"]["image"].partition(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.size == (8, 8)
    assert first["data"]["request_id"] == "request-0"
    assert first["data"]["suspect_label"] == "3"
    [prediction] = third["predictions"]
    assert prediction["model_version"] == f"guard {'ab' * 6}"
    assert prediction["score"] == 0.75
    [result] = prediction["result"]
    assert result["value"] == {"choices": ["1 Give way"]}
    assert (result["from_name"], result["to_name"], result["type"]) == ("true_label", "image", "choices")
    assert "predictions" not in second
    assert "annotations" not in first


def test_labelling_config_names_the_controls_and_choices_of_the_export():
    root = ElementTree.fromstring(labelling_config(['<"Stop" & go>', "1"]))
    assert root.find("Image").attrib["value"] == "$image"
    controls = {control.attrib["name"]: control for control in root.iter("Choices")}
    assert [entry.attrib["value"] for entry in controls["verdict"]] == ["poisoned", "false alarm"]
    assert [entry.attrib["value"] for entry in controls["true_label"]] == ['0 <"Stop" & go>', "1", "cannot tell"]
    assert {control.attrib["toName"] for control in controls.values()} == {"image"}


def test_label_studio_answers_come_back(queue):
    tasks = exported(queue)
    tasks = [
        annotated(tasks[0], "poisoned", "1 Give way"),
        annotated(tasks[1], "false alarm", "cannot tell"),
        tasks[2],
    ]
    assert import_json(queue, tasks) == Imported(saved=2, unanswered=1, known=0)
    entry, two = (queue.get(item).decision for item in (1, 2))
    assert (entry.reviewer, entry.is_poisoned, entry.true_label) == ("ada", True, 1)
    assert (two.is_poisoned, two.true_label) == (False, None)
    assert queue.get(3).state is State.PENDING


def test_answered_items_are_exported_with_their_answer_and_known_when_they_come_back(queue):
    import_json(queue, [annotated(exported(queue)[0], "poisoned", "0 Stop")])
    tasks = exported(queue, State.DECIDED)
    chosen = {task["from_name"]: task["value"]["choices"] for task in tasks[0]["annotations"][0]["result"]}
    assert chosen == {"verdict": ["poisoned"], "true_label": ["0 Stop"]}
    assert import_json(queue, tasks) == Imported(saved=0, unanswered=0, known=1)
    assert len(queue.decisions()) == 1


def test_skipped_annotations_do_not_count(queue):
    tasks = exported(queue)
    skipped = annotated(tasks[0], "poisoned", "2", was_cancelled=True)
    assert import_json(queue, [skipped]) == Imported(saved=0, unanswered=1, known=0)
    assert import_json(queue, [annotated(skipped, "poisoned", "4")]).saved == 1


def test_two_annotations_that_differ_are_refused(queue):
    task = annotated(annotated(exported(queue)[0], "poisoned", "2"), "poisoned", "4")
    with pytest.raises(DataError, match="task 1: its 2 annotations say different things"):
        import_json(queue, [task])


def test_json_min_is_read_too(queue):
    rows = [{"item": 1, "image": "x", "verdict": "poisoned", "true_label": "4", "annotator": 1, "annotation_id": 9}]
    assert import_json(queue, rows).saved == 1
    assert queue.get(1).decision.true_label == 4


@pytest.mark.parametrize("verdict", [{"choices": ["poisoned"]}, ["poisoned"], "poisoned"])
def test_json_min_with_choices_is_read(queue, verdict):
    rows = [
        {"item": 1, "verdict": verdict, "true_label": {"choices": ["1 Give way"]}},
        {"item": 2, "verdict": {"choices": []}},
    ]
    assert import_json(queue, rows) == Imported(saved=1, unanswered=1, known=0)
    assert queue.get(1).decision.true_label == 1


def test_several_choices_of_one_control_are_refused_and_not_taken_for_none(queue):
    several = {"choices": ["poisoned", "false alarm"]}
    with pytest.raises(
        DataError, match=r"task 1: it holds 2 choices of one control, \"\['poisoned', 'false alarm'\]\"\."
    ):
        import_json(queue, [{"item": 1, "verdict": several, "true_label": "4"}])
    task = annotated(exported(queue)[0], "poisoned", "4")
    task["annotations"][0]["result"][0]["value"] = several
    with pytest.raises(DataError, match="task 1: it holds 2 choices"):
        import_json(queue, [task])
    with pytest.raises(DataError, match="line 2: it holds 2 choices"):
        read_csv(f"item\tverdict\ttrue_label\n1\t{json.dumps(several)}\t4\n")


ANSWERS = [["item", "verdict", "true_label", "note"], ["1", "poisoned", "1 Give way", 'a;b,c\t"d"'], ["2", "", "", ""]]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("first", ["", "sep={}\r\n"])
def test_csv_of_any_spreadsheet_is_read(queue, encoding, delimiter, first):
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=delimiter).writerows([[f" {cell}" for cell in ANSWERS[0]], *ANSWERS[1:]])
    text = decoded((first.format(delimiter) + buffer.getvalue()).encode(encoding))
    assert import_answers(queue, "ada", read_csv(text), names_of) == Imported(saved=1, unanswered=1, known=0)
    assert queue.get(1).decision.true_label == 1


def test_csv_of_label_studio_with_choices_as_json_is_read(queue):
    text = 'item;verdict;true_label\n1;"{""choices"": [""poisoned""]}";"{""choices"": [""4""]}"\n'
    assert import_answers(queue, "ada", read_csv(text), names_of).saved == 1


def test_csv_goes_out_and_comes_back(queue):
    rows = exported_csv(queue)
    assert [row["item"] for row in rows] == ["1", "2", "3"]
    assert rows[2]["backup_label"] == "1 Give way"
    rows[0] |= {"verdict": "poisoned", "true_label": "Stop"}
    rows[2] |= {"verdict": "False alarm", "true_label": "7"}
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    text = "\ufeff" + buffer.getvalue()  # as spreadsheets write it
    assert import_answers(queue, "ada", read_csv(text), names_of) == Imported(saved=2, unanswered=1, known=0)
    assert [(decision.is_poisoned, decision.true_label) for decision in queue.decisions()] == [(True, 0), (False, 7)]
    decided = exported_csv(queue, State.DECIDED)
    assert [(row["verdict"], row["true_label"], row["annotator"]) for row in decided] == [
        ("poisoned", "0 Stop", "ada"),
        ("false alarm", "7", "ada"),
    ]


def test_csv_cells_are_no_formulas(queue):
    queue.enqueue([picture(9, request_id='=HYPERLINK("http://evil")', reason="+1\n-2")])
    row = exported_csv(queue)[-1]
    assert row["request_id"] == '\'=HYPERLINK("http://evil")'
    assert row["reason"] == "'+1\n-2"


def test_csv_with_a_large_picture_is_read(queue):
    text = f'item,verdict,true_label,image\n1,poisoned,4,"data:image/png;base64,{"A" * 200_000}"\n'
    assert import_answers(queue, "ada", read_csv(text), names_of).saved == 1
    assert csv.field_size_limit() == 131_072


def test_every_bad_row_is_named_and_nothing_is_imported(queue):
    queue.claim_items("bob", [3])
    text = "\n".join(
        [
            "item,verdict,true_label",
            "1,poisoned,4",
            "2,perhaps,4",
            "99,poisoned,4",
            "one,poisoned,4",
            "1,poisoned,5",
            "2,poisoned,Stopp",
            "2,poisoned,",
        ]
    )
    with pytest.raises(DataError) as caught:
        import_answers(queue, "ada", read_csv(text), names_of)
    answer = str(caught.value)
    assert answer.startswith("nothing was imported: line 3: verdict must be 'poisoned' or 'false alarm', got 'perhaps'")
    for part in ("line 4: there is no item 99", "line 5: item must be", "line 6: item 1 is there twice", "and 1 more"):
        assert part in answer
    assert queue.decisions() == []


@pytest.mark.parametrize("row", ["nonsense,poisoned,4", "99,poisoned,4", "1,poisoned,4", "2,perhaps,4"])
def test_import_of_rubbish_stops_after_a_few_errors(queue, monkeypatch, row):
    """The attack: 3 MB of bad rows took 44 s, one look at the queue for each."""
    requested = []
    get = queue.get
    monkeypatch.setattr(queue, "get", lambda item_id: requested.append(item_id) or get(item_id))
    text = "item,verdict,true_label\n" + f"{row}\n" * 100_000
    with pytest.raises(DataError, match=r"nothing was imported: .*Stopped there, after 2\d of 100000 rows\."):
        import_answers(queue, "ada", read_csv(text), names_of)
    assert len(requested) <= 20
    assert queue.decisions() == []


def test_import_of_too_many_rows_is_refused_while_it_is_read(monkeypatch):
    monkeypatch.setattr("guard.relabel.exchange.MOST_ROWS", 3)
    with pytest.raises(DataError, match="at most 3 rows"):
        read_csv("item,verdict,true_label\n" + "1,poisoned,4\n" * 4)
    with pytest.raises(DataError, match="at most 3 rows"):
        read_label_studio(json.dumps([{}] * 4))


def test_import_of_more_answers_than_one_reviewer_may_hold_is_saved_and_holds_nothing(queue):
    queue.enqueue([picture(number % 5) for number in range(150)])
    text = "item,verdict,true_label\n" + "".join(f"{number},poisoned,4\n" for number in range(1, 151))
    assert import_answers(queue, "ada", read_csv(text), names_of).saved == 150
    assert queue.held_by("ada") == []


def test_item_with_another_reviewer_stops_the_import_and_the_rest_is_given_back(queue):
    queue.claim_items("bob", [2])
    text = "item,verdict,true_label\n1,poisoned,4\n2,poisoned,4\n"
    with pytest.raises(DataError, match="item 2 is with another reviewer now"):
        import_answers(queue, "ada", read_csv(text), names_of)
    assert queue.get(1).state is State.PENDING
    assert queue.get(2).claimed_by == "bob"
    assert queue.decisions() == []


def test_item_that_was_answered_otherwise_is_refused(queue):
    import_json(queue, [annotated(exported(queue)[0], "poisoned", "2")])
    with pytest.raises(DataError, match="item 1 was answered otherwise by ada"):
        import_answers(queue, "bob", read_csv("item,verdict,true_label\n1,poisoned,4\n"), names_of)


HOSTILE = (
    '[{"data": {"item": 1}, "annotations": [{"result": 5}]}]',
    '[{"data": {"item": 1}, "annotations": [{"result": [{"from_name": "verdict", "value": {"choices": "x"}}]}]}]',
    '[{"item": "\\u00b2", "verdict": "poisoned", "true_label": "4"}]',
    '[{"item": "\\ud800", "verdict": "\\ud800\\u0000", "true_label": "\\u0000"}]',
    '[{"item": 1e400, "verdict": "poisoned", "true_label": NaN}]',
    f'[{{"item": {2**70}, "verdict": "poisoned", "true_label": "4"}}]',
    f'[{{"item": {"9" * 5000}, "verdict": "poisoned", "true_label": "4"}}]',
    f'[{{"item": 1, "x": {"[" * 900}{"]" * 900}, "verdict": true, "true_label": []}}]',
)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_file_is_refused_or_holds_no_answer(queue, text):
    with contextlib.suppress(DataError):
        assert import_answers(queue, "ada", read_label_studio(text), names_of).saved == 0
    assert queue.decisions() == []


@pytest.mark.parametrize("text", ["", "{}", "[1]", "nonsense", '[{"data": 3}]', "[" * 100_000])
def test_file_that_is_no_label_studio_export_is_refused(text):
    with pytest.raises(DataError):
        read_label_studio(text)


def test_csv_without_its_columns_is_refused():
    with pytest.raises(DataError, match=r"missing: \['item', 'true_label'\]"):
        read_csv("id,verdict\n1,poisoned\n")


def test_export_of_nothing_is_an_empty_list(queue):
    assert exported(queue, State.TRAINED) == []
