"""Read TorchServe's logs: which model did not load, and why."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path

_LINE = re.compile(r"\S+ \[(\w+) *\] (\S+)(?: \S+)? - (.*)")  # time [level] thread (logger) - text
_NOT_LOADED = re.compile(r"Load model failed: ([^,]+), error:")
_EXCEPTION = re.compile(r"[A-Za-z_][\w.$]*(?:Error|Exception|Exit|Interrupt|Warning)\b")
#: What TorchServe says after the exception that tells more.
_AFTERTHOUGHT = re.compile(r"RuntimeError: \d{3} - |ModuleNotFoundError: No module named 'ts\.torch_handler\.")
_FRAME = re.compile(r'\s*File "(?:.*/)?([^"/]+)", line (\d+)(?:, in (\S+))?')

_LOGS = ("console.log", "ts_log.log", "model_log.log")

#: The server says that a worker is gone in one log, while another thread still copies the worker's last lines into
#: another: a traceback is taken for whole when nothing has come for so long. Lines may be lost; the next try of the
#: same worker says them again, so they are waited for at most so long.
_QUIET_SECONDS, _LONGEST_SECONDS = 1.0, 30.0


class ServerLogs:
    """The logs of one run, from where they stood when it began.

    Parameters
    ----------
    folder : Path
        Where the server writes them; may hold those of earlier runs.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        files = {name: folder / name for name in _LOGS}
        self._starts = {name: file.stat().st_size if file.exists() else 0 for name, file in files.items()}

    def lines(self, name: str) -> list[str]:
        """Return one log's lines; none if it cannot be read."""
        try:
            with (self._folder / name).open("rb") as file:
                file.seek(self._starts[name])
                return file.read().decode("utf-8", "replace").splitlines()
        except OSError:
            return []

    def tail(self, lines: int) -> str:
        """Return the last lines of every log, for a person."""
        tails = {name: self.lines(name)[-lines:] for name in _LOGS}
        return "\n".join("\n".join([f"--- {name}", *tail]) for name, tail in tails.items() if tail)

    def last_warning(self) -> str:
        """Return the last thing that the server itself complained of, in one line."""
        return last_warning(self.lines("ts_log.log"), self.lines("console.log"))

    def worker_exception(self, thread: str) -> str:
        """Return `worker_exception` of a worker that is gone, when its last lines are there; "" if it said nothing."""
        began = changed = time.monotonic()
        lines = self.lines("model_log.log")
        while (now := time.monotonic()) - began < _LONGEST_SECONDS:
            if now - changed >= _QUIET_SECONDS and (reason := worker_exception(lines, thread)):
                return reason
            time.sleep(0.05)
            if (newer := self.lines("model_log.log")) != lines:
                lines, changed = newer, time.monotonic()
        return worker_exception(lines, thread)


def failed_model(server_log: Sequence[str]) -> tuple[str, str] | None:
    """Return the name of the first model that did not load and the name of its worker's thread, None if all is well."""
    for line in server_log:
        if (match := _LINE.match(line)) and (failure := _NOT_LOADED.match(match[3])):
            return failure[1], match[2]
    return None


def worker_exception(model_log: Sequence[str], thread: str) -> str:
    """Return the last telling exception that a worker printed, in one line: its text, and where it was raised."""
    texts = [match[3] for line in model_log if (match := _LINE.match(line)) and match[2] == f"{thread}-stdout"]
    reason, place = "", ""
    for position, text in enumerate(texts):
        if frame := _FRAME.match(text):
            place = f" ({frame[1]}:{frame[2]}{f' in {frame[3]}' if frame[3] else ''})"
        elif _EXCEPTION.match(text) and not _AFTERTHOUGHT.match(text):
            lines = [text]
            for line in texts[position + 1 :]:
                if not line.startswith(("\t", " ")):
                    break
                lines.append(line)
            reason = " ".join(" ".join(lines).split()).rstrip(".") + place
    return reason


def last_warning(server_log: Sequence[str], console: Sequence[str]) -> str:
    """Return the last thing that the server itself complained of, in one line."""
    exceptions = [line.strip() for line in console if _EXCEPTION.match(line.strip().removeprefix("Caused by: "))]
    warnings = [match[3] for line in server_log if (match := _LINE.match(line))]
    spoken = [line.strip() for line in console if line.strip()]
    return (exceptions or warnings or spoken or ["its logs are empty"])[-1].rstrip(".")
