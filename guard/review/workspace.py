"""What the page works with: the queue, its reviewers, and what is known of model and bundle. Knows no HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from guard.errors import AlreadyDecided, ConfigError, DataError, ItemGone, NotYours, TooManyHeld
from guard.observing.detection_watch import DetectionWatch
from guard.relabel.activity import Activity
from guard.relabel.blinding import blinded_counts
from guard.relabel.items import Answer, Counts, Decision, FlaggedInput, QueueItem, State
from guard.relabel.queue import Queue
from guard.relabel.request_body import Field, fields_of, pictures_of
from guard.relabel.reviewers import Reviewer, Reviewers
from guard.relabel.rounds import Rounds
from guard.review import wording
from guard.review.answer_log import AnswerLog
from guard.review.held_items import HeldItems
from guard.review.known_bundles import KnownBundle, KnownBundles
from guard.review.occlusion import Occlusion
from guard.review.status.bundles import BundleLists
from guard.review.status.history import MetricsSource
from guard.types import Float32Array, IntArray

Order = Literal["suspicion", "age", "group"]
ORDERS: tuple[Order, ...] = get_args(Order)

#: Clean images shown per class.
NEIGHBOURS = 5
#: The largest number that the database knows: of 64 bits.
MOST = 2**63 - 1
#: Items of one group on one page.
GROUP_PAGE = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class ReviewSettings:
    """Settings of the page.

    Raises
    ------
    ConfigError
        If a value breaks its rule.
    """

    #: Names under which browsers may ask for the page, besides the loopback's.
    allowed_hosts: tuple[str, ...] = ()
    #: Failed log-ins per minute from one address, and for one name, before more are refused.
    failed_logins: int = 5
    #: Bytes of an uploaded file of decisions at most.
    max_upload_bytes: int = 64 * 2**20

    def __post_init__(self) -> None:
        for name in ("failed_logins", "max_upload_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")


@dataclass(frozen=True, slots=True, eq=False)
class CleanImages:
    """Clean images of the user, to compare flagged inputs with.

    Attributes
    ----------
    images : sequence of ndarray of shape (channels, height, width), float32
        An array, or read from their files when they are asked for.
    labels : ndarray of shape (n,), int64
    fitted : KnownBundle or None
        The bundle that was fitted on all of them, where a guard was retrained on a part.
    """

    images: Sequence[Float32Array] | Float32Array
    labels: IntArray
    fitted: KnownBundle | None = None

    def are_of(self, bundle: KnownBundle) -> bool:
        """True if these are the images that the bundle was fitted on, in the same order, as far as labels tell."""
        return np.array_equal(self.labels, bundle.labels)


@dataclass(frozen=True, slots=True)
class Awaited:
    """How near the next retraining of a model is.

    Attributes
    ----------
    model : str
    n_new : int
        Inputs whose answer counts, answered since the last retraining began.
    needed : int or None
        So many start a retraining; None: no retrainer has said so.
    """

    model: str
    n_new: int
    needed: int | None


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Clean images of one class next to a flagged input.

    Attributes
    ----------
    label : int
    name, why : str
        Of the class, and who names it.
    rows : list of int
        Positions in the clean images, nearest first.
    place : int
        Of these clean images in `Workspace.clean_sets`.
    """

    label: int
    name: str
    why: str
    rows: list[int]
    place: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class ItemView:
    """One item as a reviewer sees it."""

    item: QueueItem
    names: list[str]
    keys: list[str]
    signs: list[wording.Sign]
    suspect_confidence: float
    neighbours: list[Neighbours]
    #: Why there are no neighbours; empty if there are.
    no_neighbours: str
    #: What gives the guard's second opinion, by its name.
    opinion: str
    #: The reviewer's own answer that stands.
    answer: Decision | None = None

    @property
    def suspect_name(self) -> str:
        """Name of the suspect's answer."""
        return self.names[self.item.input.suspect_label]

    @property
    def likely(self) -> list[tuple[int, str]]:
        """The classes to choose among most often, with who names them: they head the list, the second opinion first."""
        flagged = self.item.input
        rival, _ = wording.rival_label(flagged, self.opinion)
        if flagged.backup_label == flagged.suspect_label:
            return [(flagged.suspect_label, f"{self.opinion} and suspect"), (rival, "second choice")]
        named_by = self.opinion if rival == flagged.backup_label else "second choice"
        return [(rival, named_by), (flagged.suspect_label, "suspect")]

    @property
    def fields(self) -> list[Field]:
        """What the request consisted of; one without a name, unless it had several."""
        return fields_of(self.item.input.body, self.item.input.content_type)

    @property
    def sent(self) -> list[str]:
        """Names of the pictures of the request, in order, as buttons show them; "" if it has none, or only one."""
        names = [picture.name for picture in pictures_of(self.item.input.body, self.item.input.content_type)]
        if len(names) < 2:
            return [""]
        return [f"{place} {name}".rstrip() for place, name in enumerate(names, start=1)]

    @property
    def backup_name(self) -> str | None:
        """Name of the second opinion's answer; None if there is none."""
        label = self.item.input.backup_label
        return None if label is None else self.names[label]


