"""How a guarded archive gives back, byte for byte, the one that it was made from.

The guarded archive keeps the members' packed bytes as they were. What else the original file held (headers, manifest,
the list at its end) is small, and is kept as text beside them: a recipe. So nothing is stored twice.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Collection, Iterator
from typing import Any

from guard.errors import ArchiveError
from guard.torchserve.archives.strict_zip import MAX_HEADER_BYTES, StrictZip

#: Member of a guarded archive that holds the recipe.
RECIPE = "guard_original.json"


def make_recipe(original: StrictZip, kept: Collection[str]) -> bytes:
    """Return how to build a file again from some of its members' packed bytes.

    Parameters
    ----------
    original : StrictZip
    kept : collection of str
        Members whose packed bytes will be at hand; all else goes into the recipe.
    """
    parts: list[dict[str, str]] = []
    position = 0
    for member in original.members.values():
        if member.name in kept and member.packed_size:
            parts += [_literal(original, position, member.start), {"member": member.name}]
            position = member.start + member.packed_size
    parts.append(_literal(original, position, original.size))
    about = {"file": original.path.name, "bytes": original.size, "sha256": original.digest(), "parts": parts}
    return json.dumps(about).encode()


def original_digest(guarded: StrictZip) -> str:
    """Return the SHA-256 of the archive that a guarded one was made from.

    Raises
    ------
    ArchiveError
        If it holds no recipe.
    """
    return str(_recipe(guarded)["sha256"])


def original_bytes(guarded: StrictZip) -> Iterator[bytes]:
    """Yield the original file in parts; the last step raises if they are not what they were.

    Raises
    ------
    ArchiveError
        If there is no recipe, or the guarded archive was changed after it was made.
    """
    recipe = _recipe(guarded)
    changed = ArchiveError(
        f"{guarded.path.name} was changed after it was made: the original cannot be built from it. "
        "Fetch the guarded archive again."
    )
    digest, used = hashlib.sha256(), set()
    try:
        for part in recipe["parts"]:
            if (name := part.get("member")) is not None:
                if name in used or name not in guarded.members:
                    raise changed
                used.add(name)
                pieces = guarded.packed(name)
            else:
                pieces = iter([base64.b64decode(part["bytes"], validate=True)])
            for piece in pieces:
                digest.update(piece)
                yield piece
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise changed from error
    if digest.hexdigest() != recipe["sha256"]:
        raise changed


def _literal(original: StrictZip, start: int, end: int) -> dict[str, str]:
    return {"bytes": base64.b64encode(b"".join(original.bytes_between(start, end))).decode()}


def _recipe(guarded: StrictZip) -> dict[str, Any]:
    if RECIPE not in guarded.members:
        made = "was made by `guard archive`" if "guard_archive.json" in guarded.members else "has no guard"
        raise ArchiveError(f"{guarded.path.name} {made}: it holds no original. Name one that `guard wrap` wrote.")
    try:
        recipe: dict[str, Any] = json.loads(guarded.read(RECIPE, 2 * MAX_HEADER_BYTES))
        if not isinstance(recipe["sha256"], str) or not isinstance(recipe["parts"], list):
            raise TypeError("wrong types")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArchiveError(f"{guarded.path.name}: {RECIPE} is damaged. Fetch the guarded archive again.") from error
    return recipe
