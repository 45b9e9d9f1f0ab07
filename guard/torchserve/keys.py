"""API keys that outlive the server: kept in a file, and put in the place of those that TorchServe makes anew."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

from guard.errors import ServerError
from guard.files import read_plain, replace_file, write_private
from guard.resources import resource_path

#: What TorchServe asks a key for; `API` is for its own calls that change keys.
KINDS = ("inference", "management", "API")
_KEY = re.compile("[A-Za-z0-9_-]{16,200}")
_MOST_BYTES = 4096


def kept_keys(file: Path, *, rotate: bool = False) -> dict[str, str]:
    """Return the keys in a file, by kind; new ones, written for its owner alone, if there is none or they shall change.

    Parameters
    ----------
    file : Path
        JSON as TorchServe's `key_file.json`: kind -> `{"key": ...}`.
    rotate : bool
        Make new keys; the old ones are void from the next start on.

    Raises
    ------
    ServerError
        If the file can be read by others, or holds no keys; or cannot be written.
    """
    try:
        if not rotate and file.exists():
            return _read(file, KINDS)
        keys = {kind: secrets.token_urlsafe(24) for kind in KINDS}
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, json.dumps({kind: {"key": key} for kind, key in keys.items()}, indent=2).encode() + b"\n")
    except OSError as error:
        raise ServerError(f"the key file {file} cannot be used: {error.strerror}. Name another.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ServerError(
            f"{file} holds no keys ({error}). Name another file, or make new ones with --rotate-keys."
        ) from error
    return keys


def inference_key(file: Path) -> str:
    """Return the key for predictions that a file of keys holds.

    Raises
    ------
    ServerError
        If the file can be read by others, or holds none.
    """
    try:
        return _read(file, ("inference",))["inference"]
    except OSError as error:
        raise ServerError(f"the key file {file} cannot be used: {error.strerror}. Name another.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ServerError(f"{file} holds no key for predictions ({error}). Name another file.") from error


def _read(file: Path, kinds: Sequence[str]) -> dict[str, str]:
    if file.stat().st_mode & 0o077:
        raise ServerError(f"{file} holds keys that others can read: its mode must be 600. chmod 600 it.")
    known = json.loads(read_plain(file, _MOST_BYTES))
    keys = {kind: known[kind]["key"] for kind in kinds}
    if not all(_KEY.fullmatch(key) for key in keys.values()):
        raise ValueError("a key must be 16 to 200 letters, digits, - or _")
    return keys


def agent_option(keys: dict[str, str], folder: Path) -> str:
    """Return the Java option that lets TorchServe take these keys, handed over in a file in a private folder."""
    handed_over = folder / "steady_keys.properties"
    write_private(handed_over, "".join(f"{kind}={key}\n" for kind, key in keys.items()))
    return f"-javaagent:{resource_path('steady_keys.jar')}={handed_over}"
