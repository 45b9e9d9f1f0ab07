"""A trigger as a value: its name and parameters, comparable, hashable, and ready for JSON."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from guard.attacks.triggers.registry import TRIGGERS
from guard.errors import DataError
from guard.types import Float32Array


@dataclass(frozen=True, eq=False)
class NamedTrigger:
    """One of `TRIGGERS` with parameters; call it with images as the function itself.

    Two are equal if name and full parameters are, whether a default was given or left out.

    Attributes
    ----------
    name : str
        A key of `TRIGGERS`.
    parameters : mapping of str to value
        Those given, read-only; lists and arrays become tuples.

    Raises
    ------
    DataError
        If there is no such trigger, or it has no such parameter. Values are checked when it is called.
    """

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in TRIGGERS:
            close = difflib.get_close_matches(self.name, TRIGGERS, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"Known are {', '.join(TRIGGERS)}."
            raise DataError(f"there is no trigger {self.name!r}. {hint}")
        known = _defaults(self.name)
        for parameter in self.parameters:
            if parameter not in known:
                raise DataError(f"trigger {self.name!r} has no parameter {parameter!r}: known are {', '.join(known)}.")
        frozen = {parameter: _frozen(value) for parameter, value in self.parameters.items()}
        object.__setattr__(self, "parameters", MappingProxyType(frozen))

    def __call__(self, images: Float32Array) -> Float32Array:
        """Return new images that carry the mark."""
        return TRIGGERS[self.name](images, **self.parameters)

    def full_parameters(self) -> dict[str, Any]:
        """Return every parameter, defaults filled in, ready for JSON (which turns tuples into lists)."""
        return _defaults(self.name) | self.parameters

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NamedTrigger):
            return NotImplemented
        return self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __reduce__(self) -> tuple[Any, ...]:
        return NamedTrigger, (self.name, dict(self.parameters))  # a read-only mapping cannot be pickled

    def _key(self) -> tuple[str, tuple[tuple[str, Any], ...]]:
        return self.name, tuple(self.full_parameters().items())


def make_trigger(name: str, **parameters: Any) -> NamedTrigger:
    """Return a trigger by name.

    Parameters
    ----------
    name : str
        A key of `TRIGGERS`.
    **parameters
        What differs from the function's defaults; lists, as JSON has them, do where tuples are meant.

    Raises
    ------
    DataError
        If there is no such trigger, or it has no such parameter.

    Examples
    --------
    >>> make_trigger("white_square", size=3).full_parameters()
    {'size': 3, 'margin': 0, 'value': 1.0}
    """
    return NamedTrigger(name, parameters)


def _defaults(name: str) -> dict[str, Any]:
    parameters = inspect.signature(TRIGGERS[name]).parameters.values()
    return {p.name: _frozen(p.default) for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _frozen(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value
