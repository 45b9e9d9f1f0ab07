"""A process beside the server: ends with this one, however this one ends, and is started again when it dies."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from guard.errors import ServerError
from guard.processes import supervisor

#: A companion that dies again at once is started again after so many seconds, at most.
_LONGEST_PAUSE = 30.0
#: One that has run for so long is taken to be well, and its next death is the first again.
_WELL_AFTER = 60.0


def start_supervised(
    command: Sequence[str],
    *,
    folder: Path,
    log: Path,
    environment: Mapping[str, str],
    grace_seconds: float,
    remove: Sequence[Path] = (),
) -> tuple[subprocess.Popen[bytes], int]:
    """Start a command under a small supervisor that ends it when this process ends in any way, SIGKILL included.

    Parameters
    ----------
    command : sequence of str
    folder : Path
        To run in.
    log : Path
        File that gets its output.
    environment : mapping of str to str
        The whole one.
    grace_seconds : float
        Between SIGTERM and SIGKILL.
    remove : sequence of Path
        Folders that are removed afterwards.

    Returns
    -------
    process : Popen
        The supervisor; closing its `stdin` ends the command, and it ends with the command's status.
    pid : int
        Of the command.

    Raises
    ------
    ServerError
        If it ends at once.
    """
    job = {
        "command": list(command),
        "folder": str(folder),
        "log": str(log),
        "parent": os.getpid(),
        "grace_seconds": grace_seconds,
        "remove": [str(path) for path in remove],
    }
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(supervisor.__file__)), json.dumps(job)],
        env=dict(environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # so that Ctrl-C reaches us alone, and we stop everything in order
        umask=0o077,  # logs, keys and unpacked models are nobody else's, whatever folder they go to
    )
    assert process.stdout is not None
    try:
        first_line = process.stdout.readline()
        if not first_line.strip().isdigit():
            raise ServerError(f"{Path(command[0]).name} cannot be started: its supervisor ended at once.")
    except BaseException:  # Ctrl-C too: the caller gets nothing to end, and may remove the folder it runs in
        end_supervised(process, grace_seconds)
        raise
    return process, int(first_line)


def end_supervised(process: subprocess.Popen[bytes], grace_seconds: float) -> None:
    """End a command that `start_supervised` started, and wait until it has."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    try:
        process.wait(grace_seconds + 5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


class Companion:
    """One command that is kept running until `stop`.

    Parameters
    ----------
    name : str
        For people.
    command : sequence of str
    folder : Path
        To run in.
    log : Path
        File that gets its output.
    environment : mapping of str to str, optional
        Variables beside those of this process.
    """

    grace_seconds = 5.0

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        folder: Path,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self.command, self.folder, self.log = name, tuple(command), folder, log
        self.environment = dict(environment or {})
        self.pid = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._deaths = 0
        self._started_at = 0.0
        self._start_after = 0.0

    def start(self) -> None:
        """Start the command.

        Raises
        ------
        ServerError
            If it ends at once.
        """
        self._started_at = time.monotonic()
        self._process, self.pid = start_supervised(
            self.command,
            folder=self.folder,
            log=self.log,
            environment={**os.environ, **self.environment},
            grace_seconds=self.grace_seconds,
        )

    def keep_alive(self) -> str:
        """Start it again if it has died; call this every second or so.

        Returns
        -------
        what_happened : str
            One line, "" if it runs, or waits to be started again.
        """
        now = time.monotonic()
        if self._process is not None:
            status = self._process.poll()
            if status is None:
                return ""
            end_supervised(self._process, self.grace_seconds)
            self._process = None
            self._deaths = 1 if now - self._started_at > _WELL_AFTER else self._deaths + 1
            pause = min(2.0 ** (self._deaths - 1), _LONGEST_PAUSE)
            self._start_after = now + pause
            return f"{self.name} has ended with status {status}; started again in {pause:g} s. Its log: {self.log}"
        if now < self._start_after:
            return ""
        self.start()
        return f"{self.name} started again"

    def has_ended(self) -> bool:
        """Return whether it does not run, and waits to be started again."""
        return self._process is None or self._process.poll() is not None

    def stop(self) -> None:
        """Stop it. Safe to call twice."""
        process, self._process = self._process, None
        if process is not None:
            end_supervised(process, self.grace_seconds)
