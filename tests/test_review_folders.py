"""One review page for models whose bundles lie in folders of their own."""

from __future__ import annotations

import html
import io
import itertools
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from metrics_helpers import Counters
from PIL import Image
from queue_helpers import N_CLASSES
from review_helpers import log_in, picture, small_bundle, workspace_of

from guard.cli import review_sources
from guard.cli.review_sources import by_model, known_bundles, open_workspace
from guard.errors import ConfigError, DataError
from guard.relabel.queue import Queue
from guard.review.known_bundles import KnownBundles
from guard.review.status.sampler import Sampler
from guard.review.workspace import Workspace
from guard.storage.bundle import RETRAINER_LOCK, BundleStore

NAMES = {model: [f"{model} {label}" for label in range(N_CLASSES)] for model in ("digits", "signs")}
RATES = {"digits": 0.01, "signs": 0.05}


def write_model(folder: Path, model: str, **more: Any) -> str:
    """Write clean pictures of a model, two of each class, and its active bundle; return its digest."""
    tone = 40 if model == "digits" else 200
    for label, name in enumerate(sorted(NAMES[model])):
        (folder / f"clean-{model}" / name).mkdir(parents=True, exist_ok=True)
        for number in range(2):
            Image.new("L", (8, 8), tone + label).save(folder / f"clean-{model}" / name / f"{number}.png")
    labels = np.repeat(np.arange(N_CLASSES), 2)
    features = np.random.default_rng(len(model)).normal(size=(len(labels), 6))
    document = {
        "images_from": str(folder / f"clean-{model}"),
        "settings": {"mode": "calibrated", "false_positive_rate": RATES[model]},
        "realised_false_positive_rate": RATES[model],
        **more,
    }
    digest = small_bundle(folder / model, NAMES[model], features, labels, **document)
    BundleStore(folder / model).activate(digest)
    return digest


@pytest.fixture
def digests(tmp_path: Path) -> dict[str, str]:
    """The active bundle of each model; that of the second has a backup."""
    return {"digits": write_model(tmp_path, "digits"), "signs": write_model(tmp_path, "signs", backup={"kind": "x"})}


@pytest.fixture
def queue(tmp_path: Path, digests: dict[str, str]) -> Iterator[Queue]:
    """One item of each model, and one of each whose bundle is gone."""
    with Queue.open(f"sqlite:///{tmp_path / 'queue.db'}") as opened:
        for gone, model in itertools.product((False, True), digests):
            digest = "0" * 64 if gone else digests[model]
            opened.enqueue([picture(0, model=model, bundle_digest=digest)])
        yield opened


def named(folder: Path) -> KnownBundles:
    return KnownBundles(of_models={model: folder / model for model in NAMES})


def test_each_model_has_the_bundle_of_its_own_folder(queue: Queue, tmp_path: Path, digests: dict[str, str]) -> None:
    workspace = open_workspace(queue, named(tmp_path))
    for item_id, model in enumerate(("digits", "signs", "digits", "signs"), start=1):
        flagged = queue.get(item_id).input
        assert workspace.names(flagged) == NAMES[model]  # the third's and fourth's bundles are gone: the active ones'
        assert workspace.opinion(flagged) == {"digits": "replacement head", "signs": "backup"}[model]
        view = workspace.view(queue.get(item_id))
        assert {group.name for group in view.neighbours} <= set(NAMES[model])
        assert len(view.neighbours) == 2
    assert workspace.bundles.is_active(digests["signs"], "signs")
    assert not workspace.bundles.is_active(digests["signs"], "digits")
    assert workspace.bundles.class_names("0" * 64, "third") is None


def test_thumbnails_are_those_of_the_right_model(queue: Queue, tmp_path: Path) -> None:
    client = log_in(open_workspace(queue, named(tmp_path)))
    tones = {}
    for item_id in (1, 2):
        page = client.get("/review").text
        assert f'data-item="{item_id}"' in page
        answer = client.get(html.unescape(re.findall(r'src="(/images/clean/[^"]+)"', page)[0]))
        assert answer.status_code == 200
        with Image.open(io.BytesIO(answer.content)) as image:
            tones[queue.get(item_id).input.model] = int(np.asarray(image.convert("L")).max())
        assert client.post(f"/items/{item_id}/skip").status_code == 303
    assert tones["digits"] < 100 < tones["signs"]
    assert client.get("/images/clean/0.png").status_code == 404  # of no folder
    assert client.get("/images/clean/0.png?of=9").status_code == 404
    assert client.get("/images/clean/99.png?of=1").status_code == 404


