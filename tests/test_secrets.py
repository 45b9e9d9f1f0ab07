"""The password of the queue's URL: in no file and no output, whatever is run with it."""

from __future__ import annotations

import os
import signal
import stat
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file
from serving_helpers import Workshop, png

from guard import Guard, GuardConfig
from guard.cli import run
from guard.config import load_settings
from guard.errors import ConfigError, GuardError
from guard.lab.attacks import MnistCnn
from guard.relabel.address import queue_url
from guard.relabel.queue import Queue
from guard.storage.bundle import BundleStore, StoredBundle, read_bundle, write_bundle
from guard.torchserve.archives.contents import read_guard_files

MARKER = "pass-w0rd-marker"
#: Nobody listens on port 9 of loopback.
URL = f"postgresql+psycopg://guard:{MARKER}@127.0.0.1:9/queue"
#: What people mistype.
MALFORMED = (
    f"postgresql://guard:{MARKER}@host:port/queue",
    f"postgresql://guard:{MARKER}/more@host/queue",
    f"postgresql:/guard:{MARKER}@host/queue",
    f"postgres:guard:{MARKER}@host/queue",
    f"mysql://guard:{MARKER}@host/queue",
    f"postgresql+psycopg://guard:{MARKER}@[host/queue",
    f"postgresql+nothing://guard:{MARKER}@host/queue",
    f"postgresql://guard:{MARKER}@127.0.0.1:9/queue?no_such_option=1",
)


def files_with(marker: str, *folders: Path) -> list[Path]:
    """Return the files below folders that hold a text; archives are looked into."""
    found = []
    for file in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        parts = [file.read_bytes()]
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as packed:
                parts += [packed.read(name) for name in packed.namelist()]
        if any(marker.encode() in part for part in parts):
            found.append(file)
    return found


