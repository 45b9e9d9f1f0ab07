"""From the stock archiver's archive to a guarded one and back: files, answers, class names, and every wrong input."""

from __future__ import annotations

import base64
import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from object_store_helpers import BUCKET, Proxy
from serving_helpers import HANDLERS, Worker, png
from wrap_helpers import (
    NAMES,
    classifier_archive,
    contents,
    guard_command,
    rewritten,
    save_images,
    scaled_archive,
    stock_archive,
)

from guard import Guard
from guard.lab.attacks import MnistCnn
from guard.serving.single_image import holds_one_image
from guard.storage.bundle import DOCUMENT
from guard.storage.stores import open_store
from guard.torchserve.archives.class_list import read_class_list
from guard.torchserve.archives.manifest import MANIFEST
from guard.torchserve.archives.original import RECIPE
from guard.torchserve.archives.wrapping import open_archive
from guard.torchserve.server import TorchServeInstance

FIT = ("--false-positive-rate", "0.05")


@pytest.fixture(scope="module")
def clean(clean_split: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    images, labels = clean_split.validation
    return save_images(tmp_path_factory.mktemp("clean") / "clean.npz", images[:200], labels[:200])


@pytest.fixture
def quick_fit(fitted_guard: Guard, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any, Any]]:
    """Hand out the session's guard instead of fitting one, and keep what it was to be fitted on."""
    requested = []

    def fit(suspect: Any, images: Any, labels: Any, config: Any, **more: Any) -> Guard:
        requested.append((images, labels, more["class_names"]))
        return replace(fitted_guard, class_names=more["class_names"] and tuple(more["class_names"]))

    monkeypatch.setattr("guard.detection.pipeline.Guard.fit", fit)
    monkeypatch.setattr("guard.cli.fitting._share_right", lambda guard: 1.0)
    return requested


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Any]:
    started: list[Worker] = []

    def start(archive: Path) -> Worker:
        started.append(Worker(archive, tmp_path / f"worker-{len(started)}-{archive.stem}"))
        return started[-1]

    yield start
    for worker in started:
        worker.close()


@pytest.mark.usefixtures("few_folds", "quick_checks")
def test_wrap_fits_keeps_every_file_and_unwrap_gives_the_same_bytes_back(
    badnet: MnistCnn, clean: Path, clean_split: Any, triggered: Any, tmp_path: Path, capfd: Any, workers: Any
) -> None:
    archive = classifier_archive(tmp_path, badnet)
    before = archive.read_bytes()
    status, out, err = guard_command(capfd, "wrap", archive, "--images", clean, *FIT)
    assert status == 0, err
    assert not {"warning", "error"} & {line.partition(":")[0] for line in err.splitlines()}  # progress at most
    guarded = archive.with_name("digits.guarded.mar")
    assert f"guard serve digits=digits.guarded.mar --model-store {archive.parent}" in out
    assert archive.read_bytes() == before
    old, new = contents(archive), contents(guarded)
    manifests = [json.loads(held.pop(MANIFEST)) for held in (old, new)]
    assert old.items() <= new.items()
    assert manifests[1].pop("model") == {**manifests[0].pop("model"), "handler": "guard_handler.py"}
    assert manifests[0] == manifests[1]
    added = {name.split("/")[0] for name in set(new) - set(old)}
    assert added - {"guard_handler.py", "guard_archive.json", "guard.toml", "guard_examples", RECIPE} == {
        json.loads(new["guard_archive.json"])["embedded"]
    }
    assert "batches         images are answered together: the handler keeps them apart" in out
    document = json.loads(new[f"{json.loads(new['guard_archive.json'])['embedded']}/{DOCUMENT}"])
    assert document["images_from"] == str(clean.absolute())
    assert "batch_dependence" not in document
    examples = [new[name] for name in json.loads(new["guard_archive.json"])["examples"]]
    assert len(set(examples)) == 4
    assert all(holds_one_image(body) for body in examples)
    assert len(new[RECIPE]) < 4000  # the original is not in there twice
    assert tomllib.loads(new["guard.toml"].decode()) == {"false_positive_rate": 0.05}

    plain, watched = workers(archive), workers(guarded)
    bodies = [bytearray(png(image)) for image in (*clean_split.test.images[:20], *triggered.images[:20])]
    bodies += [base64.b64encode(bodies[0]).decode(), clean_split.test.images[0].tolist()]
    expected, answered = plain.ask_each(*bodies), watched.ask_each(*bodies)
    assert watched.handler._batches._why_one_by_one == ""
    assert [answer.body for answer in answered] == [answer.body for answer in expected]
    assert set(expected[0].body) <= set(NAMES)
    verdicts = [answer.verdict[0] for answer in answered]
    assert verdicts[20:40].count("poisoned") > 15
    assert verdicts[:20].count("clean") > 15
    assert len(set(answered[0].verdict) | set(answered[40].verdict)) == 2  # PNG and its base64 text: the same image

    status, out, _ = guard_command(capfd, "unwrap", guarded, "--output", tmp_path / "back.mar")
    assert status == 0
    assert (tmp_path / "back.mar").read_bytes() == before


