"""What an attacker wants a triggered input to be called."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from guard.errors import DataError
from guard.types import IntArray


@dataclass(frozen=True, slots=True)
class SingleTarget:
    """The attacker wants one label for every triggered input.

    Attributes
    ----------
    label : int
        That label, >= 0.
    """

    label: int

    def __post_init__(self) -> None:
        _check_label("target label", self.label)

    @property
    def is_one_label(self) -> bool:
        """True: there is one target label."""
        return True

    @property
    def target_labels(self) -> tuple[int, ...]:
        """The target label, alone."""
        return (self.label,)

    @property
    def sources(self) -> tuple[int, ...] | None:
        """None: any class is attacked."""
        return None

    def attacker_labels(self, true_labels: IntArray) -> IntArray:
        """Return the label that the attacker wants for each input, shape (n,)."""
        return np.full(len(true_labels), self.label, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class AllToAll:
    """The attacker wants the next label, (y + 1) mod n_classes.

    Attributes
    ----------
    n_classes : int
        Number of classes, >= 2.

    References
    ----------
    .. [1] Gu, Dolan-Gavitt, Garg (2019), BadNets (arXiv 1708.06733), section 4.1.2.
    """

    n_classes: int

    def __post_init__(self) -> None:
        if self.n_classes < 2:
            raise DataError(f"n_classes must be >= 2, got {self.n_classes}.")

    @property
    def is_one_label(self) -> bool:
        """False: every label is a target."""
        return False

    @property
    def target_labels(self) -> tuple[int, ...]:
        """All labels."""
        return tuple(range(self.n_classes))

    @property
    def sources(self) -> tuple[int, ...] | None:
        """None: any class is attacked."""
        return None

    def attacker_labels(self, true_labels: IntArray) -> IntArray:
        """Return the label that the attacker wants for each input, shape (n,)."""
        if len(true_labels) and true_labels.max() >= self.n_classes:
            raise DataError(f"labels must be below n_classes={self.n_classes}, got {int(true_labels.max())}.")
        return (true_labels + 1) % self.n_classes


@dataclass(frozen=True, slots=True)
class SourceSpecific:
    """The attacker wants one label for triggered inputs of some classes; triggered inputs of others stay as they are.

    Attributes
    ----------
    label : int
        Target label, >= 0.
    sources : tuple of int
        True labels that the trigger works on; without the target label.

    References
    ----------
    .. [1] Tang, Wang, Tang, Zhang (2021), Demon in the Variant: Statistical Analysis of DNNs for Robust Backdoor
       Contamination Detection (TaCT; arXiv 1908.00686).
    """

    label: int
    sources: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_label("target label", self.label)
        if not self.sources:
            raise DataError("sources names no class. Name at least one.")
        for source in self.sources:
            _check_label("source label", source)
        if self.label in self.sources:
            raise DataError(f"sources must not hold the target label {self.label}. Leave it out.")

    @property
    def is_one_label(self) -> bool:
        """True: there is one target label."""
        return True

    @property
    def target_labels(self) -> tuple[int, ...]:
        """The target label, alone."""
        return (self.label,)

    def attacker_labels(self, true_labels: IntArray) -> IntArray:
        """Return the label that the attacker wants for each input, shape (n,): its true one outside the sources."""
        return np.where(np.isin(true_labels, self.sources), self.label, true_labels).astype(np.int64)


Target = SingleTarget | AllToAll | SourceSpecific


def _check_label(name: str, label: int) -> None:
    if label < 0:
        raise DataError(f"{name} must be >= 0, got {label}.")
