"""The bundles as the status page lists them, and the way back to the one before."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from guard.detection.contradictions import Contradictions
from guard.errors import BundleError
from guard.files import read_plain
from guard.relabel.rounds import Round, Rounds
from guard.review.known_bundles import KnownBundles
from guard.storage.bundle import RETRAINER_LOCK, BundleStore, read_bundle

#: Bundles that are listed.
SHOWN = 8

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ListedBundle:
    """One line of the list.

    Attributes
    ----------
    digest : str
    made_at : datetime
    is_active : bool
    in_use : bool
        True if a server says that it uses it.
    parent : str
        Digest of the bundle that it was retrained from; "" for a guard that was fitted.
    round : int or None
        The retraining that made it.
    outcome : str
        What came of that retraining.
    rate, realised : float
        False-positive rate that was asked for, and the one measured on clean images.
    contradictions : Contradictions or None
        Among its clean images; None of an older version.
    of : str
        Names of the models that follow its folder, or the folder; "" where the page knows one folder only.
    """

    digest: str
    made_at: datetime
    is_active: bool
    in_use: bool
    parent: str
    round: int | None
    outcome: str
    rate: float | None
    realised: float | None
    contradictions: Contradictions | None
    of: str = ""


class BundleList:
    """The bundles of a folder with where they come from; each is read and verified once.

    Parameters
    ----------
    store : BundleStore or None
        None: no folder was named.
    rounds : Rounds
    of : str
        As a line of the list says whose bundles these are.
    """

    def __init__(self, store: BundleStore | None, rounds: Rounds, of: str = "") -> None:
        self.store = store
        self.of = of
        self._rounds = rounds
        self._documents: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()

    def newest(self, in_use: tuple[str, ...] = ()) -> list[ListedBundle]:
        """Return the active bundle and the newest others; damaged ones are left out."""
        if self.store is None:
            return []
        try:
            active, written = self.store.known_active(), self.store.written()
        except BundleError:  # out of reach
            return []
        made_by = {entry.candidate_digest: entry for entry in reversed(self._rounds.all()) if entry.candidate_digest}
        digests = sorted(written, key=lambda digest: (digest == active, written[digest]), reverse=True)
        listed = []
        for digest in digests[:SHOWN]:
            document = self._document(digest)
            if document is not None:
                made_at = datetime.fromtimestamp(written[digest], UTC)
                listed.append(_listed(digest, made_at, document, active, in_use, made_by.get(digest), self.of))
        return listed

    def expected_rate(self) -> float | None:
        """Return the share of clean inputs that the active bundle flags, as measured; None if nobody knows."""
        document = self._active()
        return None if document is None else document.get("realised_false_positive_rate")

    def contradictions(self) -> Contradictions | None:
        """Return what the active bundle says of its clean images; None if nobody knows."""
        document = self._active()
        return None if document is None else Contradictions.from_document(document)

    def answers_needed(self) -> dict[str, int]:
        """Return how many new answers start a retraining, by model, as the retrainer of the folder has written."""
        if self.store is None:
            return {}
        try:
            known = json.loads(read_plain(self.store.root / RETRAINER_LOCK, 4096))
            return {str(known["model"]): int(known["enough_decisions"] or known["min_decisions"])}
        except (OSError, ValueError, KeyError, TypeError):  # of an earlier version: empty
            return {}

    def active(self) -> str | None:
        """Return the digest that ACTIVE names; None if there is none."""
        return self.store.known_active() if self.store is not None else None

    def way_back(self) -> str | None:
        """Return the digest that a roll-back goes to; None if there is none."""
        return self.store.previous_digest() if self.store is not None else None

    def roll_back(self, active: str, target: str, reviewer: str) -> None:
        """Make the bundle before the active one active again.

        Parameters
        ----------
        active, target : str
            What the person who asks was shown.
        reviewer : str

        Raises
        ------
        BundleError
            If a retraining is just switching, something else is active or would become so by now, or the target is
            damaged or not sound; nothing was changed.
        """
        from guard.detection.soundness import check_stored  # here, as it loads torch, and few pages are asked for this

        if self.store is None:
            raise BundleError("the page knows no folder of bundles. Start it with --bundles.")
        with self._lock:
            if self.store.is_promoting():
                raise BundleError("a retraining is just switching the bundle. Look again in a moment.")
            if (self.store.active_digest(), self.store.previous_digest()) != (active, target):
                raise BundleError("the active bundle has changed meanwhile, and nothing was rolled back. Look again.")
            check_stored(read_bundle(self.store.fetch(target)))
            self.store.roll_back(instead_of=active)
        _log.warning("%s rolled the bundle back from %s to %s", reviewer, active[:12], target[:12])

    def _active(self) -> dict[str, Any] | None:
        digest = self.active()
        return self._document(digest) if self.store is not None and digest else None

    def _document(self, digest: str) -> dict[str, Any] | None:
        with self._lock:
            if digest not in self._documents:
                try:
                    assert self.store is not None  # or there would be no digest
                    self._documents[digest] = self.store.document(digest)
                except BundleError:
                    return None
            return self._documents[digest]


def _listed(
    digest: str,
    made_at: datetime,
    document: dict[str, Any],
    active: str | None,
    in_use: tuple[str, ...],
    made_by: Round | None,
    of: str,
) -> ListedBundle:
    return ListedBundle(
        digest,
        made_at,
        digest == active,
        digest in in_use,
        (document.get("lineage") or {}).get("retrained_from", ""),
        made_by.id if made_by is not None else None,
        made_by.outcome or "" if made_by is not None else "",
        document["settings"].get("false_positive_rate"),
        document.get("realised_false_positive_rate"),
        Contradictions.from_document(document),
        of,
    )


class BundleLists(Sequence[BundleList]):
    """The lists of all folders of bundles that the page knows, in their order; one that is empty if it knows none.

    Parameters
    ----------
    bundles : KnownBundles
    rounds : Rounds
    """

    def __init__(self, bundles: KnownBundles, rounds: Rounds) -> None:
        self._bundles = bundles
        stores = bundles.stores
        if len(stores) < 2:
            self._lists = [BundleList(bundles.store, rounds)]
        else:
            self._lists = [
                BundleList(store, rounds, ", ".join(bundles.models_in(store.root)) or store.address) for store in stores
            ]

    def __len__(self) -> int:
        return len(self._lists)

    def __getitem__(self, place: Any) -> Any:
        return self._lists[place]

    def of_model(self, model: str | None) -> list[BundleList]:
        """Return the list of the folder that a model follows; all lists for None, or where nobody knows the folder."""
        own = self._bundles.store_of(model) if model is not None else None
        roots = [each.store.root if each.store is not None else None for each in self._lists]
        if own is None or own.root not in roots:
            return list(self._lists)
        return [self._lists[roots.index(own.root)]]

    def answers_needed(self) -> dict[str, int]:
        """Return how many new answers start a retraining, by model, as the retrainers of all folders have written."""
        return {model: needed for each in self._lists for model, needed in each.answers_needed().items()}