@pytest.fixture(scope="module")
def old_bundle(fitted_guard: Guard, tmp_path_factory: pytest.TempPathFactory) -> StoredBundle:
    """What the version before wrote: with the queue's URL among its settings."""
    path = fitted_guard.with_config().save(tmp_path_factory.mktemp("old"))
    stored = read_bundle(path)
    return StoredBundle(
        "", {**stored.document, "settings": {**stored.document["settings"], "queue_url": URL}}, stored.arrays
    )


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """`guard serve` in this process takes the signals over."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def workshop(fitted_guard: Guard, badnet: MnistCnn, tmp_path: Path) -> Any:
    import sys

    path, modules = list(sys.path), set(sys.modules)
    shop = Workshop(fitted_guard, badnet, tmp_path)
    yield shop
    shop.close()
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.endswith(("_handler", "mnist_network")) or "_of_" in name:
            del sys.modules[name]


@pytest.mark.usefixtures("quick_checks")
def test_no_command_leaves_the_password_in_a_file_or_an_output(
    badnet: MnistCnn, clean_split: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    work, outside = tmp_path / "work", tmp_path / "outside"
    work.mkdir()
    outside.mkdir()
    (outside / "settings.toml").write_text(f'queue_url = "{URL}"\nfalse_positive_rate = 0.1\nfolds = 2\n')
    monkeypatch.chdir(work)
    monkeypatch.setenv("GUARD_QUEUE_URL", URL)
    save_file(badnet.state_dict(), work / "weights.safetensors")
    images, labels = clean_split.validation
    np.savez(work / "clean.npz", images=images[:40], labels=labels[:40])
    model = ["--weights", "weights.safetensors", "--architecture", "guard.lab.attacks.networks:mnist_cnn"]
    settings = ["--settings", str(outside / "settings.toml")]
    for expected, arguments in (
        (0, ["fit", *model, "--images", "clean.npz", *settings]),
        (0, ["archive", "digits", *model, *settings]),
        (0, ["bundle", "show"]),
        (0, ["bundle", "list"]),
        (0, ["inspect", "clean.npz", *model, *settings, "--output", "verdicts.csv", "--format", "csv"]),
        (0, ["snapshot", "save", "copy", "--bundles", "bundles", "--queue", ""]),
        (None, ["doctor"]),
        (0, ["serve", "--help"]),
        (1, ["review", "users"]),
        (1, ["snapshot", "save", "other"]),
        (None, ["audit", "--start", "2026-01-01"]),
        (1, ["retrainer", "--once", "--model", "digits"]),
        (1, ["serve", "no-such-model", "--port", "0"]),
    ):
        status = run(arguments)
        out, err = capfd.readouterr()
        assert MARKER not in out + err, arguments
        assert status == expected or expected is None, (arguments, out, err)
    assert (work / "bundles").is_dir()
    assert (work / "model_store" / "digits.mar").is_file()
    assert (work / "copy").is_dir()
    assert files_with(MARKER, work) == []


@pytest.mark.parametrize("url", MALFORMED)
def test_url_that_cannot_be_used_is_refused_without_its_password(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GUARD_QUEUE_URL", url)
    assert run(["review", "users"]) in (1, 2)
    out, err = capfd.readouterr()
    assert MARKER not in out + err
    assert "--traceback" not in err
    with pytest.raises(GuardError) as caught:
        Queue.open(queue_url(url)).close()
    assert MARKER not in str(caught.value)
    assert list(tmp_path.iterdir()) == []  # and none of them became the name of a file


def test_url_on_the_command_line_is_warned_of(tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GUARD_QUEUE_URL", raising=False)
    assert run(["review", "users", "--queue", URL]) == 1
    err = capfd.readouterr().err
    assert "seen by everybody" in " ".join(err.split())
    assert MARKER not in err


def test_settings_show_no_password_where_they_are_printed_or_refused() -> None:
    config = GuardConfig(queue_url=URL)
    assert MARKER not in repr(config) + str(config)
    assert MARKER not in str(config.portable())
    assert not config.portable().keys() & {"queue_url", "data_dir"}
    with pytest.raises(ConfigError) as caught:
        GuardConfig(queue_url=[URL])
    assert MARKER not in str(caught.value)


def test_saved_guard_holds_no_place(fitted_guard: Guard, tmp_path: Path) -> None:
    guard = replace(fitted_guard, config=fitted_guard.config.replace(queue_url=URL, data_dir=Path(MARKER)))
    digest = guard.save(tmp_path).name
    assert files_with(MARKER, tmp_path) == []
    assert fitted_guard.save(tmp_path).name == digest  # where the queue is has no part in a bundle's name


def test_bundle_of_an_older_version_loads_without_its_url_and_can_be_cleaned(
    old_bundle: StoredBundle, tmp_path: Path, caplog: Any, capfd: Any
) -> None:
    path = write_bundle(tmp_path, old_bundle.document, old_bundle.arrays)
    store = BundleStore(tmp_path)
    store.activate(path.name)
    guard = Guard.load(path)
    assert guard.config.queue_url is None
    (warning,) = [record.getMessage() for record in caplog.records]
    assert f"bundle {path.name[:12]} holds queue_url" in warning
    assert f"guard bundle clean {path.name[:12]}" in warning
    assert MARKER not in warning
    assert run(["bundle", "show", "--bundles", str(tmp_path)]) == 0
    assert MARKER not in capfd.readouterr().out
    assert run(["bundle", "clean", path.name[:12], "--bundles", str(tmp_path)]) == 0
    active = store.active_path()
    assert active != path
    assert files_with(MARKER, active) == []
    assert Guard.load(active).config == guard.config
    assert run(["bundle", "clean", active.name[:12], "--bundles", str(tmp_path)]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == f"nothing to leave out: {active.name}"


def test_archive_that_wants_a_queue_takes_it_from_the_environment(
    workshop: Workshop, triggered: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.delenv("GUARD_QUEUE_URL", raising=False)
    url = f"sqlite:///{tmp_path}/{MARKER}.db"
    worker = workshop.guarded("image", queue_url=url)
    assert files_with(MARKER, tmp_path) == []
    assert {answer.headers.get("Guard-Review") for answer in worker.ask_each(*map(png, triggered.images[:8]))} >= {
        "queued"
    }
    with Queue.open(url) as queue:
        assert queue.items(limit=1)
    monkeypatch.setitem(os.environ, "GUARD_REVIEW", "")
    archive = workshop.guarded("image", queue_url=url, start=False, name="lonely")
    lonely = workshop._started(archive)
    assert lonely.handler._runtime.review_queue is None
    assert any("wants a queue" in record.getMessage() for record in caplog.records)


def test_archive_of_an_older_version_keeps_its_queue_and_warns(workshop: Workshop, tmp_path: Path, caplog: Any) -> None:
    worker = workshop.guarded("image", action="observe")
    folder = Path(worker.context.system_properties["model_dir"])
    with (folder / "guard.toml").open("a") as file:
        file.write(f'queue_url = "{URL}"\n')
    _, settings = read_guard_files(folder)
    assert settings["queue_url"] == URL
    (warning,) = [record.getMessage() for record in caplog.records if "this archive holds" in record.getMessage()]
    assert "queue_url" in warning
    assert MARKER not in warning


def test_worker_whose_queue_cannot_be_reached_says_so_without_its_password(
    workshop: Workshop, clean_split: Any, caplog: Any, capfd: Any
) -> None:
    worker = workshop.guarded("image", queue_url=URL)
    assert worker.ask(png(clean_split.test.images[0]))[0].status == 200
    out, err = capfd.readouterr()
    assert any("the queue cannot be opened" in record.getMessage() for record in caplog.records)
    assert MARKER not in out + err + caplog.text
    assert files_with(MARKER, workshop.folder) == []


def test_guarded_archive_is_private_whatever_the_umask_and_a_plain_one_is_not(workshop: Workshop) -> None:
    old = os.umask(0)
    try:
        guarded = workshop.guarded("image", start=False)
        plain = workshop.plain("image", start=False)
    finally:
        os.umask(old)
    assert stat.S_IMODE(guarded.stat().st_mode) == 0o600
    assert stat.S_IMODE(plain.stat().st_mode) == 0o644


# --- a file instead of the environment


def test_queue_url_comes_from_a_private_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    file = tmp_path / "url"
    file.write_text(f"{tmp_path}/q.db\n")
    file.chmod(0o600)
    monkeypatch.setenv("GUARD_QUEUE_URL", "")
    monkeypatch.setenv("GUARD_QUEUE_URL_FILE", str(file))
    assert load_settings()["queue_url"] == f"{tmp_path}/q.db"
    assert run(["review", "add-user", "ada"]) == 0
    assert (tmp_path / "q.db").is_file()
    monkeypatch.setenv("GUARD_QUEUE_URL", f"{tmp_path}/other.db")
    assert load_settings()["queue_url"] == f"{tmp_path}/other.db"


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda file: file.chmod(0o644), r"which others may read\. Run: chmod 600 "),
        (lambda file: file.write_text(" \n"), r"which is empty\."),
        (lambda file: file.unlink(), r"which cannot be read: FileNotFoundError\."),
        (lambda file: file.write_bytes(b"\xff\xfe" + MARKER.encode()), r"which cannot be read: UnicodeDecodeError\."),
    ],
)
def test_file_of_the_queue_url_that_is_no_private_text_is_refused(
    harm: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "url"
    file.write_text(URL)
    file.chmod(0o600)
    harm(file)
    monkeypatch.delenv("GUARD_QUEUE_URL", raising=False)
    monkeypatch.setenv("GUARD_QUEUE_URL_FILE", str(file))
    with pytest.raises(ConfigError, match=message) as caught:
        load_settings()
    assert MARKER not in str(caught.value)
