"""One suspect model under guard, for any server: the active bundle, hot swap, and an outcome for every input."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from guard.bundle import BundleStore
from guard.config import SERVING_SETTINGS
from guard.errors import BundleError, GuardError, InputRejectedError, SuspectModelError
from guard.pipeline import Guard
from guard.suspect import SuspectModel
from guard.telemetry import OUTCOMES, UNSCORED_REASONS, MetricBuffer
from guard.types import Activations, BoolArray, Verdict

logger = logging.getLogger(__name__)

OutcomeKind = Literal["clean", "poisoned", "bypassed", "rejected", "failed"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one input: every input gets exactly one.

    Attributes
    ----------
    kind : {"clean", "poisoned", "bypassed", "rejected", "failed"}
        `rejected`: the input's own fault; `failed`: ours, or the model's.
    verdict : Verdict or None
        For `clean` and `poisoned`.
    status : int
        HTTP status that the sender should see.
    reason : str
        One word of `telemetry.UNSCORED_REASONS` where there is no verdict, else "".
    message : str
        One line for the sender where there is no verdict, else "".
    """

    kind: OutcomeKind
    verdict: Verdict | None = None
    status: int = 200
    reason: str = ""
    message: str = ""


@dataclass(slots=True)
class Record:
    """What the guard saw while a server ran the model: one outcome per row of the forward passes, in order."""

    rows: list[Outcome] = field(default_factory=list)
    model_ran: bool = False
    guard_seconds: float = 0.0