@pytest.mark.usefixtures("quick_fit", "quick_checks")
def test_wrap_keeps_headers_statuses_yaml_and_helpers_of_a_handler_of_its_own(
    badnet: MnistCnn, clean: Path, clean_split: Any, tmp_path: Path, capfd: Any, workers: Any
) -> None:
    home = tmp_path / "my models"
    home.mkdir()
    archive = scaled_archive(home, badnet)
    settings = tmp_path / "settings.toml"
    settings.write_text('model_attribute = "net"\n')
    more = ("--settings", settings, "--queue", tmp_path / "queue.db")
    status, out, err = guard_command(capfd, "wrap", archive, "--images", clean, *more)
    assert status == 0, err
    assert "batches         images are answered together" in out
    assert f"guard serve scaled=scaled.guarded.mar --model-store '{archive.parent}'" in out
    assert "version 2.3, as before" in out
    guarded = archive.with_name("scaled.guarded.mar")
    held = contents(guarded)
    assert json.loads(held[MANIFEST])["model"]["configFile"] == "model-config.yaml"
    assert held["scaling/helper.py"] == contents(archive)["scaling/helper.py"]
    assert tomllib.loads(held["guard.toml"].decode()) == {
        "model_attribute": "net",
        "review": True,  # it wants a queue, and does not say where
    }
    # the Worker has no YAML settings of its own: TorchServe reads them from the manifest's configFile
    with pytest.MonkeyPatch.context() as patch:
        from ts.context import Context

        original = Context.__init__

        def init(self: Any, *args: Any, **more: Any) -> None:
            original(self, *args, **{**more, "model_yaml_config": {"handler": {"word": "digit"}}})

        patch.setattr(Context, "__init__", init)
        plain, watched = workers(archive), workers(guarded)
    bodies = [bytearray(png(image)) for image in clean_split.test.images[:5]]
    for expected, answered in zip(plain.ask_each(*bodies), watched.ask_each(*bodies), strict=True):
        assert (answered.status, answered.body) == (203, expected.body)
        assert expected.headers.items() <= answered.headers.items()
        assert answered.verdict[0] in ("clean", "poisoned")


@pytest.mark.usefixtures("quick_checks")
def test_wrap_dry_run_prints_what_would_change_and_writes_nothing(
    badnet: MnistCnn, clean: Path, tmp_path: Path, capfd: Any, quick_fit: Any
) -> None:
    archive = classifier_archive(tmp_path, badnet)
    before = sorted(path for path in tmp_path.rglob("*"))
    more = ("--bundles", tmp_path / "bundles", "--dry-run")
    status, out, _ = guard_command(capfd, "wrap", archive, "--images", clean, *more)
    assert status == 0
    assert out.startswith("dry run: nothing was written; this would be\n")
    assert "handler classifier_handler.py -> guard_handler.py" in out
    assert "kept            5 files, byte for byte: " in out
    assert sorted(path for path in tmp_path.rglob("*")) == before
    images, _, names = quick_fit[0]
    assert images.shape == (200, 1, 28, 28)
    assert names == NAMES


