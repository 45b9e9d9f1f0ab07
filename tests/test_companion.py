"""Processes beside the server: kept running, and gone when they should be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from guard.errors import ServerError
from guard.processes import companion as module
from guard.processes import supervisor
from guard.processes.companion import Companion

Make = Callable[..., Companion]
SLEEPER = "import os, time; print(os.environ.get('TOLD'), flush=True); time.sleep(600)"


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Companion] = []

    def build(code: str = SLEEPER, **environment: str) -> Companion:
        made.append(
            Companion(
                "sleeper",
                [sys.executable, "-c", code],
                folder=tmp_path,
                log=tmp_path / "log.txt",
                environment=environment,
            )
        )
        return made[-1]

    yield build
    for decision in made:
        decision.stop()


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # whenever it ends, between two looks too
        return False


def test_companion_runs_with_its_environment_and_logs(make: Make, tmp_path: Path) -> None:
    companion = make(TOLD="a secret")
    companion.start()
    wait_for(lambda: (tmp_path / "log.txt").read_text() == "a secret\n")
    assert companion.keep_alive() == ""
    assert alive(companion.pid)
    assert "a secret" not in " ".join(psutil.Process(companion.pid).cmdline())


def test_companion_that_dies_is_started_again(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    companion = make()
    companion.start()
    first = companion.pid
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: not alive(first))
    answer: list[str] = []
    wait_for(lambda: answer.append(companion.keep_alive()) or "sleeper started again" in answer)
    assert next(filter(None, answer)) == (
        f"sleeper has ended with status 247; started again in 1 s. Its log: {tmp_path / 'log.txt'}"
    )
    assert companion.pid != first
    assert alive(companion.pid)


def test_companion_that_keeps_dying_is_started_less_and_less_often(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LONGEST_PAUSE", 4.0)
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    companion = make("raise SystemExit(3)")
    companion.start()
    pauses = []
    for _ in range(5):
        deadline = time.time() + 20
        while not (answer := companion.keep_alive()):
            assert time.time() < deadline
            time.sleep(0.01)
        assert "status 3" in answer
        pauses.append(answer.partition("again in ")[2].partition(" s.")[0])
        assert companion.keep_alive() == ""  # not before its time
        now[0] += float(pauses[-1])
        assert companion.keep_alive() == "sleeper started again"
    assert pauses == ["1", "2", "4", "4", "4"]


def test_companion_that_ran_well_for_long_is_forgiven(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    companion = make()
    companion._deaths = 5
    companion.start()
    now[0] += 61
    os.kill(companion.pid, signal.SIGKILL)
    deadline = time.time() + 20
    while not (answer := companion.keep_alive()):
        assert time.time() < deadline
        time.sleep(0.01)
    assert "started again in 1 s" in answer


def test_companion_stop_ends_it_and_its_children(make: Make, tmp_path: Path) -> None:
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {SLEEPER!r}]); time.sleep(600)"
    companion = make(code)
    companion.start()
    process = psutil.Process(companion.pid)
    wait_for(lambda: len(process.children()) == 1)
    pids = [companion.pid, process.children()[0].pid]
    companion.stop()
    wait_for(lambda: not any(map(alive, pids)))
    companion.stop()


def test_companion_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    code = f"""
        import sys, time
        from pathlib import Path
        from guard.processes.companion import Companion
        folder = Path({str(tmp_path)!r})
        one = Companion("x", [sys.executable, "-c", {SLEEPER!r}], folder=folder, log=folder / "log.txt")
        one.start()
        print(one.pid, flush=True)
        time.sleep(600)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    wait_for(lambda: not alive(pid))


def test_companion_that_cannot_be_run_says_so(tmp_path: Path) -> None:
    companion = Companion("x", [str(tmp_path / "missing")], folder=tmp_path, log=tmp_path / "log.txt")
    with pytest.raises(ServerError, match=r"^missing cannot be started: its supervisor ended at once\.$"):
        companion.start()


def test_start_that_is_interrupted_leaves_no_supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, pid_file = tmp_path / "slow-python", tmp_path / "pid"
    slow.write_text(
        f'#!/bin/sh\necho $$ > "{pid_file}.part"; mv "{pid_file}.part" "{pid_file}"; sleep 1\n'
        f'exec "{sys.executable}" "$@"\n'
    )
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)

    def interrupt() -> None:
        wait_for(pid_file.exists)
        os.kill(os.getpid(), signal.SIGALRM)

    thread = threading.Thread(target=interrupt)
    folder = tmp_path / "folder"
    folder.mkdir()
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            Companion("x", ["sleep", "600"], folder=folder, log=folder / "log.txt").start()
    finally:
        thread.join()
        signal.signal(signal.SIGALRM, before)
    assert not alive(int(pid_file.read_text()))


@pytest.mark.parametrize(("gave_up", "words"), [(True, ""), (False, "FileNotFoundError")])
def test_supervisor_is_silent_about_a_missing_folder_only_when_nobody_waits(
    tmp_path: Path, gave_up: bool, words: str
) -> None:
    gone = tmp_path / "gone"
    job = {"command": ["true"], "folder": str(gone), "log": str(gone / "log.txt"), "parent": os.getpid()}
    with subprocess.Popen(
        [sys.executable, "-I", "-S", str(supervisor.__file__), json.dumps(job)],
        stdin=subprocess.DEVNULL if gave_up else subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        printed = process.stderr.read()
    assert words in printed
    assert bool(printed) == bool(words)
    assert process.returncode != 0