def test_clean_images_are_named_for_all_models_or_one(queue: Queue, tmp_path: Path) -> None:
    (tmp_path / "clean-signs").rename(tmp_path / "moved")
    here = {"signs": tmp_path / "moved"}
    workspace = open_workspace(queue, named(tmp_path), here)
    assert [len(workspace.view(queue.get(item)).neighbours) for item in (1, 2)] == [2, 2]
    (folder,) = [
        clean.images.found.files[0].parent.parent for clean in (workspace.clean_by_folder[tmp_path / "signs"],)
    ]
    assert folder == tmp_path / "moved"
    with pytest.raises(
        ConfigError, match=r"--images sings=\.\.\. is of no model that --bundles names\. Did you mean 'signs'"
    ):
        open_workspace(queue, named(tmp_path), {"sings": tmp_path / "moved"})
    for extra in ("a", "b"):  # other images than those of the digits: theirs are remembered
        (tmp_path / "moved" / extra).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / "moved" / extra / "0.png")
    workspace = open_workspace(queue, named(tmp_path), tmp_path / "moved")
    assert len(workspace.view(queue.get(1)).neighbours) == 2
    assert "not those of this guard" in workspace.view(queue.get(2)).no_neighbours


def test_folders_without_names_are_found_by_digest(queue: Queue, tmp_path: Path) -> None:
    workspace = open_workspace(queue, KnownBundles(tmp_path / "digits", tmp_path / "signs"))
    assert [workspace.names(queue.get(item).input)[0] for item in (1, 2, 3)] == ["digits 0", "signs 0", "0"]
    assert [len(workspace.view(queue.get(item)).neighbours) for item in (1, 2)] == [2, 2]
    assert "not in the folder of bundles" in workspace.view(queue.get(3)).no_neighbours
    assert KnownBundles(tmp_path / "digits", tmp_path / "other" / ".." / "digits").store is not None


def test_model_in_two_folders_is_refused(tmp_path: Path, digests: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"--bundles names .*digits and .*signs for model 'digits'\. Name one"):
        known_bundles([f"digits={tmp_path / 'digits'}", f"digits={tmp_path / 'signs'}"])
    write_model(tmp_path / "copy", "digits", images_from=str(tmp_path / "clean-digits"))
    assert BundleStore(tmp_path / "copy" / "digits").active_digest() == digests["digits"]
    with pytest.raises(ConfigError, match=r"bundle .* lies in .*Name the model of each: --bundles MODEL=FOLDER"):
        known_bundles([str(tmp_path / "digits"), str(tmp_path / "copy" / "digits")])
    both = known_bundles([f"digits={tmp_path / 'digits'}", f"copies={tmp_path / 'copy' / 'digits'}"])
    assert both.find(digests["digits"], "copies").root == tmp_path / "copy" / "digits"  # type: ignore[union-attr]
    assert both.find(digests["digits"], "digits").root == tmp_path / "digits"  # type: ignore[union-attr]


def test_folder_without_bundles_is_told(tmp_path: Path, digests: dict[str, str], capsys: Any) -> None:
    (tmp_path / "empty").mkdir()
    known = known_bundles([f"digits={tmp_path / 'digits'}", f"signs={tmp_path / 'empty'}", f"faces={tmp_path / 'no'}"])
    first, second = capsys.readouterr().err.splitlines()
    assert f"no bundle is active in {tmp_path / 'empty'}, so the page shows numbers for the classes of signs" in first
    assert f"no bundle is active in {tmp_path / 'no'}" in second
    assert known.class_names("0" * 64, "signs") is None
    assert known.class_names("0" * 64, "digits") == tuple(NAMES["digits"])
    BundleStore(tmp_path / "signs")
    (tmp_path / "signs").rename(tmp_path / "no")  # fitted while the page runs
    assert known.class_names("0" * 64, "faces") == tuple(NAMES["signs"])


def test_options_name_paths_with_equal_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run=3").mkdir()
    assert by_model("--bundles", ["run=3"]) == {"": Path("run=3")}
    assert by_model("--bundles", ["digits=run=3"]) == {"digits": Path("run=3")}
    assert by_model("--bundles", ["data/run=4"]) == {"": Path("data/run=4")}
    assert by_model("--bundles", ["a", "b", "a"], several=True) == {"": [Path("a"), Path("b")]}
    with pytest.raises(ConfigError, match="--images names a and b for everything that no MODEL= stands before"):
        by_model("--images", ["a", "b"])


