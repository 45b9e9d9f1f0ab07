"""The guard in use for one model: follows ACTIVE, judges activations wherever they come from, and counts."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from guard.config import SERVING_SETTINGS
from guard.detection.pipeline import Guard
from guard.errors import BundleError, GuardError, SuspectModelError
from guard.serving.bookkeeping import Bookkeeping
from guard.serving.evidence import collect_evidence
from guard.serving.outcomes import Outcome, judged, unscored
from guard.serving.review_queue import Flagged, Receipt, ReviewQueue
from guard.serving.time_budget import TimeBudget, allowed_milliseconds
from guard.storage.bundle import BundleStore
from guard.storage.places import BundlePlace
from guard.storage.stores import open_store
from guard.types import Activations, Float32Array, Verdict

logger = logging.getLogger(__name__)


class ActiveGuard:
    """The guard in use for one model: follows ACTIVE, judges activations wherever they come from, and counts.

    Parameters
    ----------
    settings : mapping
        Serving settings that override those in the bundle (action, failure_mode, false_positive_rate, ...), and
        `queue_url`.
    bundles : path-like or None
        Folder whose ACTIVE is followed while serving, or its URL in an object store; None = only `embedded`.
    embedded : Path or None
        A bundle to start with where `bundles` does not exist on this machine, or cannot be reached.
    model_name : str
        Label of the metrics.

    Raises
    ------
    BundleError
        If there is no bundle that was fitted for this model.
    """

    def __init__(
        self, settings: Mapping[str, Any], *, bundles: BundlePlace | None, embedded: Path | None, model_name: str
    ) -> None:
        self._settings = {name: value for name, value in settings.items() if name in SERVING_SETTINGS}
        self._store = open_store(bundles) if bundles is not None else None
        self._embedded = embedded
        self._refused: tuple[str, int] = ("", -1)  # what could not be loaded, so that it is tried and reported once
        self._closed = threading.Event()
        self.model_name = model_name
        self.review_queue: ReviewQueue | None = None
        self.bookkeeping = Bookkeeping(model_name)
        self.metrics = self.bookkeeping.metrics
        self._time_budgets: WeakKeyDictionary[Guard, TimeBudget] = WeakKeyDictionary()
        self.current = self._first()
        self.review_queue = _review_queue(settings, model_name)  # after what may fail: it has a thread
        self.bookkeeping.traffic = self.review_queue.traffic if self.review_queue is not None else None
        self.bookkeeping.open(self.current, self._earlier_bundles())
        if self.current.config.audit_rate > 0:
            if self.review_queue is not None:
                self.review_queue.traffic.begin(str(self.current.digest))
            else:
                logger.warning("audit_rate is set, and there is no audit sample without a queue: set queue_url.")
        threading.Thread(target=self._follow, name="guard-bundles", daemon=True).start()

    def close(self) -> None:
        """Stop following ACTIVE, and close the way to the queue. Safe to call twice."""
        self._closed.set()
        if self.review_queue is not None:
            self.review_queue.close()

    def allowed_ms(self, guard: Guard, headers: Iterable[Mapping[str, str]]) -> float | None:
        """Return the milliseconds that a verdict on rows with these headers may take; None = any."""
        return allowed_milliseconds(guard, headers) if guard in self._time_budgets else None

    def judge_in_time(
        self, guard: Guard, activations: Activations, inputs: torch.Tensor, allowed_ms: float | None
    ) -> list[Outcome]:
        """Return what `judge` does, looking as deep as the time allows."""
        began_ns = time.time_ns()
        outcomes = self._as_deep_as_allowed(guard, activations, inputs, allowed_ms)
        if self.bookkeeping.spans is None:
            return outcomes
        decided_ns = (began_ns, time.time_ns())
        return [outcome.within(decided_ns) for outcome in outcomes]

    def _as_deep_as_allowed(
        self, guard: Guard, activations: Activations, inputs: torch.Tensor, allowed_ms: float | None
    ) -> list[Outcome]:
        if allowed_ms is None:
            return self.judge(guard, activations, inputs)
        budget, started = self._time_budgets[guard], time.perf_counter()
        chosen, is_late = budget.deepest_within(allowed_ms, guard, len(activations))
        self.bookkeeping.looked(chosen.depth, len(activations), is_late=is_late)
        outcomes = self.judge(chosen, activations, inputs)
        if all(outcome.kind == "clean" and outcome.evidence is None for outcome in outcomes):
            budget.took(chosen, len(outcomes), time.perf_counter() - started)
        return outcomes

    def judge(self, guard: Guard, activations: Activations, inputs: torch.Tensor) -> list[Outcome]:
        """Return one outcome per row; never raises, and an input that cannot be scored is never `clean`."""
        try:
            message = wrong_shape(guard, inputs)
            if message:
                return [unscored(guard, "shape", 422, message)] * len(activations)
            # Infinity in the input may be gone from the activations: ReLU, pooling and clamping swallow it.
            if activations.is_finite and math.isfinite(inputs.sum().item()):
                return self._judge_rows(guard, activations, inputs)
            return self._judge_finite_rows(guard, activations, inputs)
        except Exception as error:
            logger.error("the guard failed on a batch: %s", type(error).__name__)  # no content of requests in logs
            return [unscored(guard, "guard_error", 500, "the guard failed on this input.")] * len(activations)

    def send_to_review(self, flagged: list[Flagged], guard: Guard) -> list[Receipt]:
        """Queue the flagged requests and audits of one batch for review; count and return one receipt each."""
        if not flagged or self.review_queue is None:
            return []
        config = guard.config
        is_counted = config.audit_rate > 0
        receipts = self.review_queue.send(flagged, str(guard.digest), config.false_positive_rate, is_counted=is_counted)
        self.bookkeeping.sent_to_review([row.is_audit for row in flagged], receipts)
        return receipts

    def _judge_rows(self, guard: Guard, activations: Activations, inputs: torch.Tensor) -> list[Outcome]:
        activations = guard.complete(activations, inputs)
        verdicts = guard.decide(activations, inputs, ask_backup=self.review_queue is not None)
        if self.review_queue is None:
            return [judged(verdict) for verdict in verdicts]
        drawn, examined = self._drawn(guard, activations, inputs, verdicts)
        evidence = collect_evidence(activations, inputs, examined, drawn)
        return [judged(*pair) for pair in zip(verdicts, evidence, strict=True)]

    def _drawn(
        self, guard: Guard, activations: Activations, inputs: torch.Tensor, verdicts: list[Verdict]
    ) -> tuple[dict[int, float], list[Verdict]]:
        """Return which unflagged rows are drawn as audits, and the verdicts with what a person needs of these.

        Audits that cannot be made are given up and counted: the inputs were judged, and no answer depends on it.
        """
        assert self.review_queue is not None
        drawn = self.review_queue.sample.draw(verdicts, guard.config.false_positive_rate, guard.config.audit_rate)
        if not drawn:
            return drawn, verdicts
        examined = list(verdicts)
        try:
            for row in drawn:
                examined[row] = guard.examined(verdicts[row], activations[np.array([row])], inputs[row : row + 1])
        except Exception as error:
            logger.error("an audit could not be made: %s", type(error).__name__)
            self.bookkeeping.audits_given_up(len(drawn))
            return {}, verdicts
        return drawn, examined

    def _judge_finite_rows(self, guard: Guard, activations: Activations, inputs: torch.Tensor) -> list[Outcome]:
        input_finite = torch.isfinite(inputs).flatten(1).all(dim=1).cpu().numpy()
        if len(input_finite) != len(activations):
            raise SuspectModelError(f"the model made {len(activations)} rows of {len(input_finite)} inputs.")
        finite = activations.finite_rows
        scored = finite & input_finite
        rows = torch.from_numpy(np.flatnonzero(scored)).to(inputs.device)
        judged = iter(self._judge_rows(guard, activations[scored], inputs[rows]) if scored.any() else [])
        outcomes = []
        for row, is_finite in enumerate(finite.tolist()):
            if not input_finite[row]:
                outcomes.append(unscored(guard, "not_finite", 422, "the input holds NaN or infinity."))
            elif is_finite:
                outcomes.append(next(judged))
            else:
                outcomes.append(unscored(guard, "not_finite", 500, "the model's activations are not finite."))
        return outcomes

    # -- following ACTIVE ---------------------------------------------------------------------------------------

    def _read(self, path: Path) -> Guard:
        """Return the guard of a bundle; BundleError where it does not go with this model."""
        return Guard.load(path)

    def _load(self, path: Path) -> Guard:
        guard = self._read(path).with_config(**self._settings)
        if guard.config.max_guard_ms is not None or guard.config.deadline_header is not None:
            self._time_budgets[guard] = TimeBudget(guard)
        return guard

    def _first(self) -> Guard:
        """Load the active bundle; where it is out of reach, the one that served here last, or else the embedded one."""
        folder, problem = self._store.starting_folder() if self._store is not None else (None, "")
        if folder is not None:
            try:
                guard = self._load(folder)
            except BundleError as error:
                if not problem or self._embedded is None:
                    raise
                logger.warning("the bundle that served here last cannot be used: %s", error)
            else:
                if problem:
                    logger.warning("%s: serving the bundle that served here last, %s.", problem, folder.name[:12])
                elif self._store is not None:
                    self._store.remember(folder.name)
                return guard
        if self._embedded is None:
            why = f" ({problem})" if problem else ""
            raise BundleError(f"there is no bundle to serve{why}: give a folder of bundles with an ACTIVE one.")
        if problem:
            logger.warning("%s: serving the embedded bundle until it appears.", problem)
        return self._load(self._embedded)

    def _follow(self) -> None:
        complaint = ""
        least = self._store.least_poll_seconds if self._store is not None else 0.0
        while not self._closed.wait(max(self.current.config.bundle_poll_seconds, least)):
            try:
                self.refresh()
                complaint = ""
            except Exception as error:  # the old guard stays, whatever happens to the folder
                if complaint != (complaint := type(error).__name__):  # once, and not four times a second
                    logger.error("following ACTIVE failed: %s", complaint)

    def refresh(self) -> None:
        """Take the bundle that ACTIVE names, if it is another one and whole; else keep the one in use.

        A refused one is tried again when its folder changes, as when it is repaired, or comes later than ACTIVE. An
        object store is asked here, in the thread that follows ACTIVE, and no request waits for it.
        """
        if self._store is None:
            return
        try:
            digest = self._store.active_digest() or self.current.digest
        except BundleError as error:
            self._refuse("", 0, error)
            return
        if digest is None or digest == self.current.digest:
            self._refused = ("", -1)
            return
        attempt = (digest, _changed(self._store.folder_of(digest)))
        if attempt == self._refused and attempt[1]:
            return
        try:
            path = self._store.fetch(digest)
            attempt = (digest, _changed(path))
            guard = self._load(path)
        except Exception as error:  # whatever is wrong with it
            self._refuse(*attempt, error)
            return
        old, self.current, self._refused = self.current, guard, ("", -1)
        self.bookkeeping.swapped(old, guard)
        self._store.remember(digest)

    def _refuse(self, digest: str, changed_ns: int, error: Exception) -> None:
        """Keep the bundle in use, and say so once per refused state of the folder."""
        if self._refused == (digest, changed_ns):
            return
        self._refused = (digest, changed_ns)
        text = str(error) if isinstance(error, GuardError) else type(error).__name__
        self.bookkeeping.refused(digest, self.current, text)

    def _earlier_bundles(self) -> list[str]:
        """Return the bundles that a worker before this one may have served; the server still shows its last word."""
        if self._store is None:
            return []
        here = BundleStore(self._store.root)  # whatever the store is: what was never here was never served here
        return [digest for digest in here.digests() if digest != self.current.digest]


def wrong_shape(guard: Guard, inputs: torch.Tensor) -> str:
    """Return in which way inputs have another shape than the guard was fitted on; "" if they have not."""
    if guard.input_shape is None or inputs.shape[1:] == guard.input_shape:
        return ""
    return f"the model's input has shape {tuple(inputs.shape[1:])}, the guard was fitted on {guard.input_shape}."


def relabelled(
    guard: Guard, activations: Activations, inputs: torch.Tensor, outcomes: Sequence[Outcome]
) -> Float32Array | None:
    """Return the logits of a forward pass with a second opinion in place of flagged rows; None if all stay."""
    if guard.action != "relabel":
        return None
    opinions = {
        row: outcome.verdict.second_opinion
        for row, outcome in enumerate(outcomes)
        if outcome.verdict is not None and outcome.verdict.action == "relabel"
    }
    if not opinions:
        return None
    logits = activations.logits.copy()
    for row, opinion in opinions.items():
        logits[row] = opinion
    if guard.config.rows_per_request == "any":  # one request made them all, and it is poisoned
        others = np.array([row for row in range(len(logits)) if row not in opinions], dtype=np.int64)
        if len(others):
            logits[others] = guard.second_opinion(activations, inputs, others)
    return logits


def _review_queue(settings: Mapping[str, Any], model_name: str) -> ReviewQueue | None:
    """Return the way to the queue; None where the server has none, or this model's flagged inputs do not go there."""
    if not settings.get("review", True):
        return None
    if url := settings.get("queue_url"):
        return ReviewQueue(url, model_name)
    if settings.get("review"):  # somebody asked for it when the archive was made
        logger.warning(
            "this archive wants a queue, and flagged inputs are not kept: set GUARD_QUEUE_URL for the server."
        )
    return None


def _changed(folder: Path) -> int:
    """Return when a folder changed last, in nanoseconds; 0 if it is not there."""
    return folder.stat().st_mtime_ns if folder.is_dir() else 0
