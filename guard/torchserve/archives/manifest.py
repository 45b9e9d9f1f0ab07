"""What an archive's manifest says: which of its files is the handler, which the weights, and under which name."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from guard.errors import ArchiveError

MANIFEST = "MAR-INF/MANIFEST.json"
_REMEDY = "Make the archive again with torch-model-archiver."


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest that was checked against the archive's members.

    Attributes
    ----------
    document : dict
        All of it.
    name, version : str
        Of the model; the version is "" where none is given.
    handler : str
        As it is written there: `"mine.py"`, `"mine"`, `"image_classifier"`.
    handler_file : str or None
        The member that holds the handler; None = one that TorchServe ships.
    weights, model_file, config_file, requirements_file : str or None
        Members.
    """

    document: dict[str, Any]
    name: str
    version: str
    handler: str
    handler_file: str | None
    weights: str | None
    model_file: str | None
    config_file: str | None
    requirements_file: str | None

    def with_handler(self, handler: str) -> bytes:
        """Return the manifest's text with another handler, and everything else as it is."""
        document = {**self.document, "model": {**self.document["model"], "handler": handler}}
        return json.dumps(document, indent=2).encode()


def parse_manifest(text: bytes, members: Collection[str]) -> Manifest:
    """Return what a manifest says.

    Parameters
    ----------
    text : bytes
        JSON.
    members : collection of str
        Names of the archive's members.

    Raises
    ------
    ArchiveError
        If it is no manifest, names a file that is not there, or a handler that is no Python class of its own file.
    """
    try:
        document = json.loads(text, object_pairs_hook=_without_repetition)
        model = document["model"]
        name, handler = model["modelName"], model["handler"]
        if not all(isinstance(value, str) and value for value in (name, handler)):
            raise TypeError("modelName and handler must be text")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ArchiveError(f"its manifest cannot be read ({' '.join(reason.split())[:160]}). {_REMEDY}") from error
    runtime = document.get("runtime", "python")
    if runtime not in ("python", "python3"):
        raise ArchiveError(
            f"its runtime is {runtime!r}: the guard watches handlers in Python only. Serve it unguarded."
        )
    named: list[str | None] = []
    for key in ("serializedFile", "modelFile", "configFile", "requirementsFile"):
        file = model.get(key) or None
        if file is not None and file not in members:
            raise ArchiveError(f"its manifest names {key} {file!r}, which is not in the archive. {_REMEDY}")
        named.append(file)
    return Manifest(
        document, name, str(model.get("modelVersion") or ""), handler, _handler_file(handler, members), *named
    )


def _handler_file(handler: str, members: Collection[str]) -> str | None:
    """Return the handler's member, found as TorchServe's loader does it."""
    path, _, function = handler.partition(":")
    if function:
        raise ArchiveError(
            f"its handler {handler!r} is a function: the guard wraps a class with initialize and handle. "
            "Put the function into a class, and make the archive again with that file as its handler."
        )
    file = f"{path.removesuffix('.py').split('/')[-1]}.py"
    if file in members:
        return file
    if path.endswith(".py") or "/" in path:
        raise ArchiveError(f"its manifest names the handler {handler!r}, which is not in the archive. {_REMEDY}")
    return None


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object; readers disagree on which of two equal keys counts."""
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key is there twice")
    return result
