"""TorchServe adapter: runs the user's own handler unchanged, watches its network, and answers for every request.

The archive carries `guard_archive.json` (which handler to wrap, where the bundles are) and `guard.toml` (settings).
"""

from __future__ import annotations

import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

from PIL import Image
from ts.context import Context
from ts.metrics.metric_type_enum import MetricTypes
from ts.torch_handler.request_envelope.base import BaseEnvelope

from guard.detection.pipeline import Guard
from guard.errors import ArchiveError
from guard.serving.answers import make_response
from guard.serving.outcomes import Outcome
from guard.serving.review_queue import Receipt, flagged_request
from guard.serving.runtime import GuardRuntime
from guard.suspect.weights import check_weights_file
from guard.telemetry import prometheus_names
from guard.torchserve.answers import Requests, set_answer
from guard.torchserve.archives.contents import read_guard_files
from guard.torchserve.batches import EXPLAIN, SWITCHES, Batches, is_empty
from guard.torchserve.envelopes import handle_each
from guard.torchserve.worker import handler_class, probe_context

BaseEnvelope.handle = handle_each  # this module is loaded before an envelope is made around its handler


class GuardHandler:
    """Composes with a handler class: its `initialize` and `handle` run as they are, watched."""

    def initialize(self, context: Context) -> None:
        """Check the weights, start the user's handler, put its network under guard, and try whether it keeps order."""
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
            bundles=about["bundles"] or None,
            embedded=folder / about["embedded"],
            model_name=context.model_name,
        )
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        self._batches = Batches(self._inner, self._runtime)
        examples = [(folder / name).read_bytes() for name in about["examples"]]
        self._batches.try_out(context, examples)
        for body in examples[: 1 if about["example"] else 0]:
            ((answer, outcome),) = self._batches.answer([{"body": body}], probe_context(context), self._runtime.current)
            if outcome is None or outcome.verdict is None:
                raise ArchiveError(f"the example request got no verdict: {outcome and (outcome.message or answer)}")
        threading.Thread(target=_flush_forever, args=(self._runtime, context.metrics), daemon=True).start()

    def handle(self, data: list[Any], context: Context) -> list[Any]:
        """Return one answer per request, in order; a bad one spoils only itself."""
        guard = self._runtime.current  # once: no batch mixes two bundles
        context.cl_socket = None  # a handler that streams would answer before there is a verdict
        Image.MAX_IMAGE_PIXELS = guard.config.max_image_pixels
        to_explain = []
        for index, item in enumerate(data):
            headers = context.get_all_request_header(index)
            if len(data) > 1 or not is_empty(item):  # alone and without input, it asks about the model
                if headers.get(EXPLAIN) == "True" and not is_empty(item):
                    to_explain.append(index)
                for name in [name for name in headers if name.lower() in SWITCHES]:
                    del headers[name]
        answered = self._batches.answer(data, context, guard)
        for index in to_explain:  # judged like any other; then the handler explains it
            answered[index] = self._batches.explain(data[index], context, index, answered[index])
        requests = Requests(context)
        flagged = {
            index: flagged_request(requests, index, outcome, data[index])
            for index, (_, outcome) in enumerate(answered)
            if outcome is not None and outcome.evidence is not None
        }
        receipts = dict(zip(flagged, self._runtime.send_to_review([*flagged.values()], guard), strict=True))
        return [self._answer(context, index, guard, *pair, receipts.get(index)) for index, pair in enumerate(answered)]

    def _answer(
        self, context: Context, index: int, guard: Guard, body: Any, outcome: Outcome | None, receipt: Receipt | None
    ) -> Any:
        """Set status and headers of one answer, count it, and return its body."""
        answer = set_answer(context, index, make_response(outcome, body, str(guard.digest), guard.config, receipt))
        if outcome is not None:
            status = context.get_response_status(index)[0]
            self._runtime.bookkeeping.request(outcome, status, guard, Requests(context), index)
        return answer


def _flush_forever(runtime: GuardRuntime, cache: Any) -> None:
    """Hand the counts to TorchServe once a second; a call per request would cost 0.17 ms each."""
    add, series = cache.add_metric_to_cache, prometheus_names()
    metrics = {name: add(name, "Count", list(labels), MetricTypes(kind)) for name, kind, labels in series}
    while True:
        for sample in runtime.metrics.drain():
            metrics[sample.name].add_or_update(sample.value, list(sample.labels))
        time.sleep(1.0)
