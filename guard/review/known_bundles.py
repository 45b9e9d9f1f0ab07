"""What the page knows of bundles: class names, and the clean reference that a flagged input is compared with."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from guard.errors import BundleError, ConfigError
from guard.storage.bundle import BundleStore, StoredBundle, read_bundle
from guard.storage.places import BundlePlace
from guard.storage.stores import open_store
from guard.types import Float32Array, Float64Array, IntArray

#: Bundles of each folder kept in memory, on average.
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
    root : Path
        The folder of bundles that it lies in, on this machine.
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
    root: Path

    def nearest(self, features: Float32Array, label: int, n: int) -> IntArray:
        """Return the rows of the n clean references of a class that are nearest to features of shape (d,)."""
        rows = np.flatnonzero(self.labels == label)
        query = np.asarray(features, dtype=np.float32).reshape(-1)
        if len(rows) == 0 or query.shape != self.features.shape[1:]:
            return rows[:0]
        distances = self.squares[rows] - 2.0 * (self.features[rows] @ query).astype(np.float64)
        return rows[np.argsort(distances, kind="stable")[:n]]


class KnownBundles:
    """Bundles of one folder or of several, read when first asked for.

    Parameters
    ----------
    *folders : path-like or None
        Of the models that `of_models` does not name; folders, or URLs of object stores. None: nothing is known, and
        classes go by their numbers.
    of_models : mapping of str to path-like, optional
        The folder of a model, by its name.

    Raises
    ------
    ConfigError
        If a bundle lies in several folders of which nobody says whose they are.
    """

    def __init__(self, *folders: BundlePlace | None, of_models: Mapping[str, BundlePlace] | None = None) -> None:
        one: dict[Path, BundleStore] = {}  # a folder may be named in several ways

        def known(place: BundlePlace) -> BundleStore:
            store = open_store(place)
            return one.setdefault(store.root.resolve(), store)

        others = [known(place) for place in folders if place is not None]
        self._of_models = {model: known(place) for model, place in (of_models or {}).items()}
        self._others = list(dict.fromkeys(others))
        self._stores = list(dict.fromkeys([*others, *self._of_models.values()]))
        self._kept: OrderedDict[tuple[Path, str], KnownBundle | None] = OrderedDict()
        self._lock = threading.Lock()
        _check_places(self._others)

    @property
    def of_models(self) -> dict[str, Path]:
        """The folders of the models that were named with one, on this machine."""
        return {model: store.root for model, store in self._of_models.items()}

    @property
    def stores(self) -> list[BundleStore]:
        """All folders, each once."""
        return list(self._stores)

    @property
    def store(self) -> BundleStore | None:
        """The folder that servers follow; None if none was named, or several were."""
        return self._stores[0] if len(self._stores) == 1 else None

    def store_of(self, model: str) -> BundleStore | None:
        """Return the folder of a model; None if nobody says which it is."""
        if model in self._of_models:
            return self._of_models[model]
        return self._others[0] if len(self._others) == 1 else None

    def models_in(self, root: Path) -> list[str]:
        """Return the names of the models whose folder was named to be this one."""
        return [model for model, folder in self.of_models.items() if folder == root]

    def find(self, digest: str, model: str = "") -> KnownBundle | None:
        """Return a bundle by its digest, of the model's folder or else of another.

        None if it is in no folder, damaged or not sound.
        """
        if not re.fullmatch("[0-9a-f]{64}", digest):
            return None
        own = self.store_of(model)
        stores = self._stores if own is None else [own, *self._stores]
        return next((known for store in stores if (known := self._read_once(store, digest)) is not None), None)

    def active(self, model: str = "") -> KnownBundle | None:
        """Return the bundle that serves a model now; None if there is none, or nobody says in which folder it is."""
        return self.active_in(self.store_of(model))

    def active_in(self, store: BundleStore | None) -> KnownBundle | None:
        """Return the active bundle of a folder; None if there is none."""
        digest = store.known_active() if store is not None else None
        return self._read_once(store, digest) if store is not None and digest else None

    def is_active(self, digest: str | None, model: str = "") -> bool:
        """Return whether a bundle is the one that serves a model now, as far as folders are known."""
        own = self.store_of(model)
        stores = self._stores if own is None else [own]
        return digest is not None and any(store.known_active() == digest for store in stores)

    def class_names(self, digest: str, model: str = "") -> tuple[str, ...] | None:
        """Return the class names of a bundle, or of the model's active one if it is gone."""
        known = self.find(digest, model) or self.active(model)
        return known.class_names if known is not None else None

    def _read_once(self, store: BundleStore, digest: str) -> KnownBundle | None:
        key = (store.root, digest)
        folder = store.folder_of(digest)
        if not folder.is_dir():
            with suppress(BundleError):
                store.fetch(digest)
        if not folder.is_dir():  # not kept: it may come
            return None
        with self._lock:
            if key not in self._kept:
                self._kept[key] = _read(folder)
                while len(self._kept) > _KEPT * len(self._stores):
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]


def _check_places(stores: Sequence[BundleStore]) -> None:
    """Refuse folders that hold the same bundle, where nobody says which model is whose."""
    seen: dict[str, str] = {}
    for store in stores if len(stores) > 1 else ():
        for digest in store.digests():
            if (other := seen.setdefault(digest, store.address)) != store.address:
                raise ConfigError(
                    f"bundle {digest[:12]} lies in {other} and in {store.address}, so nobody knows which folder its "
                    "model follows. Name the model of each: --bundles MODEL=FOLDER."
                )


def _read(path: Path) -> KnownBundle | None:
    from guard.detection.soundness import check_stored  # here, as it loads torch: a page without bundles does without

    try:
        stored = read_bundle(path)
        check_stored(stored)
        return _known(stored, path.parent)
    except (BundleError, KeyError, TypeError, ValueError):
        return None


def _known(stored: StoredBundle, root: Path) -> KnownBundle:
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
        root,
    )
