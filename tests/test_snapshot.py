"""Backing up and restoring a queue and a folder of bundles, while others write, and what is refused."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import stat
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from queue_helpers import PostgresServer, flagged, postgresql_folder

import guard.storage.snapshot
from guard.cli import run
from guard.detection.pipeline import Guard
from guard.errors import SnapshotError
from guard.relabel.items import Answer
from guard.relabel.queue import Queue
from guard.storage.bundle import BundleStore
from guard.storage.snapshot import restore_snapshot, save_snapshot, verify_snapshot


@pytest.fixture(scope="module")
def bundles(fitted_guard: Guard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bundles, of which the second is active; an unfinished third."""
    folder = tmp_path_factory.mktemp("service") / "bundles"
    store = BundleStore(folder)
    for rate in (0.05, 0.1):
        store.activate(fitted_guard.with_config(false_positive_rate=rate).save(folder).name)
    (folder / ".writing-x").mkdir()
    return folder


@pytest.fixture
def live(tmp_path: Path, sqlite_template: Path) -> str:
    """URL of a queue in which one of three items is decided."""
    shutil.copy(sqlite_template, tmp_path / "live.db")
    url = f"sqlite:///{tmp_path}/live.db"
    with Queue.open(url) as queue:
        queue.enqueue([flagged(number) for number in range(3)])
        (item,) = queue.claim("ada", 1, order="age")
        queue.decide_many("ada", [Answer(item_id=item.id, is_poisoned=True, true_label=7)])
    return url


def test_everything_comes_back(bundles: Path, live: str, tmp_path: Path) -> None:
    saved = save_snapshot(tmp_path / "copy", queue_url=live, bundles=bundles)
    restored = restore_snapshot(tmp_path / "copy", queue_url=f"sqlite:///{tmp_path}/q.db", bundles=tmp_path / "b")
    assert restored == saved
    assert saved.decisions == 1
    store, again = BundleStore(bundles), BundleStore(tmp_path / "b")
    assert again.active_digest() == store.active_digest() == saved.active
    assert {path.name for path in again.root.iterdir()} == {
        path.name for path in bundles.iterdir() if not path.name.startswith(".")
    }
    assert {again.roll_back(), saved.active} == set(saved.bundles)
    with Queue.open(live) as before, Queue.open(f"sqlite:///{tmp_path}/q.db") as after:
        assert after.verify_decisions() == before.verify_decisions()
        assert [item.input.request_id for item in after.items(limit=9)] == [f"request-{n}" for n in range(3)]
        assert after.items(limit=1)[0].input.body == b"body 0"


def test_a_snapshot_of_a_busy_queue_is_whole(live: str, tmp_path: Path) -> None:
    stop = threading.Event()
    written = [3]

    def write() -> None:
        with Queue.open(live) as queue:
            while not stop.is_set():
                queue.enqueue([flagged(written[0])])
                written[0] += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number in range(3):
            save_snapshot(tmp_path / f"copy-{number}", queue_url=live, bundles=None)
    finally:
        stop.set()
        writer.join()
    counts = []
    for number in range(3):
        verify_snapshot(tmp_path / f"copy-{number}")
        restore_snapshot(tmp_path / f"copy-{number}", queue_url=f"sqlite:///{tmp_path}/{number}.db", bundles=None)
        with Queue.open(f"sqlite:///{tmp_path}/{number}.db") as queue:
            counts.append(len(queue.items(limit=100_000)))
    assert counts == sorted(counts)
    assert counts[0] >= 3
    assert counts[-1] <= written[0]


def _cut(folder: Path) -> None:
    with (folder / "queue.db").open("r+b") as file:
        file.truncate(5000)


def _change_bundle(folder: Path) -> None:
    document = next(folder.glob("bundles/*/guard.json"))
    document.write_text(document.read_text().replace("calibrated", "paper"))


def _add(folder: Path) -> None:
    (folder / "bundles" / "more").write_text("x")


def _forget_sums(folder: Path) -> None:
    (folder / "SHA256SUMS").unlink()


