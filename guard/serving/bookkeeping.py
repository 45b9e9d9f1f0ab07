"""What became of every request of one model: counted for Prometheus, and written to the log unless it was clean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from guard.detection.pipeline import Guard
from guard.serving.event_log import EventLog, loggable_id
from guard.serving.outcomes import Outcome, Requests
from guard.serving.review_queue import Receipt
from guard.serving.tracing import decision_spans, trace_id
from guard.serving.traffic import Traffic
from guard.statistics.calibration import fired
from guard.statistics.strata import stratum_of
from guard.telemetry import OUTCOMES, SHED_REASONS, UNSCORED_REASONS, MetricBuffer, label_value
from guard.types import Verdict

#: Why a flagged request was not queued, by the receipt that its answer tells.
_SHED: dict[Receipt, str] = {"dropped": "full", "unavailable": "unavailable"}
#: Why batches are answered one by one after a check that did not hold.
WITHDRAWN = "a check while serving found a request's row or answer at another's place"
#: Answers that a server gives sooner or later; a series that is first seen at 1 has not increased for Prometheus.
_KNOWN_CODES = ("200", "400", "422", "500")


class Bookkeeping:
    """Counts of one model in one process, and its log.

    Parameters
    ----------
    model : str
        Label of the metrics.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self.metrics = MetricBuffer()
        self.log = EventLog(model)
        self.spans = decision_spans()
        #: Where what was judged is counted for the audit sample; None: nowhere.
        self.traffic: Traffic | None = None

    def open(self, guard: Guard, known_bundles: Iterable[str]) -> None:
        """Make every series known that may come, so that its first increase is seen.

        Parameters
        ----------
        guard : Guard
            The first one in use.
        known_bundles : iterable of str
            Digests of bundles that may have been in use before this process, as the server remembers them.
        """
        metrics, model = self.metrics, self.model
        for code in _KNOWN_CODES:
            metrics.count("guard_requests_total", model, code, amount=0)
        for reason in UNSCORED_REASONS:
            metrics.count("guard_bypassed_total", model, reason, amount=0)
        for reason in SHED_REASONS:
            metrics.count("guard_shed_total", model, reason, amount=0)
        for reason in (*SHED_REASONS, "error"):
            metrics.count("guard_audits_shed_total", model, reason, amount=0)
        for outcome in ("taken", "refused"):
            metrics.count("guard_bundle_swaps_total", model, outcome, amount=0)
        for outcome in ("match", "mismatch"):
            metrics.count("guard_batch_checks_total", model, outcome, amount=0)
        for name in (
            "guard_queued_total",
            "guard_audited_total",
            "guard_unflagged_low_total",
            "guard_shallow_total",
            "guard_depth_floor_total",
        ):
            metrics.count(name, model, amount=0)
        metrics.declare_histogram("guard_p_value", model)
        for stage in ("handler", "guard"):
            metrics.declare_histogram("guard_stage_duration_seconds", model, stage)
        for digest in known_bundles:
            metrics.set("guard_bundle_info", model, digest, value=0)
        self._declare(guard)

    def swapped(self, old: Guard, new: Guard) -> None:
        """Note that another bundle is in use."""
        self.metrics.count("guard_bundle_swaps_total", self.model, "taken")
        self.metrics.set("guard_bundle_info", self.model, str(old.digest), value=0)
        self._declare(new)
        self.log.write("bundle_taken", bundle=new.digest, instead_of=old.digest)

    def refused(self, digest: str, current: Guard, why: str) -> None:
        """Note that a new bundle was not taken."""
        self.metrics.count("guard_bundle_swaps_total", self.model, "refused")
        self.log.write("bundle_refused", bundle=digest, stays=current.digest, why=why)

    def batching(self, why_one_by_one: str) -> None:
        """Note whether batches share one call of the handler: "" if they do, else why not."""
        self.metrics.set("guard_batching", self.model, value=float(not why_one_by_one))
        together = "one by one" if why_one_by_one else "together"
        self.log.write("batching", requests=together, **({"why": why_one_by_one} if why_one_by_one else {}))

    def batch_checked(self, holds: bool) -> None:
        """Note that one request of a batch was run again alone; if it did not hold, batches are answered one by one."""
        self.metrics.count("guard_batch_checks_total", self.model, "match" if holds else "mismatch")
        if not holds:
            self.batching(WITHDRAWN)

    def request(self, outcome: Outcome, status: int, guard: Guard, requests: Requests, index: int) -> None:
        """Count one answered request; if it was not clean, write it to the log.

        Parameters
        ----------
        outcome : Outcome
        status : int
            HTTP status of the answer.
        guard : Guard
            The one that judged it.
        requests : Requests
            Of its batch.
        index : int
            Of the request in its batch.
        """
        metrics, model, verdict, kind = self.metrics, self.model, outcome.verdict, outcome.kind
        action = verdict.action if verdict is not None and kind == "poisoned" else "none"
        metrics.count("guard_requests_total", model, str(status))
        metrics.count("guard_verdicts_total", model, kind, action)
        if verdict is not None:
            metrics.observe("guard_p_value", model, value=verdict.p_value)
            if self.traffic is not None and guard.config.audit_rate > 0:
                rate = guard.config.false_positive_rate
                self.traffic.add(str(guard.digest), stratum_of(verdict.p_value, rate, kind == "poisoned"))
        if self.spans is not None and outcome.decided_ns is not None:
            self.spans.add(
                requests.headers(index),
                outcome.decided_ns,
                model=model,
                bundle=guard.digest,
                verdict=kind,
                action=action,
                p_value=verdict.p_value if verdict is not None else None,
            )
        if kind == "clean":
            if verdict is not None and verdict.p_value <= low_p_value(guard):
                metrics.count("guard_unflagged_low_total", model)
            return
        detectors = self._fired(guard, verdict) if verdict is not None else []
        for name in detectors:
            metrics.count("guard_detector_fired_total", model, label_value(name))
        if kind == "bypassed":
            metrics.count("guard_bypassed_total", model, outcome.reason)
        fields: dict[str, Any] = {
            "request_id": loggable_id(requests.request_id(index)),
            "bundle": guard.digest,
            "verdict": kind,
            "action": action,
            "status": status,
            "reason": outcome.reason,
            "detectors": detectors,
            "trace_id": trace_id(requests.headers(index)),
        }
        if verdict is not None:
            fields |= {"label": verdict.label, "p_value": verdict.p_value}
        self.log.write("request", **{name: value for name, value in fields.items() if value not in ("", [], None)})

    def stages(self, total_seconds: float, guard_seconds: float) -> None:
        """Report how long one batch took: the user's own part, and the guard's."""
        name = "guard_stage_duration_seconds"
        self.metrics.observe(name, self.model, "handler", value=total_seconds - guard_seconds)
        self.metrics.observe(name, self.model, "guard", value=guard_seconds)

    def looked(self, depth: str, n_rows: int, *, is_late: bool) -> None:
        """Count how deep a guard in a hurry looked at the rows of a forward pass.

        Parameters
        ----------
        depth : str
            Empty if everything was looked at.
        n_rows : int
        is_late : bool
            True if even the shallowest verdict that the floor allows was expected to take longer than `max_guard_ms`.
        """
        if depth:
            self.metrics.count("guard_shallow_total", self.model, amount=n_rows)
        if is_late:
            self.metrics.count("guard_depth_floor_total", self.model, amount=n_rows)

    def sent_to_review(self, is_audit: Sequence[bool], receipts: Sequence[Receipt]) -> None:
        """Count what became of requests in the queue: flagged ones, and those of the audit sample."""
        for audit, receipt in zip(is_audit, receipts, strict=True):
            if receipt == "queued":
                self.metrics.count("guard_audited_total" if audit else "guard_queued_total", self.model)
            else:
                name = "guard_audits_shed_total" if audit else "guard_shed_total"
                self.metrics.count(name, self.model, _SHED[receipt])

    def audits_given_up(self, n_rows: int) -> None:
        """Count rows that were drawn for the audit sample, and of which a person would not have had enough."""
        self.metrics.count("guard_audits_shed_total", self.model, "error", amount=n_rows)

    def _declare(self, guard: Guard) -> None:
        actions = ("relabel", "flag") if guard.action == "relabel" else (guard.action,)  # a backup may abstain
        for kind in OUTCOMES:
            for action in actions if kind == "poisoned" else ("none",):
                self.metrics.count("guard_verdicts_total", self.model, kind, action, amount=0)
        for name in guard.ensemble.names:
            self.metrics.count("guard_detector_fired_total", self.model, label_value(name), amount=0)
        self.metrics.set("guard_bundle_info", self.model, str(guard.digest), value=1)

    @staticmethod
    def _fired(guard: Guard, verdict: Verdict) -> list[str]:
        beyond = fired(np.array([*verdict.surprise.values()]), guard.config.mode, guard.config.false_positive_rate)
        return [name for name, is_beyond in zip(verdict.surprise, beyond.tolist(), strict=True) if is_beyond]


def low_p_value(guard: Guard) -> float:
    """Return the p-value that a tenth of clean, unflagged traffic does not exceed, as long as it is like at `fit`.

    P-values of clean inputs are uniform, and those up to the rate are flagged: what is left lies in (rate, 1]. `paper`
    mode knows no requested rate; there, the one that it realised counts.
    """
    rate = guard.realised_false_positive_rate if guard.config.mode == "paper" else guard.config.false_positive_rate
    return rate + 0.1 * (1 - rate)
