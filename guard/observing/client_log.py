"""What a client noted of its own requests: one line per request, as JSON or CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from guard.errors import DataError
from guard.files import decoded

#: What a log must have, and what it may have besides.
NEEDED = ("time", "request_id", "status")
OPTIONAL = ("verdict", "review", "model")
_VERDICTS = ("", "clean", "poisoned", "bypassed", "rejected", "failed")


@dataclass(frozen=True, slots=True)
class Noted:
    """One request as its client saw it.

    Attributes
    ----------
    time : datetime
        Aware; when it was sent, or when its answer came.
    request_id : str
        Of the answer; "" if none came.
    status : int
        HTTP status; 0 = no answer came.
    verdict : str
        The header Guard-Verdict; "" without it.
    review : str
        The header Guard-Review; "" without it.
    model : str
        "" = not noted.
    """

    time: datetime
    request_id: str
    status: int
    verdict: str = ""
    review: str = ""
    model: str = ""

    @property
    def kind(self) -> str:
        """What became of the request: a verdict, `rejected` or `failed` by its status, `unanswered` or `unguarded`."""
        if self.verdict:
            return self.verdict
        if self.status == 0:
            return "unanswered"
        if self.status < 400:
            return "unguarded"
        return "rejected" if self.status < 500 else "failed"


def read_client_log(path: Path) -> list[Noted]:
    """Return what a client noted, in the order of the file.

    Parameters
    ----------
    path : Path
        A JSON object per line, or CSV with a line of names; columns as in `NEEDED` and `OPTIONAL`.

    Raises
    ------
    DataError
        If it cannot be read, or a line breaks the rules; the line is named.
    """
    try:
        text = decoded(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Check the path.") from error
    rows = _json_rows(path, text) if text.lstrip()[:1] == "{" else _csv_rows(path, text)
    return [_noted(f"{path}, line {line}", row) for line, row in rows]


def read_time(text: str) -> datetime:
    """Return a time written in ISO 8601, UTC if it names no zone.

    Raises
    ------
    DataError
        If it is none.
    """
    try:
        time = datetime.fromisoformat(text.strip())
    except ValueError:
        raise DataError(f"a time must be ISO 8601 such as 2026-03-01T12:00:00Z, got {text!r}.") from None
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number} is no JSON: {error}.") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number} must be a JSON object, got {type(row).__name__}.")
            yield number, row


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(text.splitlines())
    missing = [name for name in NEEDED if name not in (reader.fieldnames or ())]
    if missing:
        raise DataError(
            f"{path} must be JSON lines, or CSV whose first line names {', '.join(NEEDED)}; "
            f"it lacks {', '.join(missing)}."
        )
    for row in reader:
        yield reader.line_num, {name: value or "" for name, value in row.items() if isinstance(name, str)}


def _noted(place: str, row: Mapping[str, Any]) -> Noted:
    missing = [name for name in NEEDED if name not in row]
    if missing:
        raise DataError(f"{place} lacks {', '.join(missing)}.")
    known = {name: str(row.get(name) or "").strip() for name in (*NEEDED, *OPTIONAL)}
    verdict = known["verdict"].lower()
    if verdict not in _VERDICTS:
        raise DataError(f"{place}: the verdict must be one of {', '.join(_VERDICTS[1:])} or empty, got {verdict!r}.")
    status = known["status"] or "0"
    if not (status.isascii() and status.isdigit() and len(status) <= 3):
        raise DataError(f"{place}: the status must be a number of HTTP, or 0 for no answer, got {status!r}.")
    try:
        time = read_time(known["time"])
    except DataError as error:
        raise DataError(f"{place}: {error}") from error
    return Noted(time, known["request_id"], int(status), verdict, known["review"], known["model"])