class GuardRuntime:
    """Keeps the active guard of one model, and decides.

    Parameters
    ----------
    module : nn.Module or None
        The suspect network that the server runs; None if none was found.
    settings : mapping
        Serving settings that override those in the bundle (action, failure_mode, false_positive_rate, ...).
    bundles : Path or None
        Folder whose ACTIVE is followed while serving; None = only `embedded`.
    embedded : Path or None
        A bundle to start with where `bundles` does not exist on this machine.
    model_name : str
        Label of the metrics.

    Raises
    ------
    SuspectModelError, BundleError
        If there is no network, or no bundle that was fitted for it.
    """

    def __init__(
        self,
        module: nn.Module | None,
        settings: Mapping[str, Any],
        *,
        bundles: Path | None,
        embedded: Path | None,
        model_name: str,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise SuspectModelError(
                f"the handler's network must be a torch.nn.Module, got {type(module).__name__}. "
                "Set model_attribute to the attribute of the handler that holds it."
            )
        self._module = module
        self._settings = {name: value for name, value in settings.items() if name in SERVING_SETTINGS}
        self._store = BundleStore(bundles) if bundles is not None else None
        self._embedded = embedded
        self._refused = ""  # digest that could not be loaded, so that it is tried and reported once
        self._closed = threading.Event()
        self._turn = threading.Lock()
        self._hooks = ExitStack()
        self._watched: Guard | None = None
        self._record: Record | None = None
        self.model_name = model_name
        self.metrics = MetricBuffer()
        self.current = self._first()
        self.config = self.current.config
        self._declare_series()
        threading.Thread(target=self._follow, name="guard-bundles", daemon=True).start()

    def close(self) -> None:
        """Stop following ACTIVE, and take the hooks off the network."""
        self._closed.set()
        with self._turn:
            self._hooks.close()
            self._watched = None

    @contextmanager
    def watching(self, guard: Guard) -> Iterator[Record]:
        """Judge every row of every forward pass made inside the block, all by the same guard.

        Under `relabel` the logits of flagged rows are replaced before the server sees them. Under `closed`, an input of
        another shape than the guard was fitted on is refused before the model runs. One block at a time.

        Raises
        ------
        InputRejectedError
            From inside the block, out of the model's forward pass.
        """
        with self._turn:
            if guard is not self._watched:
                self._watch(guard)
            self._record = record = Record()
            try:
                yield record
            finally:
                self._record = None

    def _watch(self, guard: Guard) -> None:
        """Put hooks on the network for this guard, and leave them there: opening them per batch costs as much again."""
        suspect = guard.suspect
        assert suspect is not None  # a runtime loads guards with their model only
        self._hooks.close()
        self._watched = None

        def before(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            record = self._record
            if record is None:
                return
            if self.config.failure_mode == "closed" and inputs and isinstance(inputs[0], torch.Tensor):
                message = _wrong_shape(guard, inputs[0])
                if message:
                    raise InputRejectedError(message)
            record.model_ran = True

        def after(activations: Activations, inputs: torch.Tensor) -> torch.Tensor | None:
            record = self._record
            if record is None:
                return None
            started = time.perf_counter()
            outcomes = self.judge(guard, activations, inputs)
            record.rows += outcomes
            replaced = self._relabelled(guard, activations, outcomes)
            record.guard_seconds += time.perf_counter() - started
            return replaced

        self._hooks.callback(self._module.register_forward_pre_hook(before).remove)
        self._hooks.enter_context(suspect.watch(after))
        self._watched = guard

    def judge(self, guard: Guard, activations: Activations, inputs: torch.Tensor) -> list[Outcome]:
        """Return one outcome per row; never raises, and an input that cannot be scored is never `clean`."""
        try:
            message = _wrong_shape(guard, inputs)
            if message:
                return [self.unscored("shape", 422, message)] * len(activations)
            if _surely_finite(activations):
                return [_judged(verdict) for verdict in guard.decide(activations)]
            return self._judge_finite_rows(guard, activations, inputs)
        except Exception as error:
            logger.error("the guard failed on a batch: %s", type(error).__name__)  # no content of requests in logs
            return [self.unscored("guard_error", 500, "the guard failed on this input.")] * len(activations)

    def unscored(self, reason: str, status: int, message: str) -> Outcome:
        """Return the outcome of an input that cannot be scored, as `failure_mode` has it."""
        if self.config.failure_mode == "open":
            return Outcome("bypassed", reason=reason, message=message)
        return Outcome("rejected" if status < 500 else "failed", status=status, reason=reason, message=message)

    def merge(self, rows: list[Outcome]) -> Outcome:
        """Return the outcome of a request that made one or several rows; poisoned if any row is."""
        if not rows:
            return self.unscored("not_observed", 500, "the model's forward pass was not seen for this request.")
        if len(rows) > 1 and self.config.rows_per_request == 1:
            message = f"the forward pass made {len(rows)} rows for this request. Set rows_per_request to 'any'."
            return self.unscored("rows", 500, message)
        for kind in ("failed", "rejected", "bypassed"):
            for row in rows:
                if row.kind == kind:
                    return row
        return min(rows, key=lambda row: row.verdict.p_value if row.verdict else 1.0)

    def count(self, outcome: Outcome, status: int) -> None:
        """Count one answered request."""
        verdict = outcome.verdict
        action = verdict.action if verdict is not None and outcome.kind == "poisoned" else "none"
        self.metrics.count("guard_requests_total", self.model_name, str(status))
        self.metrics.count("guard_verdicts_total", self.model_name, outcome.kind, action)
        if outcome.kind == "bypassed":
            self.metrics.count("guard_bypassed_total", self.model_name, outcome.reason)
        if verdict is not None:
            self.metrics.observe("guard_p_value", self.model_name, value=verdict.p_value)

    def time_stages(self, total_seconds: float, guard_seconds: float) -> None:
        """Report how long one batch took: the user's own part, and the guard's."""
        name = "guard_stage_duration_seconds"
        self.metrics.observe(name, self.model_name, "handler", value=total_seconds - guard_seconds)
        self.metrics.observe(name, self.model_name, "guard", value=guard_seconds)

    def _judge_finite_rows(self, guard: Guard, activations: Activations, inputs: torch.Tensor) -> list[Outcome]:
        finite = activations.finite_rows()
        judged = iter([_judged(verdict) for verdict in guard.decide(activations[finite])] if finite.any() else [])
        input_finite = torch.isfinite(inputs).flatten(1).all(dim=1).tolist()
        outcomes = []
        for row, is_finite in enumerate(finite.tolist()):
            if is_finite:
                outcomes.append(next(judged))
            elif input_finite[row]:
                outcomes.append(self.unscored("not_finite", 500, "the model's activations are not finite."))
            else:
                outcomes.append(self.unscored("not_finite", 422, "the input holds NaN or infinity."))
        return outcomes

    def _relabelled(self, guard: Guard, activations: Activations, outcomes: list[Outcome]) -> torch.Tensor | None:
        if self.config.action != "relabel":
            return None
        flagged: BoolArray = np.array([outcome.kind == "poisoned" for outcome in outcomes])
        if not flagged.any():
            return None
        logits = activations.logits.copy()
        logits[flagged] = guard.ensemble.replacement_logits(activations[flagged])
        return torch.from_numpy(logits)

    # -- following ACTIVE ---------------------------------------------------------------------------------------

    def _load(self, path: Path) -> Guard:
        guard = Guard.load(path, SuspectModel(self._module))  # split points of its own: the old guard stays usable
        if guard.suspect is None or guard.suspect.split_points is None:
            raise BundleError(f"bundle {path.name[:12]} was fitted without a suspect model; it cannot watch one.")
        return guard.with_config(**self._settings)

    def _first(self) -> Guard:
        if self._store is not None and self._store.root.is_dir():
            return self._load(self._store.active_path())
        if self._embedded is None:
            raise BundleError("there is no bundle to serve: give a folder of bundles with an ACTIVE one.")
        if self._store is not None:
            logger.warning("folder of bundles not found: serving the embedded bundle until it appears.")
        return self._load(self._embedded)

    def _follow(self) -> None:
        while not self._closed.wait(self.config.bundle_poll_seconds):
            try:
                self.refresh()
            except Exception as error:  # the old guard stays, whatever happens to the folder
                logger.error("following ACTIVE failed: %s", type(error).__name__)

    def refresh(self) -> None:
        """Take the bundle that ACTIVE names, if it is another one and whole; else keep the one in use."""
        digest = self._store.active_digest() if self._store is not None else None
        if self._store is None or digest is None or digest in (self.current.digest, self._refused):
            return
        try:
            guard = self._load(self._store.root / digest)
        except GuardError as error:
            self._refused = digest
            self.metrics.count("guard_bundle_swaps_total", self.model_name, "refused")
            logger.error("new bundle refused, the old one stays: %s", error)
            return
        old, self.current, self._refused = self.current.digest, guard, ""
        self.metrics.count("guard_bundle_swaps_total", self.model_name, "taken")
        self.metrics.set("guard_bundle_info", self.model_name, str(old), value=0)
        self.metrics.set("guard_bundle_info", self.model_name, str(guard.digest), value=1)
        logger.info("bundle %s is in use", guard.digest)

    def _declare_series(self) -> None:
        for kind in OUTCOMES:
            action = self.config.action if kind == "poisoned" else "none"
            self.metrics.count("guard_verdicts_total", self.model_name, kind, action, amount=0)
        for reason in UNSCORED_REASONS:
            self.metrics.count("guard_bypassed_total", self.model_name, reason, amount=0)
        for outcome in ("taken", "refused"):
            self.metrics.count("guard_bundle_swaps_total", self.model_name, outcome, amount=0)
        self.metrics.count("guard_requests_total", self.model_name, "200", amount=0)
        self.metrics.declare_histogram("guard_p_value", self.model_name)
        for stage in ("handler", "guard"):
            self.metrics.declare_histogram("guard_stage_duration_seconds", self.model_name, stage)
        self.metrics.set("guard_bundle_info", self.model_name, str(self.current.digest), value=1)


def _wrong_shape(guard: Guard, inputs: torch.Tensor) -> str:
    if guard.input_shape is None or inputs.shape[1:] == guard.input_shape:
        return ""
    return f"the model's input has shape {tuple(inputs.shape[1:])}, the guard was fitted on {guard.input_shape}."


def _judged(verdict: Verdict) -> Outcome:
    return Outcome("poisoned" if verdict.is_poisoned else "clean", verdict)


def _surely_finite(activations: Activations) -> bool:
    """Return False if a value is, or may be, not finite: a sum is cheap, and NaN and infinity survive it."""
    return all(bool(np.isfinite(array.sum())) for _, array in activations.items())