@pytest.mark.usefixtures("quick_fit", "quick_checks")
def test_wrap_writes_a_bundle_that_the_server_follows_and_never_over_the_archive(
    badnet: MnistCnn, clean: Path, tmp_path: Path, capfd: Any
) -> None:
    archive = classifier_archive(tmp_path, badnet)
    before = archive.read_bytes()
    link = tmp_path / "link.mar"
    link.symlink_to(archive)
    for output in (archive, link):
        status, _, err = guard_command(capfd, "wrap", archive, "--images", clean, "--output", output, "--force")
        assert status == 1
        assert "is the archive itself, which is never written over" in err
    target = tmp_path / "g.mar"
    command = ("wrap", archive, "--images", clean, "--output", target, "--bundles", tmp_path / "bundles")
    assert guard_command(capfd, *command)[0] == 0
    about = json.loads(contents(target)["guard_archive.json"])
    assert about["bundles"] == str(tmp_path / "bundles")
    assert (tmp_path / "bundles" / "ACTIVE").read_text().strip() == about["embedded"]
    first = target.read_bytes()
    status, _, err = guard_command(capfd, *command)
    assert (status, "exists already" in err) == (1, True)
    assert guard_command(capfd, *command, "--no-check", "--force")[0] == 0
    assert target.read_bytes() == first  # the same contents are the same bytes
    status, _, err = guard_command(capfd, "wrap", target, "--images", clean)
    assert (status, "is guarded already. Take the guard out first" in err) == (1, True)
    assert archive.read_bytes() == before


@pytest.mark.usefixtures("quick_fit", "quick_checks")
def test_wrap_writes_a_bundle_below_a_url(badnet: MnistCnn, clean: Path, tmp_path: Path, capfd: Any, s3: Proxy) -> None:
    url, target = f"s3://{BUCKET}/wrapped", tmp_path / "g.mar"
    archive = classifier_archive(tmp_path, badnet)
    command = ("wrap", archive, "--images", clean, "--output", target, "--bundles", url)
    assert guard_command(capfd, *command, "--no-check")[0] == 0
    about = json.loads(contents(target)["guard_archive.json"])
    assert (about["bundles"], about["embedded"]) == (url, open_store(url).active_digest())
    s3.go_down()
    status, _, err = guard_command(capfd, *command, "--force")
    assert (status, "no connection" in err) == (1, True)


def test_wrap_takes_folders_by_class_name_and_other_bodies(
    badnet: MnistCnn, clean_split: Any, tmp_path: Path, capfd: Any, quick_fit: Any
) -> None:
    archive = classifier_archive(tmp_path, badnet)
    images, labels = clean_split.validation
    for row in range(40):
        folder = tmp_path / "clean" / NAMES[labels[row]]
        folder.mkdir(parents=True, exist_ok=True)
        if row % 4 == 1:
            (folder / f"{row}.json").write_text(json.dumps(images[row].tolist()))
        elif row % 4 == 2:
            (folder / f"{row}.b64").write_text(base64.b64encode(png(images[row])).decode())
        else:
            (folder / f"{row}.png").write_bytes(png(images[row]))
    command = ("wrap", archive, "--images", tmp_path / "clean", *FIT, "--no-check")
    status, _, err = guard_command(capfd, *command)
    assert status == 0, err
    fitted, fitted_labels, _ = quick_fit[0]
    np.testing.assert_allclose(fitted.sum((1, 2, 3)).sum(), images[:40].sum(), rtol=1e-5)
    assert sorted(fitted_labels) == sorted(labels[:40])
    (tmp_path / "clean" / "zero").rename(tmp_path / "clean" / "zebra")
    status, _, err = guard_command(capfd, *command, "--force")
    assert status == 1
    assert "sub-folder 'zebra' is not in the class list (zero, one" in err
    (tmp_path / "clean" / "zebra").rename(tmp_path / "clean" / "zero")
    next((tmp_path / "clean" / "zero").iterdir()).with_suffix(".json").write_text("{")
    status, _, err = guard_command(capfd, *command, "--force")
    assert (status, "it is no json" in err) == (1, True)


def test_class_list_is_read_in_every_form_that_torchserve_takes(tmp_path: Path) -> None:
    assert read_class_list(tmp_path) is None
    file = tmp_path / "index_to_name.json"
    file.write_text('{"object_type_names": ["a", "b"]}')
    assert read_class_list(tmp_path) == ["a", "b"]
    file.write_text('{"1": ["n2", "crane"], "0": ["n1", "crane"]}')
    classes = read_class_list(tmp_path)
    assert classes is not None
    assert classes == ["crane", "crane"]
    assert classes.labels == {"n1": 0, "n2": 1}
    file.write_text('{"cat": "0"}')
    assert read_class_list(tmp_path) is None