def test_without_folders_those_that_the_archives_follow_are_known(
    tmp_path: Path, digests: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    from guard.torchserve.archives import contents

    monkeypatch.setattr(contents, "followed_bundles", lambda path: tmp_path / path.stem)
    known = known_bundles(None, ["digits=digits.mar", "signs=signs.mar", "pinned=none.mar"])
    assert known.of_models == {model: tmp_path / model for model in NAMES}
    assert known_bundles(None).stores == []
    (tmp_path / "bundles").mkdir()
    assert known_bundles(None).store.root == Path("bundles")  # type: ignore[union-attr]


def test_networks_belong_to_the_models_whose_weights_they_have(tmp_path: Path) -> None:
    class Network:
        digest = "cd" * 32

    for model in NAMES:
        write_model(tmp_path, model, weights_digest=("cd" if model == "signs" else "ef") * 32)
    assert review_sources._models_of(Network(), named(tmp_path)) == ["signs"]  # type: ignore[arg-type]
    assert review_sources._models_of(Network(), KnownBundles(tmp_path / "digits")) == [""]  # type: ignore[arg-type]


# --- the status page, and retrainings ---


@pytest.fixture
def workspace(queue: Queue, tmp_path: Path, digests: dict[str, str]) -> Workspace:
    counters = {model: Counters(model) for model in NAMES}
    for model, one in counters.items():
        one.digest = digests[model]

    sampler = Sampler(
        [f"http://{model}:8082" for model in NAMES], read=lambda url: counters[url.split("/")[2].split(":")[0]].series()
    )
    now = datetime.now(UTC).timestamp()
    sampler.look(now - 300)
    counters["digits"].answer("clean", 300)
    counters["signs"].answer("clean", 100)
    sampler.look(now - 1)
    return workspace_of(queue, bundles=named(tmp_path), metrics=sampler)


def text_of(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


def test_status_lists_the_bundles_of_all_folders_and_of_one_model(
    workspace: Workspace, digests: dict[str, str]
) -> None:
    client = log_in(workspace)
    whole = text_of(client.get("/status").text)
    assert "Bundle Model State" in whole
    for model, digest in digests.items():
        assert f"{digest[:12]} {model} active in use fitted" in whole
    assert "is active, but the server uses" not in whole
    page = client.get("/status?model=signs").text
    assert digests["signs"][:12] in page
    assert digests["digits"][:12] not in page
    drawn = {}
    for model in ("", *NAMES):
        part = client.get(f"/status/now?model={model}").text
        charts = json.loads(html.unescape(re.search(r"data-charts='([^']*)'", part)[1]))["charts"]  # type: ignore[index]
        lines = {line["name"]: line["values"] for line in charts[0]["lines"]}
        drawn[model] = lines["expected of clean traffic"][0]
    assert drawn == {"": 2.0, "digits": 1.0, "signs": 5.0}  # 300 requests at 1 % and 100 at 5 %


def test_status_says_which_active_bundle_no_server_uses(workspace: Workspace, tmp_path: Path) -> None:
    other = write_model(tmp_path, "signs", note="fitted anew")
    assert f"Bundle {other[:12]} is active, but the server uses" in text_of(log_in(workspace).get("/status").text)


def test_roll_back_goes_to_the_folder_that_was_asked_about(
    workspace: Workspace, tmp_path: Path, digests: dict[str, str]
) -> None:
    second = write_model(tmp_path, "signs", note="fitted anew")
    admin = log_in(workspace, "root", "admin")
    page = admin.get("/status").text
    assert re.findall(r'href="(/status/rollback[^"]*)"', page) == ["/status/rollback?folder=1"]
    asked = admin.get("/status/rollback?folder=1").text
    assert "Roll back signs?" in asked
    fields = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', asked))
    assert (fields["active"], fields["target"], fields["folder"]) == (second, digests["signs"], "1")
    assert admin.post("/status/rollback", data={**fields, "folder": "0"}).status_code == 400
    assert admin.post("/status/rollback", data={**fields, "folder": "7"}).status_code == 400
    assert admin.get("/status/rollback?folder=7").status_code == 400
    assert admin.post("/status/rollback", data=fields).status_code == 303
    stores = {model: BundleStore(tmp_path / model).active_digest() for model in NAMES}
    assert stores == digests


def test_retraining_state_is_that_of_each_models_folder(
    workspace: Workspace, queue: Queue, tmp_path: Path, digests: dict[str, str]
) -> None:
    for model, needed in (("digits", 20), ("signs", 7)):
        lock = {"model": model, "enough_decisions": needed, "min_decisions": 5}
        (tmp_path / model / RETRAINER_LOCK).write_text(json.dumps(lock))
    admin = workspace.reviewers.check_token(workspace.reviewers.add("root", "admin"))
    assert {each.model: each.needed for each in workspace.awaited(admin)} == {"digits": 20, "signs": 7}
    workspace.rounds.finish(workspace.rounds.begin("signs", 0), "promoted", {}, digests["signs"])
    with pytest.raises(DataError, match="no answer is new since round 1 of signs"):
        workspace.ask_for_retraining("signs", "root")
    workspace.ask_for_retraining("digits", "root")
