"""From a candidate to the bundle in use: written whole, journalled, switched by one rename, finished after a crash."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from guard.detection.pipeline import Guard
from guard.errors import BundleError, StoreUnavailable
from guard.relabel.queue import Queue
from guard.relabel.rounds import Rounds
from guard.storage.bundle import JOURNAL, BundleStore, read_bundle, write_bundle

#: What only the fitted suspect model could tell a bundle; a candidate is fitted without it.
_FROM_PARENT = ("weights_digest", "split_points")


@dataclass(frozen=True, slots=True)
class Promotion:
    """Everything needed to finish a promotion in another process.

    Attributes
    ----------
    round_id : int
    digest, parent : str
        Of the candidate, and of the guard that it takes the place of.
    learned : dict of int to int
        Items that the candidate has learned from, and the decision that it took for true.
    report : dict
        Of the round.
    """

    round_id: int
    digest: str
    parent: str
    learned: dict[int, int]
    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where a candidate comes from; kept in its bundle, and not in the round's report, which reviewers read.

    Attributes
    ----------
    retrained_from : str
        Digest of the parent; empty for a guard that no retrainer made.
    holdout_share : float or None
        Share of the clean images that it, or the guard that was measured in its place, has not seen.
    locked_items : tuple of int
        Decided items that it has not learned from, to be measured on.
    learned : dict of int to int
        Items that it has learned from, and the decision that it took for true.
    measured : str
        Digest of the guard that was measured in its place, without the clean hold-outs; empty if it is that itself.
    """

    retrained_from: str = ""
    holdout_share: float | None = None
    locked_items: tuple[int, ...] = ()
    learned: dict[int, int] = field(default_factory=dict)
    measured: str = ""

    @classmethod
    def read(cls, path: Path) -> Lineage:
        """Return the lineage of a bundle.

        Raises
        ------
        BundleError
            If the bundle is missing or damaged.
        """
        return cls.of(read_bundle(path).document)

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Lineage:
        """Return the lineage that a bundle's document tells."""
        values = document.get("lineage")
        if values is None:
            return cls()
        return cls(
            values["retrained_from"],
            values["holdout_share"],
            tuple(values["locked_items"]),
            {int(item): decision for item, decision in values["learned"].items()},
            values.get("measured", ""),
        )


def write_candidate(candidate: Guard, store: BundleStore, parent: Path, lineage: Lineage) -> str:
    """Put a candidate into the store as an inactive bundle, and return its digest.

    The retrainer has no suspect model, so weights digest and split points are taken over from the parent: without them
    no server would take the bundle.

    Raises
    ------
    BundleError
        If the parent cannot be read, or the store cannot be written.
    """
    document = read_bundle(parent).document
    with tempfile.TemporaryDirectory(prefix=".candidate-", dir=store.root) as folder:
        stored = read_bundle(candidate.save(folder))
    known = {name: document[name] for name in _FROM_PARENT}
    path = write_bundle(store.root, {**stored.document, **known, "lineage": asdict(lineage)}, stored.arrays)
    store.publish(path.name)
    return path.name


class Promoter:
    """Switches the active bundle, and finishes a switch that was interrupted.

    The order is: journal, ACTIVE, items, round, journal gone. ACTIVE is replaced by one rename, so a server sees the
    old bundle or the new one. Whatever comes after ACTIVE is done again by `recover` if the process died in between.

    Parameters
    ----------
    store : BundleStore
    queue : Queue
    rounds : Rounds
    """

    def __init__(self, store: BundleStore, queue: Queue, rounds: Rounds) -> None:
        self.store = store
        self.queue = queue
        self.rounds = rounds

    def promote(self, promotion: Promotion) -> None:
        """Make a written candidate the active bundle.

        Raises
        ------
        BundleError
            If another bundle than the parent is active by now, or the candidate is damaged or not sound; nothing was
            changed.
        """
        active = self.store.active_digest()
        if active != promotion.parent:
            raise BundleError(
                f"the candidate was measured against bundle {promotion.parent[:12]}, but {str(active)[:12]} is active "
                "now. Let another round compare with that one."
            )
        Guard.load(self.store.fetch(promotion.digest))  # a candidate that no server would take is not promoted
        self.store.begin_promotion(json.dumps(asdict(promotion)))
        try:
            self.store.activate(promotion.digest, instead_of=promotion.parent)
        except BundleError:
            if self.store.active_digest() != promotion.digest:
                self.store.end_promotion()
            raise
        self._complete(promotion)

    def recover(self) -> Promotion | None:
        """Finish or drop a promotion that was interrupted, and return it; None if there was none.

        Once ACTIVE names the candidate the promotion counts, and is completed; before that it is as if it never was.
        """
        text = self.store.begun_promotion()
        if text is None:
            return None
        try:
            values = json.loads(text)
            learned = {int(item): int(decision) for item, decision in values["learned"].items()}
            promotion = Promotion(**{**values, "learned": learned})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BundleError(
                f"{self.store.address}/{JOURNAL} is damaged. Look at `guard bundle list`, then remove the file."
            ) from error
        if self.store.active_digest() == promotion.digest:
            self._complete(promotion)
        else:
            self.store.end_promotion()
        return promotion

    def _complete(self, promotion: Promotion) -> None:
        learned = promotion.learned
        self.queue.mark_trained(list(learned), promotion.digest, decision_ids=list(learned.values()))
        if any(entry.id == promotion.round_id and entry.outcome != "promoted" for entry in self.rounds.all()):
            self.rounds.finish(promotion.round_id, "promoted", promotion.report, promotion.digest)
        self.store.end_promotion()


def same_network(store: BundleStore, active: Path, digests: Iterable[str]) -> set[str]:
    """Return which of these bundles were fitted for the network of the active one, split at the same layers.

    What another bundle flagged has activations of other weights or layers, even where the widths agree. One that is no
    longer there cannot vouch for its items.
    """
    wanted = _network(read_bundle(active).document)
    found = set()
    for digest in digests:
        try:
            if _network(store.document(digest)) == wanted:
                found.add(digest)
        except StoreUnavailable:
            raise
        except BundleError:
            continue
    return found


def _network(document: dict[str, Any]) -> list[Any]:
    return [document.get(name) for name in (*_FROM_PARENT, "depths", "n_classes")]
