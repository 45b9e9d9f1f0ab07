"""Run one command for as long as the parent lives; then end it, its children, and the folders it was lent.

A script of its own, started with `python -I -S supervisor.py '<json>'`; it imports only the standard library. Its
standard input is a pipe from the parent. When the pipe closes, for whatever reason (a clean stop, an exception,
Ctrl-C, SIGTERM, even SIGKILL), the command gets SIGTERM, and what is left of its process group SIGKILL.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

POLL_SECONDS = 0.5


def main() -> int:
    """Read the job from the first argument, run it, clean up; return the exit status of the command."""
    job = json.loads(sys.argv[1])
    try:
        command = _start(job)
    except OSError:
        if _is_alone(job["parent"]):  # and its folders may be gone with the parent: nobody waits for this command
            return -int(signal.SIGKILL)
        raise
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # only the pipe ends us, so that nothing is left behind
    print(command.pid, flush=True)
    status = _wait_for_end(command, job["parent"])
    if status is None:
        command.terminate()
        status = _wait(command, job["grace_seconds"])
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(command.pid, signal.SIGKILL)
    command.wait()
    for folder in job["remove"]:
        shutil.rmtree(folder, ignore_errors=True)
    return status if status is not None else -int(signal.SIGKILL)


def _start(job: dict[str, Any]) -> subprocess.Popen[bytes]:
    with open(job["log"], "ab") as log:  # noqa: PTH123 - pathlib would double the start-up time of this script
        return subprocess.Popen(
            job["command"], cwd=job["folder"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
        )


def _wait_for_end(command: subprocess.Popen[bytes], parent: int) -> int | None:
    """Return the command's exit status, or None as soon as the parent has closed the pipe or has gone."""
    while command.poll() is None:
        if _is_alone(parent, POLL_SECONDS):
            return None
    return command.returncode


def _is_alone(parent: int, wait_seconds: float = 0.0) -> bool:
    """Return whether the parent has closed the pipe or has gone."""
    readable, _, _ = select.select([0], [], [], wait_seconds)
    if readable and not os.read(0, 64):
        return True
    return os.getppid() != parent  # a forked sibling may still hold the pipe open


def _wait(command: subprocess.Popen[bytes], seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (status := command.poll()) is not None:
            return status
        time.sleep(0.05)
    return None


if __name__ == "__main__":
    sys.exit(main() & 0xFF)
