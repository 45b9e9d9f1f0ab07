"""Read TorchServe's logs: which model did not load, and why."""

from __future__ import annotations

import re
from collections.abc import Sequence

_LINE = re.compile(r"\S+ \[(\w+) *\] (\S+)(?: \S+)? - (.*)")  # time [level] thread (logger) - text
_NOT_LOADED = re.compile(r"Load model failed: ([^,]+), error:")
_EXCEPTION = re.compile(r"[A-Za-z_][\w.$]*(?:Error|Exception|Exit|Interrupt|Warning)\b")
#: What TorchServe says after the exception that tells more.
_AFTERTHOUGHT = re.compile(r"RuntimeError: \d{3} - |ModuleNotFoundError: No module named 'ts\.torch_handler\.")
_FRAME = re.compile(r'\s*File "(?:.*/)?([^"/]+)", line (\d+)(?:, in (\S+))?')


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
