"""Items and answers as files, so that a team may label where it already does: Label Studio JSON, and CSV.

Label Studio's format is that of its guides "Task format", "Import pre-annotated data" and "Export annotations": a list
of tasks with `data` (here `image`, a PNG as a data: URL, and facts), `predictions` and `annotations`, whose results are
`choices` of the controls named in the labelling configuration (`labelling_config`). Its CSV and JSON-MIN exports hold
the fields of `data` and one column per control; `read_csv` and `read_label_studio` take these, too.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import quoteattr

from guard.errors import DataError, QueueError, QueueUnavailable
from guard.relabel.items import Answer, Decision, FlaggedInput, QueueItem, State
from guard.relabel.queue import Queue

#: Names of the two controls, and of the choices of the first.
VERDICT, TRUE_LABEL = "verdict", "true_label"
POISONED, FALSE_ALARM = "poisoned", "false alarm"
#: Choice of the second control for an input that nobody can name.
CANNOT_TELL = "cannot tell"

CSV_COLUMNS = (
    "item",
    "state",
    "request_id",
    "model",
    "bundle",
    "received_at",
    "suspect_label",
    "backup_label",
    "backup_confidence",
    "p_value",
    "reason",
    VERDICT,
    TRUE_LABEL,
    "annotator",
    "created_at",
)
#: Bad rows that an error names; more are counted, and after so many an import stops.
_NAMED = 5
_MOST_BAD = 20
#: Rows that a file may have.
MOST_ROWS = 200_000
_LONGEST_CELL = 2**27
_NEEDED = ("item", VERDICT, TRUE_LABEL)
#: First line by which spreadsheets are told what parts the cells.
_SEPARATOR_LINE = re.compile(r"\A[\"']?sep=.[\"']?\r?\n", re.IGNORECASE)

#: Returns one name per class of the model that an input was for.
NamesOf = Callable[[FlaggedInput], Sequence[str]]


@dataclass(frozen=True, slots=True)
class Row:
    """One answer in a file, as text.

    Attributes
    ----------
    place : str
        Where it stands: "line 3" or "task 3".
    item, verdict, true_label : str
        Empty verdict and label: unanswered.
    """

    place: str
    item: str
    verdict: str
    true_label: str


@dataclass(frozen=True, slots=True)
class Imported:
    """Outcome of one import: answers saved, rows without an answer, rows whose answer was there already."""

    saved: int
    unanswered: int
    known: int


def choice_of(label: int, names: Sequence[str]) -> str:
    """Return how a class is written in a file: "14 Stop"; its number alone where it has no other name."""
    return str(label) if names[label] == str(label) else f"{label} {names[label]}"


def labelling_config(names: Sequence[str]) -> str:
    """Return the labelling configuration for a Label Studio project that takes these tasks and gives them back."""
    choices = [choice_of(label, names) for label in range(len(names))]
    return "\n".join(
        [
            "<View>",
            '  <Image name="image" value="$image" zoomControl="true" brightnessControl="true"/>',
            f'  <Choices name="{VERDICT}" toName="image" choice="single" required="true" showInline="true">',
            *(f"    <Choice value={quoteattr(choice)}/>" for choice in (POISONED, FALSE_ALARM)),
            "  </Choices>",
            f'  <Choices name="{TRUE_LABEL}" toName="image" choice="single" required="true">',
            *(f"    <Choice value={quoteattr(choice)}/>" for choice in (*choices, CANNOT_TELL)),
            "  </Choices>",
            "</View>",
            "",
        ]
    )


def items_in(queue: Queue, states: Iterable[State]) -> Iterator[QueueItem]:
    """Yield the items of some states as people may see them, oldest first within each; a hundred are held at most."""
    for state in states:
        last = 0
        while part := queue.items(state=state, after_id=last, limit=100):
            yield from queue.blind(part)
            last = part[-1].id


def write_label_studio(
    items: Iterable[QueueItem], names_of: NamesOf, picture: Callable[[FlaggedInput], bytes]
) -> Iterator[str]:
    """Yield the text of a Label Studio JSON file, task by task.

    Parameters
    ----------
    items : iterable of QueueItem
    names_of : callable
    picture : callable (FlaggedInput) -> bytes
        Makes the PNG that goes into `data.image`.
    """
    separator = "[\n"
    for item in items:
        yield separator + json.dumps(_task(item, names_of(item.input), picture(item.input)), ensure_ascii=False)
        separator = ",\n"
    yield "\n]\n" if separator != "[\n" else "[]\n"


def write_csv(items: Iterable[QueueItem], names_of: NamesOf) -> Iterator[str]:
    """Yield the text of a CSV file, line by line; without pictures.

    A cell that a spreadsheet would take for a formula begins with an apostrophe: request ids come from strangers.
    """
    yield _line(CSV_COLUMNS)
    for item in items:
        names, decision = names_of(item.input), item.decision
        facts = _facts(item, names)
        answer = _answer_cells(decision, names) if decision is not None else {}
        yield _line([_harmless(str(facts.get(name, answer.get(name, "")))) for name in CSV_COLUMNS])


def read_label_studio(text: str) -> list[Row]:
    """Return the answers of a Label Studio JSON or JSON-MIN file.

    Raises
    ------
    DataError
        If it is no such file, or a task holds answers that contradict each other.
    """
    try:
        tasks = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"this is no JSON file: {error}.") from error
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise DataError("a Label Studio file must be a list of tasks. Export it as JSON or JSON-MIN.")
    _check_length(len(tasks))
    return [_row_of_task(task, f"task {place}") for place, task in enumerate(tasks, start=1)]


def read_csv(text: str) -> list[Row]:
    """Return the answers of a CSV file with the columns item, verdict and true_label; others are passed over.

    Cells are parted by commas, semicolons or tabs, whichever gives these columns; a first line `sep=;` is understood.

    Raises
    ------
    DataError
        If a column is missing, or it is no CSV file.
    """
    before = csv.field_size_limit(_LONGEST_CELL)  # a cell may hold a picture
    try:
        text = _SEPARATOR_LINE.sub("", text.removeprefix("\ufeff"))
        readers = (csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter) for delimiter in ",;\t")
        missing, reader = min(((_missing_columns(reader), reader) for reader in readers), key=lambda pair: len(pair[0]))
        if missing:
            raise DataError(f"the file needs the columns item, {VERDICT} and {TRUE_LABEL}; missing: {missing}.")
        rows: list[Row] = []
        for row in reader:
            place = f"line {reader.line_num}"
            rows.append(Row(place, *(_cell(row[name], place) for name in _NEEDED)))
            _check_length(len(rows))
        return rows
    except csv.Error as error:
        raise DataError(f"this is no readable CSV file: {error}.") from error
    finally:
        csv.field_size_limit(before)


def _missing_columns(reader: csv.DictReader[str]) -> list[str]:
    reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    return sorted({*_NEEDED} - {*reader.fieldnames})


def _cell(text: str | None, place: str) -> str:
    """Return what a cell says; Label Studio writes several choices of one control as JSON."""
    value: Any = (text or "").strip()
    if value.startswith('{"choices"'):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    return _text(value, place)


def import_answers(queue: Queue, reviewer: str, rows: Sequence[Row], names_of: NamesOf) -> Imported:
    """Save the answers of a file in the name of a reviewer: all of them, or none.

    Parameters
    ----------
    queue : Queue
    reviewer : str
        Who answers for them.
    rows : sequence of Row
    names_of : callable

    Raises
    ------
    DataError
        If a row is bad: no such item or class, answered otherwise before, or with somebody else now. Names the first
        rows and what is wrong with each.
    QueueError
        If the queue refuses them after all.
    """
    problems: list[str] = []
    answers: list[Answer] = []
    unanswered = known = 0
    seen: set[int] = set()
    for place, row in enumerate(rows, start=1):
        if not row.verdict and not row.true_label:
            unanswered += 1
            continue
        try:
            item_id = _item_id(row)
            if item_id in seen:
                raise DataError(f"item {item_id} is there twice")
            seen.add(item_id)
            item = _item(queue, item_id, reviewer)
            answer = _answer(row, item, names_of(item.input))
            if _is_known(item, answer):
                known += 1
            else:
                answers.append(answer)
        except QueueUnavailable:
            raise
        except (DataError, QueueError) as error:
            problems.append(f"{row.place}: {str(error).rstrip('.')}")
        if len(problems) >= _MOST_BAD and place < len(rows):
            _refuse(problems, f". Stopped there, after {place} of {len(rows)} rows")
    _refuse(problems)
    if not answers:
        return Imported(0, unanswered, known)
    try:
        queue.decide_many(reviewer, answers, also_free=True)
    except QueueUnavailable:
        raise
    except QueueError as error:
        raise DataError(f"nothing was imported: {error}") from error
    return Imported(len(answers), unanswered, known)


def _task(item: QueueItem, names: Sequence[str], picture: bytes) -> dict[str, Any]:
    flagged = item.input
    image = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    task: dict[str, Any] = {"data": {"image": image, **_facts(item, names)}}
    if flagged.backup_label is not None:
        choice = choice_of(flagged.backup_label, names)
        task["predictions"] = [
            {
                "model_version": f"guard {flagged.bundle_digest[:12]}",
                "score": flagged.backup_confidence,
                "result": [_choice(item, TRUE_LABEL, choice, "prediction")],
            }
        ]
    if item.decision is not None:
        cells = _answer_cells(item.decision, names)
        task["annotations"] = [
            {
                "result": [_choice(item, name, cells[name], "answer") for name in (VERDICT, TRUE_LABEL)],
                "was_cancelled": False,
                "ground_truth": False,
                "created_at": cells["created_at"],
            }
        ]
    return task


def _choice(item: QueueItem, control: str, choice: str, kind: str) -> dict[str, Any]:
    return {
        "id": f"{kind}-{item.id}-{control}",
        "from_name": control,
        "to_name": "image",
        "type": "choices",
        "value": {"choices": [choice]},
    }


def _facts(item: QueueItem, names: Sequence[str]) -> dict[str, Any]:
    flagged = item.input
    backup = flagged.backup_label
    return {
        "item": item.id,
        "state": item.state.value,
        "request_id": flagged.request_id,
        "model": flagged.model,
        "bundle": flagged.bundle_digest,
        "received_at": flagged.received_at.isoformat(),
        "suspect_label": choice_of(flagged.suspect_label, names),
        "backup_label": "" if backup is None else choice_of(backup, names),
        "backup_confidence": "" if flagged.backup_confidence is None else round(flagged.backup_confidence, 4),
        "p_value": "" if item.is_blinded else flagged.p_value,
        "reason": flagged.reason,
    }


def _answer_cells(decision: Decision, names: Sequence[str]) -> dict[str, str]:
    label = decision.true_label
    return {
        VERDICT: POISONED if decision.is_poisoned else FALSE_ALARM,
        TRUE_LABEL: CANNOT_TELL if label is None else choice_of(label, names),
        "annotator": decision.reviewer,
        "created_at": decision.decided_at.isoformat(),
    }


def _row_of_task(task: Mapping[str, Any], place: str) -> Row:
    data = task.get("data")
    if data is None:  # JSON-MIN: everything on one level
        return Row(place, *(_text(task.get(name), place) for name in _NEEDED))
    if not isinstance(data, dict):
        raise DataError(f"{place}: data must be an object.")
    annotations = task.get("annotations") or []
    if not isinstance(annotations, list):
        raise DataError(f"{place}: annotations must be a list.")
    kept = [
        annotation for annotation in annotations if isinstance(annotation, dict) and not annotation.get("was_cancelled")
    ]
    answers = {tuple(_chosen(annotation, name, place) for name in (VERDICT, TRUE_LABEL)) for annotation in kept}
    if len(answers) > 1:
        raise DataError(f"{place}: its {len(kept)} annotations say different things. Keep one.")
    verdict, label = answers.pop() if answers else ("", "")
    return Row(place, _text(data.get("item"), place), verdict, label)


def _chosen(annotation: Mapping[str, Any], control: str, place: str) -> str:
    results = annotation.get("result")
    for result in results if isinstance(results, list) else ():
        if isinstance(result, dict) and result.get("from_name") == control:
            return _text(result.get("value"), place)
    return ""


def _text(value: Any, place: str) -> str:
    """Return a value of a task as text: itself, or the one choice that it holds; "" for none."""
    if isinstance(value, dict):
        value = value.get("choices")
    if isinstance(value, list):
        if len(value) > 1:
            raise DataError(f"{place}: it holds {len(value)} choices of one control, {_short(str(value))}. Keep one.")
        value = value[0] if value else None
    return "" if value is None or isinstance(value, dict | list) else str(value).strip()


def _item_id(row: Row) -> int:
    if not (row.item.isascii() and row.item.isdigit() and len(row.item) < 19):
        raise DataError(f"item must be the number of an item, got {_short(row.item)}")
    return int(row.item)


def _item(queue: Queue, item_id: int, reviewer: str) -> QueueItem:
    item = queue.get(item_id)
    if item.state is State.CLAIMED and item.claimed_by != reviewer:
        raise DataError(f"item {item_id} is with another reviewer now")
    return item


def _answer(row: Row, item: QueueItem, names: Sequence[str]) -> Answer:
    verdicts = {POISONED: True, FALSE_ALARM: False, FALSE_ALARM.replace(" ", "_"): False}
    if row.verdict.lower() not in verdicts:
        raise DataError(f"verdict must be {POISONED!r} or {FALSE_ALARM!r}, got {_short(row.verdict)}")
    label = None if row.true_label.lower() == CANNOT_TELL else _label(row.true_label, names)
    return Answer(item_id=item.id, is_poisoned=verdicts[row.verdict.lower()], true_label=label)


def _label(text: str, names: Sequence[str]) -> int:
    choices = [choice_of(label, names) for label in range(len(names))]
    for written in (choices, [str(label) for label in range(len(names))], list(names)):
        if written.count(text) == 1:
            return written.index(text)
    if not text:
        raise DataError(f"{TRUE_LABEL} is empty. Name a class, or {CANNOT_TELL!r}")
    raise DataError(f"{TRUE_LABEL} must be one of the {len(names)} classes, as in {choices[-1]!r}, got {_short(text)}")


def _is_known(item: QueueItem, answer: Answer) -> bool:
    if item.state not in (State.DECIDED, State.TRAINED) or item.decision is None:
        return False
    if (item.decision.is_poisoned, item.decision.true_label) != (answer.is_poisoned, answer.true_label):
        raise DataError(f"item {item.id} was answered otherwise by {item.decision.reviewer}. Change it on the page")
    return True


def _refuse(problems: Sequence[str], stopped: str = "") -> None:
    if problems:
        more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise DataError(f"nothing was imported: {'; '.join(problems[:_NAMED])}{more}{stopped}.")


def _check_length(rows: int) -> None:
    if rows > MOST_ROWS:
        raise DataError(f"a file must have at most {MOST_ROWS} rows, and this one has more. Nothing was imported.")


def _short(text: str) -> str:
    """Return a text from a file for a message in one line: quoted, and not longer than a line."""
    return repr(text if len(text) <= 60 else f"{text[:60]}...")


def _line(cells: Sequence[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue()


def _harmless(cell: str) -> str:
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell
