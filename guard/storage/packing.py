"""Arrays in as few bytes as hold them: narrower types that hold every value, and nothing twice. Nothing is rounded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from guard.errors import DataError
from guard.types import AnyArray

#: Array types that a wider one may be kept in, narrowest first.
_NARROWER: dict[str, tuple[str, ...]] = {
    "float64": ("float16", "float32"),
    "float32": ("float16",),
    "int64": ("int8", "int16", "int32"),
}
#: Bytes that are worth a line in the notes.
_LEAST_SAVED = 4096
_TRIED_FIRST = 4096  # values that show of most arrays that a type is too narrow
_TYPES, _SAME_AS = "types", "same_as"


def pack(arrays: Mapping[str, AnyArray]) -> tuple[dict[str, AnyArray], dict[str, dict[str, str]]]:
    """Return arrays by name as they are kept, and the notes that `unpack` needs, ready for JSON; the same every time.

    Returns
    -------
    kept : dict of str to ndarray
        C-contiguous; without those that are equal to another one.
    notes : dict
        `types`: type of each array that is kept in a narrower one; `same_as`: name of the array that one is equal to.
        Empty where there is nothing to note.
    """
    kept: dict[str, AnyArray] = {}
    types: dict[str, str] = {}
    same_as: dict[str, str] = {}
    known: dict[tuple[Any, ...], str] = {}
    for name, array in sorted(arrays.items()):
        array = np.ascontiguousarray(array)
        if array.nbytes >= _LEAST_SAVED:
            contents = (array.dtype.name, array.shape, hashlib.sha256(array.data).digest())
            if (first := known.setdefault(contents, name)) != name:
                same_as[name] = first
                continue
        kept[name] = _narrowed(array)
        if kept[name].dtype != array.dtype:
            types[name] = array.dtype.name
    notes = {_TYPES: types, _SAME_AS: same_as}
    return kept, {name: note for name, note in notes.items() if note}


def unpack(kept: Mapping[str, AnyArray], notes: Mapping[str, Mapping[str, str]]) -> dict[str, AnyArray]:
    """Return what `pack` was given, bit by bit; equal arrays share their memory.

    Raises
    ------
    DataError
        If the notes are none, or do not fit the arrays.
    """
    if not isinstance(notes, Mapping) or not all(isinstance(note, Mapping) for note in notes.values()):
        raise DataError("notes must be objects.")
    if unknown := sorted(notes.keys() - {_TYPES, _SAME_AS}):
        raise DataError(f"unknown notes {unknown[0][:40]!a}.")
    arrays = dict(kept)
    for name, wide in notes.get(_TYPES, {}).items():
        if name not in kept:
            raise DataError(f"there is no array {name[:80]!a}.")
        if not isinstance(wide, str) or kept[name].dtype.name not in _NARROWER.get(wide, ()):
            raise DataError(f"array {name[:80]!a} of {kept[name].dtype} cannot stand for one of {str(wide)[:40]!a}.")
        arrays[name] = kept[name].astype(wide)
    for name, first in notes.get(_SAME_AS, {}).items():
        if name in kept or not isinstance(first, str) or first not in kept:
            raise DataError(f"array {name[:80]!a} cannot be the same as {str(first)[:80]!a}.")
        arrays[name] = arrays[first]
    return arrays


def _narrowed(array: AnyArray) -> AnyArray:
    """Return an array in the narrowest type that holds every value and saves enough; as it is if there is none."""
    for narrow in _NARROWER.get(array.dtype.name, ()):
        if array.nbytes - array.size * np.dtype(narrow).itemsize < _LEAST_SAVED:
            continue
        with np.errstate(over="ignore"):
            if not _survives(array.reshape(-1)[:_TRIED_FIRST], narrow):
                continue
            kept = array.astype(narrow)
        if all(_equal(array[rows], kept[rows]) for rows in _portions(array)):
            return kept
    return array


def _survives(values: AnyArray, narrow: str) -> bool:
    return _equal(values, values.astype(narrow))


def _equal(values: AnyArray, kept: AnyArray) -> bool:
    return bool((values == kept.astype(values.dtype)).all())  # a NaN, whose bits might change, equals nothing


def _portions(array: AnyArray, n_values: int = 1 << 20) -> list[slice]:
    """Return slices of the first axis, so that no second array of this size is held."""
    step = max(1, n_values * len(array) // max(1, array.size))
    return [slice(start, start + step) for start in range(0, len(array), step)]
