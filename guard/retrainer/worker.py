"""The retrainer itself: looks whether a round is due, runs it, and writes down what came of it."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import logging
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Self

from guard.detection.pipeline import Guard
from guard.errors import BundleError, GuardError, RetrainingError, StoreUnavailable
from guard.files import open_private
from guard.relabel.items import Decision, Settled, State
from guard.relabel.queue import Queue
from guard.relabel.reviewers import Reviewers
from guard.relabel.rounds import Round, RoundOutcome, Rounds
from guard.retrainer.candidate import (
    Pair,
    check_false_alarms,
    choose_anomalies,
    compare_on,
    doubt_poisoned,
    fit_candidate,
    try_candidate,
    with_final,
)
from guard.retrainer.following import follow_traffic
from guard.retrainer.lessons import reviewers_needed
from guard.retrainer.material import Material, gather
from guard.retrainer.promotion import Lineage, Promoter, Promotion, same_network, write_candidate
from guard.retrainer.report import Finished, about_material, about_trial
from guard.retrainer.settings import RetrainerSettings
from guard.storage.bundle import RETRAINER_LOCK
from guard.storage.places import BundlePlace
from guard.storage.stores import open_store

logger = logging.getLogger(__name__)

#: Flagged inputs without a decision that both guards are asked about.
_UNDECIDED = 500
_NOTHING_GAINED = "the candidate does on every kind of input what the active guard does: nothing is gained by it."
_PAGE = 1000


class Retrainer:
    """Retrains the guard of one model, one round at a time; a context manager that holds the folder's lock.

    Parameters
    ----------
    queue : Queue
    bundles : path-like
        Folder with ACTIVE, or its URL in an object store. There, the lock keeps off retrainers of this machine only.
    model : str
        Name under which the model is served.
    settings : RetrainerSettings, optional

    Raises
    ------
    RetrainingError
        On entering, if there is no such folder, or another retrainer works on it.
    """

    def __init__(
        self, queue: Queue, bundles: BundlePlace, model: str, settings: RetrainerSettings | None = None
    ) -> None:
        self.queue = queue
        self.rounds = Rounds(queue)
        self.store = open_store(bundles)
        self.model = model
        self.settings = settings or RetrainerSettings()
        self.promoter = Promoter(self.store, queue, self.rounds)
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        root = self.store.root
        try:
            file = open_private(root / RETRAINER_LOCK, "a")
        except OSError as error:
            raise RetrainingError(f"{root}: {error.strerror}. A folder of bundles is needed: `guard fit`.") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise RetrainingError(f"another retrainer works on {self.store.address}. Stop that one first.") from error
        self._lock = file  # the kernel gives the lock back however this process ends
        publish_thresholds(file, self.model, self.settings)
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def run(self, interval_s: float, stop: threading.Event) -> None:
        """Look every `interval_s` seconds whether a round is due, until `stop` is set; errors are only logged."""
        while not stop.is_set():
            try:
                finished = self.step()
                if finished is not None:
                    logger.info("%s", finished.line)
            except GuardError as error:  # the queue is away, the folder is damaged: it may come back
                logger.error("no round: %s", error)
            stop.wait(interval_s)

    def step(self) -> Finished | None:
        """Put right what a crash left behind, then run a round if one is due; None if none is.

        Raises
        ------
        GuardError
            If the queue or the folder of bundles cannot be used. What goes wrong within a round is its outcome.
        """
        self.recover()
        last = self.rounds.last(self.model)
        if last is not None and last.outcome == "canary":
            return self._end_canary(last)
        why = self._why_now(last)
        if not why:
            return None
        settled = self.queue.settled(self.model)
        basis = self._basis(settled)
        if last is not None and self._has_learned(last, basis):
            logger.info("no round, though %s: round %d began with the same answers", why, last.id)
            return None
        return self._round(why, settled, basis)

    def recover(self) -> None:
        """Finish or drop an interrupted promotion, and close rounds that were left open as failed."""
        self.promoter.recover()
        for folder in self.store.root.glob(".candidate-*"):
            shutil.rmtree(folder, ignore_errors=True)
        for round_id in self.rounds.unfinished(self.model):
            reason = "the retrainer stopped in the middle of this round; the active bundle was not changed."
            self.rounds.finish(round_id, "failed", {"reasons": [reason]}, None)

    def _why_now(self, last: Round | None) -> str:
        """Return why a round is due, in words; empty if none is. Takes the request of the button, if there is one."""
        settings = self.settings
        new = self.queue.count_settled(self.model, since=None if last is None else last.began_at)
        reviewer = self.rounds.take_request(self.model)
        if reviewer:
            return f"asked for by {reviewer}"
        if settings.enough_decisions and new >= settings.enough_decisions:
            return f"{new} new decisions"
        if settings.demarcation == "purified" and settings.enough_flagged and self._flagged_since(last):
            return f"{settings.enough_flagged} further flagged inputs"
        if not new or not settings.every_hours or self.queue.count_settled(self.model) < settings.min_decisions:
            return ""
        if last is None or self.queue.clock() - last.began_at >= timedelta(hours=settings.every_hours):
            return f"{new} new decisions, and {settings.every_hours:g} hours since the last round"
        return ""

    def _flagged_since(self, last: Round | None) -> bool:
        """Return whether enough inputs were flagged since the last round began that nobody has decided."""
        seen = last.report.get("newest_item", 0) if last is not None else 0
        return self.queue.count_pending(self.model, after_id=seen) >= self.settings.enough_flagged

    def _basis(self, settled: Sequence[Settled]) -> str:
        """Return a digest of all that a round is made from, but for the active bundle."""
        parts: list[Any] = [sorted((item.id, item.decision_id) for item in settled), self.settings.model_dump()]
        parts.append(sorted(Reviewers(self.queue).names()))
        if self.settings.demarcation == "purified":
            parts.append(self.queue.newest_pending(self.model))
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _has_learned(self, last: Round, basis: str) -> bool:
        """Return whether a round from this basis came to its end, and nobody has changed the active bundle since."""
        result = last.candidate_digest if last.outcome == "promoted" else last.report.get("parent")
        is_done = last.outcome in ("promoted", "refused")
        return is_done and last.report.get("basis") == basis and self.store.known_active() == result

    # -- one round ----------------------------------------------------------------------------------------------

    def _round(self, why: str, settled: Sequence[Settled], basis: str) -> Finished:
        round_id = self.rounds.begin(self.model, len(settled))
        newest = max([self.queue.newest_pending(self.model), *(item.id for item in settled)])
        report: dict[str, Any] = {"why": why, "model": self.model, "newest_item": newest, "basis": basis}
        started = time.monotonic()
        try:
            outcome = self._try(settled, report)
        except Exception as error:
            return self._failed(round_id, report, error)
        report["seconds"] = round(time.monotonic() - started, 2)
        digest = report.get("candidate")
        if outcome == "promoted":
            return self._promote(round_id, report)
        self.rounds.finish(round_id, outcome, report, digest)
        return Finished(round_id, outcome, report, digest)

    def _try(self, settled: Sequence[Settled], report: dict[str, Any]) -> RoundOutcome:
        """Make a candidate and judge it; return the outcome that this calls for, and fill the report."""
        active, settings = self.store.active_path(), self.settings
        guard = Guard.load(active)
        report["parent"] = active.name
        material = doubt_poisoned(guard, self._gather(guard, active, settled), settings)
        report |= about_material(material)
        pending = self.queue.items(state=State.PENDING, model=self.model, limit=_UNDECIDED)
        undecided = [item for item in pending if not item.input.is_audit]
        anomalies = choose_anomalies(guard, material, undecided, settings)
        report["anomalies"] = len(anomalies)
        refusal = _too_little(material, len(settled), len(anomalies), settings)
        if refusal:
            report["reasons"] = [refusal]
            return "refused"
        pair = fit_candidate(
            guard,
            material,
            anomalies=anomalies,
            measured_before=self._measured_before(guard, active),
            trained_ids={item.id for item in settled if item.state is State.TRAINED},
        )
        pair, material = check_false_alarms(guard, pair, material, undecided, settings, anomalies=anomalies)
        report |= about_material(material)
        refusal = _too_little(material, len(settled), len(anomalies), settings)
        if refusal:
            report["reasons"] = [refusal]
            return "refused"
        pair = follow_traffic(guard, with_final(guard, pair, material, anomalies=anomalies), material, settings)
        decided = {item.id: item.decision_id for item in settled}
        learned = {item_id: decided[item_id] for item_id in material.training_ids}
        lineage = Lineage(active.name, settings.holdout_share, material.held_out.item_ids, learned)
        if pair.final is not None:
            lineage = replace(lineage, measured=write_candidate(pair.candidate, self.store, active, lineage))
        report["candidate"] = write_candidate(pair.promoted, self.store, active, lineage)
        trial = try_candidate(guard, pair, material, undecided, settings)
        report |= about_trial(trial)
        if not trial.judgement.passed:
            return "refused"
        if trial.is_same:
            report["reasons"] = [_NOTHING_GAINED]
            return "refused"
        if settings.canary_inputs:
            report["canary"] = {"after_item_id": report["newest_item"]}
            return "canary"
        return "promoted"

    def _gather(self, guard: Guard, active: Path, settled: Sequence[Settled]) -> Material:
        ids = {item.id for item in settled}
        decisions = [decision for decision in self._all_decisions() if decision.item_id in ids]
        return gather(
            guard,
            itertools.chain.from_iterable(self.queue.portions(sorted(ids))),
            decisions,
            self.settings,
            gold={name: self.queue.gold_results(name) for name in {decision.reviewer for decision in decisions}},
            locked=self._locked(),
            same_network=same_network(self.store, active, {item.bundle_digest for item in settled}),
            needed=reviewers_needed(
                {*Reviewers(self.queue).names(), *(decision.reviewer for decision in decisions)}, self.settings
            ),
        )

    def _measured_before(self, guard: Guard, active: Path) -> Guard | None:
        """Return the active guard as it was measured, without the clean hold-outs; None if it must be fitted again."""
        lineage = Lineage.read(active)
        if lineage.holdout_share != self.settings.holdout_share:
            return None
        if not lineage.measured:
            return guard
        try:
            return Guard.load(self.store.fetch(lineage.measured))
        except StoreUnavailable:
            raise
        except BundleError:  # removed
            return None

    def _locked(self) -> tuple[int, ...]:
        """Return what the newest candidate held out, promoted or not."""
        for entry in self.rounds.all(model=self.model):
            if entry.candidate_digest is not None:
                try:
                    return Lineage.of(self.store.document(entry.candidate_digest)).locked_items
                except StoreUnavailable:
                    raise
                except BundleError:
                    continue
        return ()  # removed, or there was none; the hash holds out the same ones, but for single groups

    def _promote(self, round_id: int, report: dict[str, Any]) -> Finished:
        digest = report["candidate"]
        try:
            learned = Lineage.of(self.store.document(digest)).learned
            self.promoter.promote(Promotion(round_id, digest, report["parent"], learned, report))
        except Exception as error:
            if self.store.active_digest() == digest:  # it serves; `recover` writes the rest down
                raise
            return self._failed(round_id, report, error)
        return Finished(round_id, "promoted", report, digest)

    def _failed(self, round_id: int, report: dict[str, Any], error: Exception) -> Finished:
        text = str(error) if isinstance(error, GuardError) else f"{type(error).__name__}: {error}"
        if not isinstance(error, GuardError):
            logger.exception("round %d failed", round_id)
        report["reasons"] = [" ".join(text.split())]
        digest = report.get("candidate")
        self.rounds.finish(round_id, "failed", report, digest)
        return Finished(round_id, "failed", report, digest)

    def _end_canary(self, waiting: Round) -> Finished | None:
        """Judge a waiting candidate by what was flagged since, once that is enough; None while it is not."""
        report, settings = dict(waiting.report), self.settings
        canary = report["canary"]
        wanted = max(1, settings.canary_inputs)
        flagged = self.queue.items(model=self.model, after_id=canary["after_item_id"], limit=wanted)
        age = self.queue.clock() - (waiting.finished_at or waiting.began_at)
        enough = len(flagged) >= wanted or age >= timedelta(hours=settings.canary_hours)
        if not enough and not self.rounds.take_request(self.model):
            return None
        canary["flagged_since"] = len(flagged)
        try:
            if self.store.active_digest() != report["parent"]:
                raise RetrainingError("another bundle became active while the candidate waited: it is not promoted.")
            pair = Pair(*(Guard.load(self.store.fetch(report[name])) for name in ("parent", "candidate")))
            judgement = compare_on(flagged, pair, settings)
        except Exception as error:
            return self._failed(waiting.id, report, error)
        report["checks"] += judgement.as_dicts()
        report["reasons"] = list(judgement.reasons)
        if judgement.passed:
            return self._promote(waiting.id, report)
        self.rounds.finish(waiting.id, "refused", report, report["candidate"])
        return Finished(waiting.id, "refused", report, report["candidate"])

    # -- reading the queue --------------------------------------------------------------------------------------

    def _all_decisions(self) -> list[Decision]:
        found: list[Decision] = []
        while page := self.queue.decisions(after_id=found[-1].id if found else 0, limit=_PAGE):
            found += page
        return found


def publish_thresholds(file: IO[str], model: str, settings: RetrainerSettings) -> None:
    """Write into the lock's file what the review page tells people of: when a round starts by itself."""
    known = settings.model_dump(include={"enough_decisions", "every_hours", "min_decisions"})
    file.truncate(0)
    file.write(json.dumps({"model": model, **known}) + "\n")
    file.flush()


def _too_little(material: Material, n_decided: int, n_anomalies: int, settings: RetrainerSettings) -> str:
    if n_anomalies > len(material.poisoned):  # purified ones need nobody
        return ""
    if n_decided < settings.min_decisions:
        return f"{n_decided} inputs are decided, min_decisions asks for {settings.min_decisions}."
    if not len(material.training) and not n_anomalies:
        why = ", ".join(f"{count} {reason}" for reason, count in material.left_out.items())
        return f"nothing is left to learn from{f': {why}' if why else ''}."
    return ""