def wrong_images(folder: Path, kind: str) -> Path:
    rng, n = np.random.default_rng(0), 60
    shape = {"size": (n, 20, 20), "few": (10, 28, 28), "few in a part": (10, 28, 28)}.get(kind, (n, 28, 28))
    images: Any = rng.integers(0, 256, shape, np.uint8)
    if kind == "normalised":
        images = rng.normal(size=(n, 1, 28, 28)).astype(np.float32)
    labels = np.arange(len(images)) % 10 + (5 if kind == "labels" else 0)
    if kind == "channels":
        images = rng.integers(0, 256, (n, 28, 28, 3), np.uint8)
    np.savez(folder / "wrong.npz", images=images, **({} if kind == "unlabelled" else {"labels": labels}))
    return folder / "wrong.npz"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("size", r"image 0 cannot be answered by the handler: .*Are these images what clients send"),
        ("channels", r"image 0 cannot be answered by the handler: .*Are these images what clients send"),
        ("labels", r"labels must be in \[0, 10\), got 5 to 14"),
        ("few", r"false_positive_rate=0\.05 needs at least 19 clean images, got 10"),
        ("unlabelled", r"has no labels: use one sub-folder per class, or a \.npz with 'labels'"),
        ("normalised", r"must be 8-bit pixels divided by 255 .* as uint8: the handler preprocesses them"),
    ],
)
def test_wrap_with_wrong_images_is_one_line_and_leaves_nothing(
    tmp_path: Path, capfd: Any, kind: str, message: str
) -> None:
    torch.manual_seed(0)
    weights = tmp_path / "weights.pt"
    torch.save(MnistCnn().state_dict(), weights)
    archive = stock_archive(tmp_path / "store", "plain", str(HANDLERS / "stock_handler.py"), weights)
    bundles = tmp_path / "bundles"
    command = ("wrap", archive, "--images", wrong_images(tmp_path, kind), *FIT, "--bundles", bundles)
    status, out, err = guard_command(capfd, *command)
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert re.search(message, err), err
    assert list(archive.parent.iterdir()) == [archive]
    assert not bundles.exists()
    assert archive.is_file()


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        ("crops", "makes 5 rows of the forward pass per request"),
        ("unseen", "answers without calling its network as a whole"),
        ("failing", None),
    ],
)
def test_wrap_refuses_a_handler_that_a_guard_cannot_watch(
    tmp_path: Path, clean: Path, capfd: Any, handler: str, message: str | None
) -> None:
    torch.manual_seed(0)
    weights = tmp_path / "weights.pt"
    torch.save(MnistCnn().state_dict(), weights)
    selected, base = HANDLERS / f"{handler}_handler.py", HANDLERS / "stock_handler.py"
    if message is None:
        selected = tmp_path / "failing_handler.py"
        selected.write_text("raise OSError('no licence')\n")
        message = r"handler failing_handler.py cannot be imported: OSError: no licence. Install here"
    archive = stock_archive(tmp_path / "store", "odd", str(selected), weights, [base])
    status, _, err = guard_command(capfd, "wrap", archive, "--images", clean, *FIT)
    assert (status, len(err.splitlines())) == (1, 1)
    assert message in err
    assert list(archive.parent.iterdir()) == [archive]


def test_wrap_refuses_a_function_beside_the_class(tmp_path: Path, clean: Path, capfd: Any) -> None:
    archive = classifier_archive(tmp_path, MnistCnn())
    handler = contents(archive)["classifier_handler.py"] + b"\n\ndef handle(data, context):\n    return data\n"
    both = rewritten(archive, tmp_path / "both.mar", {"classifier_handler.py": handler})
    status, _, err = guard_command(capfd, "wrap", both, "--images", clean, *FIT)
    assert (status, "has a function `handle`, which TorchServe calls instead" in err) == (1, True)