@pytest.mark.parametrize("harm", [_cut, _change_bundle, _add, _forget_sums])
def test_a_changed_snapshot_is_refused_and_nothing_is_restored(
    harm: Callable[[Path], None], bundles: Path, live: str, tmp_path: Path
) -> None:
    save_snapshot(tmp_path / "copy", queue_url=live, bundles=bundles)
    harm(tmp_path / "copy")
    with pytest.raises(SnapshotError, match=r"damaged|no snapshot"):
        restore_snapshot(tmp_path / "copy", queue_url=f"sqlite:///{tmp_path}/q.db", bundles=tmp_path / "b")
    assert not (tmp_path / "q.db").exists()
    assert not (tmp_path / "b").exists()


def _reseal(folder: Path) -> None:
    """Write the sums that fit what lies there, as whoever can write to a snapshot would, links followed."""
    lines = []
    for path in sorted(folder.rglob("*")):
        if (path.is_file() and path.name != "SHA256SUMS") or (path.name == "SHA256SUMS" and path.parent != folder):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            lines.append(f"{digest}  {path.relative_to(folder).as_posix()}\n")
    (folder / "SHA256SUMS").write_text("".join(lines))


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A private key in a folder of its own, which no snapshot may bring along."""
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "id_ed25519").write_text("PRIVATE KEY")
    return tmp_path / "keys"


def _socket(place: Path, _: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(place))


STRANGE: dict[str, Callable[[Path, Path], object]] = {
    "link to a folder": lambda place, key: place.symlink_to(key, target_is_directory=True),
    "link to a file": lambda place, key: place.symlink_to(key / "id_ed25519"),
    "link to nothing": lambda place, key: place.symlink_to(key / "none"),
    "link to itself": lambda place, key: place.symlink_to(place),
    "pipe": lambda place, key: os.mkfifo(place),
    "socket": _socket,
}


@pytest.mark.parametrize("where", ["more", "bundles/more", "bundles/DIGEST/more"])
@pytest.mark.parametrize("strange", STRANGE.values(), ids=STRANGE.keys())
def test_what_is_no_plain_file_is_refused_and_nothing_of_it_is_copied(
    strange: Callable[[Path, Path], object],
    where: str,
    bundles: Path,
    key: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    about = save_snapshot(tmp_path / "copy", queue_url=None, bundles=bundles)
    monkeypatch.chdir(tmp_path / "copy")
    strange(tmp_path / "copy" / where.replace("DIGEST", str(about.active)), key)
    _reseal(tmp_path / "copy")
    for act in (verify_snapshot, lambda folder: restore_snapshot(folder, queue_url=None, bundles=tmp_path / "b")):
        with pytest.raises(
            SnapshotError, match=r"more is no plain file or folder: it is a (symbolic link|named pipe|socket)"
        ):
            act(tmp_path / "copy")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", ["queue.db", "SHA256SUMS", "bundles"])
def test_a_link_in_place_of_a_part_is_refused(name: str, bundles: Path, live: str, tmp_path: Path) -> None:
    save_snapshot(tmp_path / "copy", queue_url=live, bundles=bundles)
    (tmp_path / "copy" / name).rename(tmp_path / "elsewhere")
    (tmp_path / "copy" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SnapshotError, match=r"symbolic link|cannot be read"):
        restore_snapshot(tmp_path / "copy", queue_url=f"sqlite:///{tmp_path}/q.db", bundles=tmp_path / "b")
    assert not (tmp_path / "q.db").exists()


def test_a_link_in_the_live_folder_of_bundles_is_not_saved(bundles: Path, key: Path, tmp_path: Path) -> None:
    shutil.copytree(bundles, tmp_path / "live")
    active = BundleStore(tmp_path / "live").active_path()
    (active / "more").symlink_to(key, target_is_directory=True)
    with pytest.raises(SnapshotError, match="symbolic link"):
        save_snapshot(tmp_path / "copy", queue_url=None, bundles=tmp_path / "live")
    assert not (tmp_path / "copy").exists()


def test_a_file_that_changes_between_check_and_copy_is_refused(
    bundles: Path, live: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_snapshot(tmp_path / "copy", queue_url=live, bundles=bundles)
    verify = guard.storage.snapshot.verify_snapshot

    def then_change(folder: Path) -> object:
        about = verify(folder)
        (folder / "bundles" / "HISTORY").write_text("")
        return about

    monkeypatch.setattr(guard.storage.snapshot, "verify_snapshot", then_change)
    with pytest.raises(SnapshotError, match="was changed while it was restored"):
        restore_snapshot(tmp_path / "copy", queue_url=None, bundles=tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_only_the_owner_may_read_what_is_saved_and_restored(
    umask: int, bundles: Path, live: str, tmp_path: Path
) -> None:
    old = os.umask(umask)
    try:
        save_snapshot(tmp_path / "copy", queue_url=live, bundles=bundles)
        restore_snapshot(tmp_path / "copy", queue_url=f"sqlite:///{tmp_path}/q.db", bundles=tmp_path / "b")
        with Queue.open(f"sqlite:///{tmp_path}/q.db") as queue:
            queue.enqueue([flagged(9)])
            beside = [*tmp_path.glob("q.db*")]
            assert {stat.S_IMODE(path.stat().st_mode) for path in beside} == {0o600}
    finally:
        os.umask(old)
    for top in (tmp_path / "copy", tmp_path / "b"):
        for path in (top, *top.rglob("*")):
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_nothing_is_overwritten(bundles: Path, live: str, tmp_path: Path) -> None:
    save_snapshot(tmp_path / "copy", queue_url=live, bundles=bundles)
    with pytest.raises(SnapshotError, match="exists already"):
        save_snapshot(tmp_path / "copy", queue_url=live, bundles=bundles)
    with pytest.raises(SnapshotError, match="exists already"):
        restore_snapshot(tmp_path / "copy", queue_url=live, bundles=tmp_path / "b")
    with pytest.raises(SnapshotError, match="is not empty"):
        restore_snapshot(tmp_path / "copy", queue_url=f"sqlite:///{tmp_path}/q.db", bundles=bundles)
    assert not (tmp_path / "q.db").exists()
    assert not (tmp_path / "b").exists()


def test_a_queue_whose_decisions_were_changed_is_not_copied(live: str, tmp_path: Path) -> None:
    import sqlite3

    connection = sqlite3.connect(tmp_path / "live.db")
    connection.execute("DROP TRIGGER decisions_no_update")
    connection.execute("UPDATE decisions SET true_label = 1")
    connection.commit()
    connection.close()
    with pytest.raises(SnapshotError, match="were changed: decision 1"):
        save_snapshot(tmp_path / "copy", queue_url=live, bundles=None)
    assert not (tmp_path / "copy").exists()


def test_commands_say_what_they_did_and_what_is_wrong(
    bundles: Path, live: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--queue", live.removeprefix("sqlite:///"), "--bundles", str(bundles)]
    assert run(["snapshot", "save", str(tmp_path / "copy"), *where]) == 0
    out = capsys.readouterr().out
    assert "2 bundles, active: " in out
    assert "queue with 1 decisions" in out
    assert run(["snapshot", "verify", str(tmp_path / "copy")]) == 0
    assert run(["snapshot", "restore", str(tmp_path / "copy"), "--bundles", str(tmp_path / "b")]) == 0
    for arguments, words in (
        (["save", str(tmp_path / "n")], "nothing to copy"),
        (["save", str(tmp_path / "n"), "--queue", str(tmp_path / "none.db")], "there is no queue"),
        (["save", str(tmp_path / "n"), "--queue", "postgresql+psycopg://x@y/z"], "pg_dump"),
        (["save", str(tmp_path / "n"), "--bundles", str(tmp_path / "none")], "no bundle is active"),
        (["verify", str(tmp_path)], "is no snapshot"),
        (["restore", str(tmp_path / "copy")], "nothing to restore"),
    ):
        capsys.readouterr()
        assert run(["snapshot", *arguments]) == 1
        assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "n").exists()


def test_a_queue_in_postgresql_comes_back_from_its_own_tools(postgresql_server: PostgresServer, tmp_path: Path) -> None:
    programs = postgresql_folder()
    assert programs is not None
    source, target = postgresql_server.create_database(), postgresql_server.create_database()
    with Queue.open(source) as queue:
        queue.enqueue([flagged(number) for number in range(3)])
        (item,) = queue.claim("ada", 1, order="age")
        queue.decide_many("ada", [Answer(item_id=item.id, is_poisoned=True, true_label=7)])
        before = queue.verify_decisions()
    dump = tmp_path / "queue.dump"
    subprocess.run([programs / "pg_dump", "--format=custom", f"--file={dump}", source], check=True)
    subprocess.run([programs / "pg_restore", "--no-owner", f"--dbname={target}", dump], check=True)
    with Queue.open(target) as queue:
        assert queue.verify_decisions() == before
        assert queue.items(limit=1)[0].input.body == b"body 0"
