"""TorchServe adapter: runs the user's own handler unchanged, watches its network, and answers for every request.

The archive carries `guard_archive.json` (which handler to wrap, where the bundles are) and `guard.toml` (settings).
"""

from __future__ import annotations

import copy
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

from PIL import Image
from ts.context import Context, RequestProcessor
from ts.metrics.metric_type_enum import MetricTypes

from guard.errors import ArchiveError, InputRejectedError, SuspectModelError
from guard.pipeline import Guard
from guard.serving.answers import excuse, make_answer, set_answer
from guard.serving.archived import read_guard_files
from guard.serving.review_queue import Receipt, flagged_request
from guard.serving.runtime import GuardRuntime, Outcome, Record, merge
from guard.serving.user_handler import handler_class
from guard.telemetry import prometheus_names
from guard.weights import check_weights_file

_SWITCHES = ("describe", "explain")  # request headers that make a BaseHandler skip its model, for a whole batch
_Answered = list[tuple[Any, Outcome | None]]  # one body and outcome per request; no outcome = not an input at all


class GuardHandler:
    """Composes with a handler class: its `initialize` and `handle` run as they are, watched."""

    def initialize(self, context: Context) -> None:
        """Check the weights, start the user's handler, and put its network under guard."""
        folder = Path(context.system_properties["model_dir"])
        about, settings = read_guard_files(folder)
        if "serializedFile" in context.manifest["model"]:
            check_weights_file(folder / context.manifest["model"]["serializedFile"])
        sys.path.insert(0, str(folder))
        self._inner = handler_class(about["handler"], "handle")()
        self._inner.initialize(context)
        self._runtime = GuardRuntime(
            getattr(self._inner, settings.get("model_attribute", "model"), None),
            settings,
            bundles=Path(about["bundles"]) if about["bundles"] else None,
            embedded=folder / about["embedded"],
            model_name=context.model_name,
        )
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        if about.get("example"):
            body, alone = (folder / about["example"]).read_bytes(), _alone(context, "example", {})
            for answer, outcome in self._run([{"body": body}], alone, self._runtime.current) or []:
                if outcome is None or outcome.verdict is None:
                    raise ArchiveError(f"the example request got no verdict: {outcome and (outcome.message or answer)}")
        threading.Thread(target=_flush_forever, args=(self._runtime, context.metrics), daemon=True).start()

    def handle(self, data: list[dict[str, Any]], context: Context) -> list[Any]:
        """Return one answer per request, in order; a bad one spoils only itself."""
        guard = self._runtime.current  # once: no batch mixes two bundles
        context.cl_socket = None  # a handler that streams would answer before there is a verdict
        Image.MAX_IMAGE_PIXELS = guard.config.max_image_pixels
        for index, item in enumerate(data):
            headers = context.get_all_request_header(index)
            if len(data) > 1 or not _is_empty(item):  # alone and without input, it asks about the model
                for name in [name for name in headers if name.lower() in _SWITCHES]:
                    del headers[name]
        answered = self._run(data, context, guard) if len(data) == 1 or guard.config.rows_per_request == 1 else None
        if answered is None:  # the batch failed as a whole: each request for itself
            answered = []
            for index, item in enumerate(data):
                alone = _alone(context, context.get_request_id(index), context.get_all_request_header(index))
                answered += self._run([item], alone, guard) or []
                context.request_processor[index] = alone.request_processor[0]
        flagged = {
            index: flagged_request(context, index, outcome, data[index])
            for index, (_, outcome) in enumerate(answered)
            if outcome is not None and outcome.evidence is not None
        }
        receipts = dict(zip(flagged, self._runtime.send_to_review([*flagged.values()], guard), strict=True))
        return [self._answer(context, index, guard, *pair, receipts.get(index)) for index, pair in enumerate(answered)]

    def _run(self, data: list[Any], context: Context, guard: Guard, *, watch: bool = True) -> _Answered | None:
        """Run the user's handler once; None if a batch fails or cannot be told apart into its requests."""
        alone, empty = len(data) == 1, any(map(_is_empty, data))
        asks = alone and empty and any(context.get_request_header(0, name) == "True" for name in _SWITCHES)
        started, record, headers = time.perf_counter(), Record(), map(context.get_all_request_header, range(len(data)))
        try:
            with self._runtime.watching(guard if watch else None, headers) as record:
                bodies = self._inner.handle(data, context) if asks or not empty else []
            if empty and (record.model_ran or not asks):
                raise InputRejectedError("the request has no body.", 400)
            if not isinstance(bodies, list) or len(bodies) != len(data):
                raise ArchiveError(f"the handler must return a list with one answer per request ({len(data)}).")
        except Exception as error:
            if alone and watch and isinstance(error, SuspectModelError) and guard.config.failure_mode == "open":
                return self._run(data, context, guard, watch=False)  # nothing to see, so it is answered as bypassed
            return [(None, excuse(error, record.model_ran))] if alone else None
        if asks and context.get_response_status(0)[0] < 400:
            return [(bodies[0], None)]
        self._runtime.books.stages(time.perf_counter() - started, record.guard_seconds)
        if alone:
            return [(bodies[0], merge(guard, record.rows, context.get_response_status(0)[0]))]
        refused = any(context.get_response_status(index)[0] >= 400 for index in range(len(data)))
        apart = record.passes == 1 and len(record.rows) == len(data)  # else nobody knows whose row is whose
        return list(zip(bodies, record.rows, strict=True)) if apart and not refused else None

    def _answer(
        self, context: Context, index: int, guard: Guard, body: Any, outcome: Outcome | None, receipt: Receipt | None
    ) -> Any:
        """Set status and headers of one answer, count it, and return its body."""
        answer = make_answer(outcome, body, str(guard.digest), guard.config, receipt)
        set_answer(context, index, answer)
        if outcome is not None:
            self._runtime.books.request(outcome, context.get_response_status(index)[0], guard, context, index)
        return answer.body


def _is_empty(item: Any) -> bool:
    return not any(item.values() if isinstance(item, dict) else [item])  # a service envelope hands over no dict


def _alone(context: Context, request_id: str | None, headers: dict[str, Any]) -> Context:
    """Return a context for one request, as if it had come by itself."""
    alone = copy.copy(context)
    alone.request_ids, alone.request_processor = {0: request_id}, [RequestProcessor(headers)]
    return alone


def _flush_forever(runtime: GuardRuntime, cache: Any) -> None:
    """Hand the counts to TorchServe once a second; a call per request would cost 0.17 ms each."""
    add, series = cache.add_metric_to_cache, prometheus_names()
    metrics = {name: add(name, "Count", list(labels), MetricTypes(kind)) for name, kind, labels in series}
    while True:
        for sample in runtime.metrics.drain():
            metrics[sample.name].add_or_update(sample.value, list(sample.labels))
        time.sleep(1.0)