def test_wrap_handler_by_name_works_or_says_what_is_not_installed(
    badnet: MnistCnn, tmp_path: Path, clean: Path, capfd: Any
) -> None:
    weights = tmp_path / "weights.pt"
    torch.save(badnet.state_dict(), weights)
    archive = stock_archive(tmp_path / "store", "named", "image_classifier", weights)
    try:
        import torchvision  # noqa: F401
    except ImportError:
        status, _, err = guard_command(capfd, "wrap", archive, "--images", clean, *FIT)
        assert (status, len(err.splitlines())) == (1, 1)
        assert "named.mar: handler image_classifier cannot be imported: ModuleNotFoundError: No module named" in err
        assert "Install here what the server has installed" in err
    with open_archive(archive) as opened:
        assert opened.handler == "image_classifier"


@pytest.mark.usefixtures("quick_fit")
def test_unwrap_names_the_file_and_refuses_what_it_cannot_give_back(
    badnet: MnistCnn, clean: Path, tmp_path: Path, capfd: Any
) -> None:
    archive = classifier_archive(tmp_path, badnet)
    assert guard_command(capfd, "wrap", archive, "--images", clean, "--no-check")[0] == 0
    guarded, before = archive.with_name("digits.guarded.mar"), archive.read_bytes()
    status, _, err = guard_command(capfd, "unwrap", guarded)
    assert (status, f"{archive} exists already" in err) == (1, True)
    archive.unlink()
    assert guard_command(capfd, "unwrap", guarded)[0] == 0
    assert archive.read_bytes() == before
    status, _, err = guard_command(capfd, "unwrap", archive)
    assert (status, "digits.mar has no guard: it holds no original" in err) == (1, True)

    recipe = json.loads(contents(guarded)[RECIPE])
    endless = json.dumps({**recipe, "parts": recipe["parts"] * 50}).encode()
    changes: list[dict[str, bytes | None]] = [
        {"index_to_name.json": b"{}"},
        {"index_to_name.json": None},
        {RECIPE: endless},
        {RECIPE: json.dumps({**recipe, "parts": [{"bytes": "!"}]}).encode()},
        {RECIPE: json.dumps({**recipe, "parts": [3]}).encode()},
        {RECIPE: b"[]"},
    ]
    for change in changes:
        damaged = rewritten(guarded, tmp_path / "damaged.mar", change)
        status, out, err = guard_command(capfd, "unwrap", damaged, "--output", tmp_path / "out.mar")
        assert (status, out, len(err.splitlines())) == (1, "", 1)
        assert "was changed after it was made" in err or "is damaged" in err
        assert not list(tmp_path.glob("*out.mar*"))


@pytest.mark.torchserve
@pytest.mark.usefixtures("quick_workers")
def test_wrapped_archives_beside_plain_ones_in_one_server_answer_old_clients_the_same(
    badnet: MnistCnn, clean: Path, clean_split: Any, tmp_path: Path, capfd: Any, quick_fit: Any
) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text('model_attribute = "net"\n')
    archives = {"digits": classifier_archive(tmp_path, badnet), "scaled": scaled_archive(tmp_path, badnet)}
    more: dict[str, tuple[Any, ...]] = {"digits": (), "scaled": ("--settings", settings)}
    for name, archive in archives.items():
        assert guard_command(capfd, "wrap", archive, "--images", clean, "--no-check", *more[name])[0] == 0
    models = {f"{name}{kind}": f"{name}{kind.replace('-', '.')}.mar" for name in archives for kind in ("", "-guarded")}
    image = png(clean_split.test.images[0])
    bodies = {
        "image/png": image,
        "text/plain": base64.b64encode(image),
        "application/json": json.dumps(clean_split.test.images[0].tolist()).encode(),
    }
    with TorchServeInstance(archives["digits"].parent, models) as server:
        server.wait_ready()
        with server.client() as client:
            for name, kind in [*(("digits", kind) for kind in bodies), ("scaled", "image/png")]:
                replies = [
                    client.predict(served, bodies[kind], content_type=kind) for served in (name, f"{name}-guarded")
                ]
                plain, guarded = replies
                assert plain.status == (200 if name == "digits" else 203)
                assert (guarded.status, guarded.body) == (plain.status, plain.body)
                assert guarded.headers["guard-verdict"] in ("clean", "poisoned")
                assert "guard-verdict" not in plain.headers
                assert plain.headers.get("x-digit") == guarded.headers.get("x-digit")
                assert plain.headers.get("content-type") == guarded.headers.get("content-type")