@dataclass(frozen=True, slots=True, eq=False)
class Workspace:
    """Everything behind the page.

    Attributes
    ----------
    queue : Queue
    reviewers : Reviewers
    rounds : Rounds
    bundles : KnownBundles
    clean : CleanImages or None
        Of all bundles whose folder has none of its own. None: no clean neighbours are shown for these.
    occlusions : mapping of str to Occlusion
        By the name of the model; under "" that of all others. Where there is none, the network is not at hand.
    settings : ReviewSettings
    metrics : MetricsSource or None
        What the status page knows of the server; None: nothing.
    clean_by_folder : mapping of Path to CleanImages
        Clean images of the models of one folder of bundles, where there are several folders.
    """

    queue: Queue
    reviewers: Reviewers
    rounds: Rounds
    bundles: KnownBundles = field(default_factory=lambda: KnownBundles(None))
    clean: CleanImages | None = None
    occlusions: Mapping[str, Occlusion] = field(default_factory=dict)
    settings: ReviewSettings = field(default_factory=ReviewSettings)
    metrics: MetricsSource | None = None
    clean_by_folder: Mapping[Path, CleanImages] = field(default_factory=dict)
    held_items: HeldItems = field(default_factory=HeldItems, init=False)
    log: AnswerLog = field(init=False)
    activity: Activity = field(init=False)
    bundle_lists: BundleLists = field(init=False)
    detection: DetectionWatch = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "log", AnswerLog(self.queue))
        object.__setattr__(self, "activity", Activity(self.queue, with_gold=True))
        object.__setattr__(self, "bundle_lists", BundleLists(self.bundles, self.rounds))
        object.__setattr__(self, "detection", DetectionWatch(self.queue))

    @property
    def clean_sets(self) -> list[CleanImages | None]:
        """All clean images that the page shows: first `clean`, then those of single folders."""
        return [self.clean, *self.clean_by_folder.values()]

    def take(self, reviewer: str, order: Order, group: int | None = None) -> QueueItem | None:
        """Return what the reviewer should look at now: an item that they hold, else the next one; None if none is."""
        held = self._still_held(reviewer, group)
        if held:
            return held[0]
        try:
            claimed = self.queue.claim(reviewer, 1, order=order, group=group)
        except TooManyHeld:  # claimed elsewhere, by a program for instance
            claimed = self.queue.claim_items(reviewer, self.queue.held_by(reviewer)[:1])
        self.held_items.add(reviewer, claimed)
        return claimed[0] if claimed else None

    def take_group(self, reviewer: str, group: int) -> list[QueueItem]:
        """Return up to `GROUP_PAGE` items of a group for one reviewer; others keep half of what waits."""
        held = self._still_held(reviewer, group)[:GROUP_PAGE]
        most = GROUP_PAGE
        if self.reviewers.names() != [reviewer]:
            waiting = self.queue.counts(seen_by=reviewer).by_state[State.PENDING]
            most = -(-(len(held) + waiting) // 2)
        missing = max(0, min(GROUP_PAGE, most) - len(held))
        claimed = self.queue.claim(reviewer, missing, order="suspicion", group=group) if missing else []
        self.held_items.add(reviewer, claimed)
        return held + claimed

    def release(self, reviewer: str, group: int | None = None) -> None:
        """Give back what the reviewer holds, of one group or altogether."""
        held = self.held_items.of(reviewer, group)
        if held:
            self.queue.release(reviewer, held)
            self.held_items.remove(reviewer, held)

    def skip(self, reviewer: str, item_id: int) -> None:
        """Give an item back, to come last for this reviewer."""
        self.queue.skip(reviewer, item_id)
        self.held_items.remove(reviewer, [item_id])

    def decide(self, reviewer: str, answers: Sequence[Answer]) -> list[Decision]:
        """Save answers, all or none; a lease that has ended is taken again if nobody else took the item.

        Raises
        ------
        QueueError
            If an item is gone, decided, held by somebody else, or a label unknown.
        """
        wanted = [answer.item_id for answer in answers]
        try:
            done = self.queue.decide_many(reviewer, answers, also_free=True)
        except (AlreadyDecided, ItemGone):
            self.held_items.remove(reviewer, wanted)  # or the page would show it again and again
            raise
        self.held_items.remove(reviewer, wanted)
        return done

    def undo(self, reviewer: str) -> QueueItem:
        """Withdraw the reviewer's last answer that stands, of whatever session, and return its item.

        Raises
        ------
        AlreadyDecided
            If no answer of theirs stands.
        QueueError
            If it cannot be withdrawn any more.
        """
        last = self.log.last_standing(reviewer)
        if last is None:
            raise AlreadyDecided("there is nothing to undo: no answer of yours stands.")
        return self.withdraw(reviewer, last.id, last.item_id)

    def withdraw(self, reviewer: str, decision_id: int, item_id: int) -> QueueItem:
        """Take an answer back; its item comes to the reviewer next."""
        self.queue.withdraw(reviewer, decision_id)
        item = self.queue.see(reviewer, self.queue.get(item_id))
        if item.claimed_by == reviewer:
            self.held_items.add(reviewer, [item], first=True)
        return item

    def view(self, item: QueueItem, answer: Decision | None = None) -> ItemView:
        """Return an item with everything that helps to judge it; without its scores where audits are mixed in."""
        (item,) = self.queue.blind([item])
        flagged = item.input
        names = self.names(flagged)
        known = self._bundle_of(flagged)
        neighbours, why_not = self._neighbours(flagged, names, known)
        return ItemView(
            item,
            names,
            wording.label_keys(names),
            wording.signs(
                flagged,
                names[flagged.suspect_label],
                known.mode if known else None,
                flagged.false_positive_rate or (known.false_positive_rate if known else None),
            ),
            wording.suspect_confidence(flagged),
            neighbours,
            why_not,
            self.opinion(flagged),
            answer,
        )

    def opinion(self, flagged: FlaggedInput) -> str:
        """Return what gave the second opinion of an input: the backup or the replacement head of its guard."""
        known = self._bundle_of(flagged)
        return wording.opinion_name(known.has_backup if known is not None else None)

    def occlusion_of(self, flagged: FlaggedInput) -> Occlusion | None:
        """Return what makes maps of an input, with the network that it was for; None if that is not at hand."""
        return self.occlusions.get(flagged.model, self.occlusions.get(""))

    def names(self, flagged: FlaggedInput) -> list[str]:
        """Return one name per class of the model that a flagged input was for."""
        return wording.label_names(self.bundles.class_names(flagged.bundle_digest, flagged.model), flagged.n_classes)

    def ask_for_retraining(self, model: str, reviewer: str) -> None:
        """Ask for a retraining of a model; DataError if there is none of that name."""
        if model not in (known := self.models()):
            raise DataError(f"there is no model {model!r}: known are {known}.")
        last = self.rounds.last(model)
        if last is not None and last.outcome == "promoted" and self.bundles.is_active(last.candidate_digest, model):
            n_settled, n_new = (self.queue.count_settled(model, since=since) for since in (None, last.began_at))
            if n_new == 0 and n_settled == last.n_decisions:
                raise DataError(f"no answer is new since round {last.id} of {model}: there is nothing to learn.")
        self.rounds.request(model, reviewer)

    def awaited(self, reviewer: Reviewer) -> list[Awaited]:
        """Return how near the next retraining of each model is, as somebody may see it."""
        needed = self.bundle_lists.answers_needed()
        seen_by = None if reviewer.role == "admin" else reviewer.name
        found = []
        for model in self.models():
            last = self.rounds.last(model)
            since = None if last is None else last.began_at
            n_new = self.queue.count_settled(model, since=since, seen_by=seen_by)
            found.append(Awaited(model, n_new, needed.get(model)))
        return found

    def models(self) -> list[str]:
        """Return the names of the models that have items in the queue or rounds of retraining, sorted."""
        return sorted({*self.activity.models(), *self.rounds.models()})

    def item(self, item_id: int) -> QueueItem:
        """Return an item with all that is known, for the page itself; ItemGone if there is none."""
        return self.queue.get(item_id)

    def seen(self, reviewer: Reviewer, item_id: int) -> QueueItem:
        """Return an item as somebody may see it: an admin everything, a reviewer what they hold or answered.

        What others answered stays hidden, as it may be asked once more to measure reviewers.

        Raises
        ------
        NotYours
            If a reviewer neither holds the item nor answered it.
        ItemGone
            If there is none.
        """
        item = self.queue.get(item_id)
        if reviewer.role == "admin":
            return item
        if item.claimed_by != reviewer.name and not self.queue.has_answered(reviewer.name, item_id):
            raise NotYours(f"item {item_id} is not yours: you neither hold it nor answered it. Claim it first.")
        return self.queue.see(reviewer.name, item)

    def shown(self, reviewer: Reviewer, item_id: int) -> FlaggedInput:
        """Return an input whose picture somebody may see: as `seen`, and what is open to all.

        Raises
        ------
        NotYours, ItemGone
            As `seen`.
        """
        item = self.queue.get(item_id)
        if item.state in (State.PENDING, State.CLAIMED):
            return item.input
        return self.seen(reviewer, item_id).input

    def counts(self, reviewer: Reviewer) -> Counts:
        """Return how much there is of everything; to a reviewer gold items count as all others, and where audits are
        mixed in, items that a bundle learned from as all answered ones.
        """
        if reviewer.role == "admin":
            return self.queue.counts()
        counts = self.queue.counts(seen_by=reviewer.name)
        return replace(counts, by_state=blinded_counts(counts.by_state)) if self.is_blind(reviewer) else counts

    def is_blind(self, reviewer: Reviewer) -> bool:
        """Return whether somebody is not to see numbers that would tell audits: a reviewer, where there are some."""
        return reviewer.role != "admin" and self.queue.has_audits()

    def _bundle_of(self, flagged: FlaggedInput) -> KnownBundle | None:
        return self.bundles.find(flagged.bundle_digest, flagged.model) or self.bundles.active(flagged.model)

    def _still_held(self, reviewer: str, group: int | None) -> list[QueueItem]:
        wanted = self.held_items.of(reviewer, group)
        held = {item.id: item for item in self.queue.claim_items(reviewer, wanted)} if wanted else {}
        self.held_items.remove(reviewer, set(wanted) - held.keys())
        return [held[item_id] for item_id in wanted if item_id in held]

    def _neighbours(
        self, flagged: FlaggedInput, names: Sequence[str], known: KnownBundle | None
    ) -> tuple[list[Neighbours], str]:
        if known is None and any(self.clean_sets):
            return [], "The bundle that flagged this input is not in the folder of bundles."
        clean = self.clean if known is None else self.clean_by_folder.get(known.root, self.clean)
        if clean is None or known is None:
            return [], "No clean images were given. Start the page with --images to compare with the nearest ones."
        if not clean.are_of(known):
            if clean.fitted is None:
                return [], "The clean images at hand are not those of this guard. Name those with --images."
            known = clean.fitted
        rival, why = wording.rival_label(flagged, self.opinion(flagged))
        labels = ((flagged.suspect_label, "what the suspect says"), (rival, why))
        features = flagged.activations.features[0]
        place = next(place for place, one in enumerate(self.clean_sets) if one is clean)
        found = []
        for label, why in labels:
            rows = [int(row) for row in known.nearest(features, label, NEIGHBOURS)]
            found.append(Neighbours(label, names[label], why, rows, place))
        return found, ""


def number_of(text: str) -> int | None:
    """Return the whole number that a text is, as the database numbers its rows; None if it is none of these."""
    if text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= MOST:
        return int(text)
    return None


def label_of(text: str, names: Sequence[str]) -> int | None:
    """Return the class that a person typed: its number, its name, or both as in "14 Stop"; None for an empty text.

    Raises
    ------
    DataError
        If it is none of the classes.
    """
    text = " ".join(text.split())
    if not text:
        return None
    folded = [name.casefold() for name in names]
    if folded.count(text.casefold()) == 1:
        return folded.index(text.casefold())
    number = text.partition(" ")[0]
    if number.isascii() and number.isdigit() and len(number) < 10 and int(number) < len(names):
        return int(number)
    raise DataError(f"{text!r} is none of the {len(names)} classes. Give its number or its name.")
