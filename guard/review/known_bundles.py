"""What the page knows of bundles: class names, and the clean reference that a flagged input is compared with."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from guard.detection.soundness import check_stored
from guard.errors import BundleError
from guard.storage.bundle import BundleStore, StoredBundle, read_bundle
from guard.types import Float32Array, Float64Array, IntArray

#: Bundles kept in memory.
_KEPT = 4


@dataclass(frozen=True, slots=True, eq=False)
class KnownBundle:
    """The part of a bundle that people see.

    Attributes
    ----------
    digest : str
    class_names : tuple of str or None
    mode : str
        `calibrated` or `paper`; says what a detector's surprise means.
    false_positive_rate : float
        The requested one.
    features : ndarray of shape (n, d), float32
        Of the clean reference, at the split layer.
    squares : ndarray of shape (n,), float64
        Squared length of each row of `features`.
    labels : ndarray of shape (n,), int64
        True labels of the clean reference.
    images_from : str or None
        Path of the clean images that it was fitted on.
    parent : str
        Digest of the bundle that it was retrained from; "" for a guard that was fitted.
    has_backup : bool
        Whether second opinions are a backup's; else they are the replacement head's.
    """

    digest: str
    class_names: tuple[str, ...] | None
    mode: str
    false_positive_rate: float
    features: Float32Array
    squares: Float64Array
    labels: IntArray
    images_from: str | None
    parent: str
    has_backup: bool

    def nearest(self, features: Float32Array, label: int, n: int) -> IntArray:
        """Return the rows of the n clean references of a class that are nearest to features of shape (d,)."""
        rows = np.flatnonzero(self.labels == label)
        query = np.asarray(features, dtype=np.float32).reshape(-1)
        if len(rows) == 0 or query.shape != self.features.shape[1:]:
            return rows[:0]
        distances = self.squares[rows] - 2.0 * (self.features[rows] @ query).astype(np.float64)
        return rows[np.argsort(distances, kind="stable")[:n]]


class KnownBundles:
    """Bundles of a folder, read when first asked for.

    Parameters
    ----------
    folder : Path or None
        None: nothing is known, and classes go by their numbers.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._kept: OrderedDict[str, KnownBundle | None] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def store(self) -> BundleStore | None:
        """The folder that servers follow; None if none was named."""
        return BundleStore(self._folder) if self._folder is not None else None

    def find(self, digest: str) -> KnownBundle | None:
        """Return a bundle by its digest; None if it is not in the folder, damaged or not sound."""
        if self._folder is None or not re.fullmatch("[0-9a-f]{64}", digest):
            return None
        with self._lock:
            if digest not in self._kept:
                self._kept[digest] = _read(self._folder / digest)
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(digest)
            return self._kept[digest]

    def active(self) -> KnownBundle | None:
        """Return the bundle that serves now; None if there is none."""
        digest = self.store.known_active() if self.store is not None else None
        return self.find(digest) if digest else None

    def is_active(self, digest: str | None) -> bool:
        """Return whether a bundle is the one that serves now, as far as the folder is known."""
        return self.store is not None and digest is not None and self.store.known_active() == digest

    def class_names(self, digest: str) -> tuple[str, ...] | None:
        """Return the class names of a bundle, or of the active one if it is gone."""
        known = self.find(digest) or self.active()
        return known.class_names if known is not None else None


def _read(path: Path) -> KnownBundle | None:
    try:
        stored = read_bundle(path)
        check_stored(stored)
        return _known(stored)
    except (BundleError, KeyError, TypeError, ValueError):
        return None


def _known(stored: StoredBundle) -> KnownBundle:
    names, features = stored.document["class_names"], stored.arrays["reference.features"]
    return KnownBundle(
        stored.digest,
        tuple(names) if names else None,
        stored.document["settings"]["mode"],
        stored.document["settings"]["false_positive_rate"],
        features,
        np.einsum("ij,ij->i", features, features, dtype=np.float64),
        stored.arrays["labels"],
        stored.document.get("images_from"),
        (stored.document.get("lineage") or {}).get("retrained_from", ""),
        bool(stored.document.get("backup")),
    )
