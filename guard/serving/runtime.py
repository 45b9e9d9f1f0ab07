"""One suspect network under guard, for any server: watched while it runs, and an outcome for every row."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from guard.detection.pipeline import Guard
from guard.errors import BundleError, InputRejectedError, SuspectModelError
from guard.serving.active_guard import ActiveGuard, relabelled, wrong_shape
from guard.serving.outcomes import Record
from guard.storage.places import BundlePlace
from guard.suspect.model import SuspectModel
from guard.types import Activations


class _Begun(threading.local):
    """The forward pass that this thread is in.

    Attributes
    ----------
    record : Record or None
        Of the block in which it began: a handler may give up waiting for a thread, and answer the next request.
    inputs : Tensor or None
        As they were then: a backup must not see what a model that works in place left of them.
    """

    record: Record | None = None
    inputs: torch.Tensor | None = None


class GuardRuntime(ActiveGuard):
    """Keeps the active guard of one model, watches its network, and decides.

    Parameters
    ----------
    module : nn.Module or None
        The suspect network that the server runs; None if none was found.
    settings, bundles, embedded, model_name
        As of `ActiveGuard`.

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
        bundles: BundlePlace | None,
        embedded: Path | None,
        model_name: str,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise SuspectModelError(
                f"the handler's network must be a torch.nn.Module, got {type(module).__name__}. "
                "Set model_attribute to the attribute of the handler that holds it."
            )
        self.module = module
        self._turn = threading.Lock()
        self._hooks = ExitStack()
        self._watched: Guard | None = None
        self._record: Record | None = None
        super().__init__(settings, bundles=bundles, embedded=embedded, model_name=model_name)

    def close(self) -> None:
        """Stop following ACTIVE, and take the hooks off the network."""
        self._closed.set()
        with self._turn:
            self._hooks.close()
            self._watched = None
        super().close()

    @contextmanager
    def watching(self, guard: Guard | None, headers: Iterable[Mapping[str, str]] = ()) -> Iterator[Record]:
        """Judge every row of every forward pass made inside the block, all by the same guard; None watches nothing.

        Under `relabel` the logits of flagged rows are replaced before the server sees them; where a request may make
        several rows, those of the whole forward pass. Under `closed`, an input of another shape than the guard was
        fitted on is refused before the model runs. One block at a time. Of the requests' headers only a deadline is
        looked at, where the settings name one: then the verdict looks as deep as time allows.

        Raises
        ------
        InputRejectedError
            From inside the block, out of the model's forward pass.
        """
        with self._turn:
            if guard is not self._watched:
                self._watch(guard)
            self._record = record = Record()
            if guard is not None:
                record.allowed_ms = self.allowed_ms(guard, headers)
            try:
                yield record
            finally:
                self._record = None

    def _watch(self, guard: Guard | None) -> None:
        """Put hooks on the network for this guard, and leave them there: opening them per batch costs as much again."""
        self._hooks.close()
        self._watched = None
        if guard is None:
            return
        suspect = guard.suspect
        assert suspect is not None  # a runtime loads guards with their model only
        begun = _Begun()

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            record = self._record
            begun.record, begun.inputs = record, None
            if record is None:
                return
            inputs = args[0] if args else next(iter(kwargs.values()), None)
            message = wrong_shape(guard, inputs) if isinstance(inputs, torch.Tensor) else ""
            if message and guard.config.failure_mode == "closed":
                raise InputRejectedError(message)
            record.model_ran = record.model_ran or not message
            if guard.backup is not None and isinstance(inputs, torch.Tensor):
                begun.inputs = inputs.detach().clone()

        def after(activations: Activations, inputs: torch.Tensor) -> torch.Tensor | None:
            record, kept, begun.record, begun.inputs = begun.record, begun.inputs, None, None
            if record is None:
                return None
            started = time.perf_counter()
            inputs = inputs if kept is None else kept
            outcomes = self.judge_in_time(guard, activations, inputs, record.allowed_ms)
            record.forward_passes += 1
            record.rows += outcomes
            logits = relabelled(guard, activations, inputs, outcomes)
            replaced = None if logits is None else torch.from_numpy(logits).to(suspect.device)
            record.guard_seconds += time.perf_counter() - started
            return replaced

        self._hooks.callback(self.module.register_forward_pre_hook(before, with_kwargs=True).remove)
        self._hooks.enter_context(suspect.watch(after))
        self._watched = guard

    def _read(self, path: Path) -> Guard:
        guard = Guard.load(path, SuspectModel(self.module))  # split points of its own: the old guard stays usable
        if guard.suspect is None or guard.suspect.split_points is None:
            raise BundleError(f"bundle {path.name[:12]} was fitted without a suspect model; it cannot watch one.")
        return guard
