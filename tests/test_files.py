"""Private files whatever the umask, and reads that follow no link."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from queue_helpers import flagged

from guard.cli import run
from guard.files import (
    copy_private,
    list_plain,
    make_private_folder,
    open_private,
    read_plain,
    replace_file,
    whole_file,
    write_private,
)
from guard.observing.targets import Target, write_targets
from guard.relabel.queue import Queue


@pytest.fixture(autouse=True, params=[0o000, 0o022, 0o077], ids=["umask 000", "umask 022", "umask 077"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    old = os.umask(request.param)
    yield request.param
    os.umask(old)


def rights(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


WRITERS: dict[str, Callable[[Path], object]] = {
    "write_private": lambda path: write_private(path, "text"),
    "open_private": lambda path: open_private(path, "a").close(),
    "replace_file": lambda path: replace_file(path, b"data"),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_written_files_are_private_new_and_old(tmp_path: Path, write: Callable[[Path], object]) -> None:
    for path in (tmp_path / "new", tmp_path / "old"):
        if path.name == "old":
            path.write_text("before")
            path.chmod(0o666)
        write(path)
        assert rights(path) == 0o600


def test_targets_are_for_a_prometheus_of_another_account_and_only_for_their_owner_to_write(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("before")
    (tmp_path / "old").chmod(0o666)
    for name in ("old", "new"):
        write_targets(tmp_path / name, [Target("guard-server", "127.0.0.1:1")])
        assert rights(tmp_path / name) == 0o644


def test_private_folder_is_closed_new_and_old(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old").chmod(0o777)
    for name in ("old", "new", "more/new"):
        make_private_folder(tmp_path / name)
        assert rights(tmp_path / name) == 0o700


def test_whole_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail() -> None:
        with whole_file(tmp_path / "f") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_copies_are_private_and_follow_no_link(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "file").write_bytes(b"data")
    (source / "deep" / "file").chmod(0o666)
    copy_private(source, tmp_path / "copy")
    assert (tmp_path / "copy" / "deep" / "file").read_bytes() == b"data"
    assert [rights(path) for path in list_plain(tmp_path / "copy")] == [0o700, 0o600]
    (source / "deep" / "link").symlink_to(source / "deep" / "file")
    for act in (lambda: copy_private(source, tmp_path / "again"), lambda: list_plain(source)):
        with pytest.raises(OSError, match="it is a symbolic link"):
            act()
    with pytest.raises(OSError, match="it is a symbolic link"):
        read_plain(source / "deep" / "link", 10)


def test_read_plain_reads_no_more_than_allowed(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(10))
    assert read_plain(tmp_path / "f", 10) == bytes(10)
    with pytest.raises(OSError, match="more than 9 bytes") as caught:
        read_plain(tmp_path / "f", 9)
    assert caught.value.errno == errno.EFBIG


@pytest.mark.parametrize(("before", "after"), [(0o644, 0o600), (0o666, 0o600), (0o640, 0o640), (0o660, 0o660)])
def test_queue_that_everybody_may_read_is_closed_when_it_is_opened_and_a_groups_is_not(
    tmp_path: Path, sqlite_template: Path, before: int, after: int
) -> None:
    file = tmp_path / "queue.db"
    shutil.copyfile(sqlite_template, file)
    file.chmod(before)
    with Queue.open(f"sqlite:///{file}") as queue:
        queue.enqueue([flagged(1)])
        beside = list(tmp_path.glob("queue.db*"))
        assert len(beside) == 3  # with its log
        assert {rights(path) for path in beside} == {after}


def test_exports_are_private(tmp_path: Path, sqlite_template: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "queue.db"
    shutil.copyfile(sqlite_template, file)
    with Queue.open(f"sqlite:///{file}") as queue:
        queue.enqueue([flagged(1)])
    for kind in ("csv", "label-studio"):
        output = tmp_path / kind
        arguments = ["--format", kind, "--output", str(output), "--queue", str(file), "--bundles", str(tmp_path)]
        assert run(["review", "export", *arguments]) == 0, capsys.readouterr().err
        assert rights(output) == 0o600
