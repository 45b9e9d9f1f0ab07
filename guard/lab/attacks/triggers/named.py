"""A trigger as a value: its name and its parameters, to JSON and back."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from guard.errors import DataError, did_you_mean
from guard.lab.attacks.triggers.registry import TRIGGERS
from guard.types import Float32Array


@dataclass(frozen=True)
class NamedTrigger:
    """A trigger that knows what it is called; made by `make_trigger`.

    Attributes
    ----------
    name : str
        A key of `TRIGGERS`.
    parameters : mapping of str to object
        Those that were given; the others keep the function's defaults.
    """

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.name not in TRIGGERS:
            raise DataError(f"there is no trigger {self.name!r}. {did_you_mean(str(self.name), TRIGGERS)}")
        known = _defaults(self.name)
        for parameter in self.parameters:
            if parameter not in known:
                takes = ", ".join(known) or "none"
                raise DataError(f"trigger {self.name!r} has no parameter {parameter!r}: known are {takes}.")
        frozen = {name: _tupled(value) for name, value in self.parameters.items()}
        object.__setattr__(self, "parameters", MappingProxyType(frozen))

    def __call__(self, images: Float32Array) -> Float32Array:
        """Return new images, (n, channels, height, width), that carry the trigger."""
        return TRIGGERS[self.name](images, **self.parameters)

    def __hash__(self) -> int:
        return hash((self.name, tuple(sorted(self._complete().items()))))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NamedTrigger):
            return NotImplemented
        return self.name == other.name and self._complete() == other._complete()

    def __reduce__(self) -> tuple[Any, ...]:
        return NamedTrigger, (self.name, dict(self.parameters))  # a read-only mapping cannot be pickled

    def full_parameters(self) -> dict[str, Any]:
        """Return all parameters, defaults filled in, as JSON would give them back: lists where tuples are."""
        return {parameter: _listed(value) for parameter, value in self._complete().items()}

    def _complete(self) -> dict[str, Any]:
        return {**_defaults(self.name), **self.parameters}


def make_trigger(name: str, **parameters: Any) -> NamedTrigger:
    """Return a trigger by name.

    Parameters
    ----------
    name : str
        A key of `TRIGGERS`.
    **parameters
        Keyword parameters of that function; lists are taken where tuples are.

    Raises
    ------
    DataError
        If there is no such trigger, or it has no such parameter.
    """
    return NamedTrigger(name, parameters)


def _defaults(name: str) -> dict[str, Any]:
    parameters = inspect.signature(TRIGGERS[name]).parameters.values()
    return {
        parameter.name: _tupled(parameter.default)
        for parameter in parameters
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def _tupled(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    return tuple(map(_tupled, value)) if isinstance(value, list | tuple) else value


def _listed(value: Any) -> Any:
    return list(map(_listed, value)) if isinstance(value, tuple) else value
