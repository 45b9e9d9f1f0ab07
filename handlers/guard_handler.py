"""TorchServe adapter: runs the user's own handler unchanged, watches its network, and answers for every request.

The archive carries `guard_archive.json` (which handler to wrap, where the bundles are) and `guard.toml` (settings).
"""

from __future__ import annotations

import copy
import importlib
import json
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

from PIL import Image
from ts.context import Context, RequestProcessor
from ts.metrics.metric_type_enum import MetricTypes
from ts.utils.util import list_classes_from_module

from guard.config import load_settings
from guard.errors import ArchiveError, InputRejectedError
from guard.pipeline import Guard
from guard.serving.answers import excuse, make_answer
from guard.serving.runtime import GuardRuntime, Outcome
from guard.telemetry import prometheus_names
from guard.weights import check_weights_file

_SWITCHES = ("describe", "explain")  # request headers that make a BaseHandler skip its model, for a whole batch
_FLUSH_SECONDS = 1.0


class GuardHandler:
    """Composes with a handler class: its `initialize` and `handle` run as they are, watched."""

    def initialize(self, context: Context) -> None:
        """Check the weights, start the user's handler, and put its network under guard."""
        folder = Path(context.system_properties["model_dir"])
        about = json.loads((folder / "guard_archive.json").read_text())
        settings = load_settings(folder / "guard.toml")
        if "serializedFile" in context.manifest["model"]:
            check_weights_file(folder / context.manifest["model"]["serializedFile"])
        self._inner = _user_handler(about["handler"], folder)
        self._inner.initialize(context)
        self._runtime = GuardRuntime(
            getattr(self._inner, settings.get("model_attribute", "model"), None),
            settings,
            bundles=Path(about["bundles"]) if about["bundles"] else None,
            embedded=folder / about["embedded"],
            model_name=context.manifest["model"]["modelName"],
        )
        Image.MAX_IMAGE_PIXELS = self._runtime.config.max_image_pixels
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        threading.Thread(target=_flush_forever, args=(self._runtime, context.metrics), daemon=True).start()

    def handle(self, data: list[dict[str, Any]], context: Context) -> list[Any]:
        """Return one answer per request, in order; a bad one spoils only itself."""
        if len(data) == 1 and not any(data[0].values()) and any(context.get_request_header(0, s) for s in _SWITCHES):
            return list(self._inner.handle(data, context))  # a question about the model that carries no input
        for index in range(len(data)):
            headers = context.get_all_request_header(index)
            for name in [name for name in headers if name.lower() in _SWITCHES]:
                del headers[name]
        guard = self._runtime.current  # once: no batch mixes two bundles
        answered = None
        if len(data) == 1 or self._runtime.config.rows_per_request == 1:
            answered = self._run(data, context, guard)
        if answered is None:  # the batch failed as a whole: each request for itself
            answered = []
            for index, item in enumerate(data):
                alone = _alone(context, index)
                answered += self._run([item], alone, guard) or []
                context.request_processor[index] = alone.request_processor[0]
        return [self._answer(context, index, guard, *pair) for index, pair in enumerate(answered)]

    def _run(self, data: list[dict[str, Any]], context: Context, guard: Guard) -> list[tuple[Any, Outcome]] | None:
        """Run the user's handler once; None if a batch fails or cannot be told apart into its requests."""
        alone = len(data) == 1
        started = time.perf_counter()
        with self._runtime.watching(guard) as record:
            try:
                if alone and not any(data[0].values()):
                    raise InputRejectedError("the request has no body.", 400)
                bodies = self._inner.handle(data, context)
                if not isinstance(bodies, list) or len(bodies) != len(data):
                    raise ArchiveError(f"the handler must return a list with one answer per request ({len(data)}).")
            except Exception as error:
                return [(None, excuse(error, record.model_ran))] if alone else None
        self._runtime.time_stages(time.perf_counter() - started, record.guard_seconds)
        if not alone:
            return list(zip(bodies, record.rows, strict=True)) if len(record.rows) == len(data) else None
        status = context.get_response_status(0)[0]
        if not record.rows and status >= 400:  # the user's handler refused it, in its own words
            return [(bodies[0], Outcome("rejected" if status < 500 else "failed", status=status))]
        return [(bodies[0], self._runtime.merge(record.rows))]

    def _answer(self, context: Context, index: int, guard: Guard, body: Any, outcome: Outcome) -> Any:
        """Set status and headers of one answer, count it, and return its body."""
        in_body = self._runtime.config.verdict_in_body
        answer = make_answer(outcome, body, str(guard.digest), verdict_in_body=in_body)
        for name, value in answer.headers.items():
            context.set_response_header(index, name, value)
        if answer.is_error:
            context.set_response_status(answer.status, "", index)
            context.set_response_content_type(index, "application/json")
        self._runtime.count(outcome, context.get_response_status(index)[0])
        return answer.body


def _user_handler(name: str, folder: Path) -> Any:
    """Make the handler to wrap: a file of the archive that defines one class, or one that TorchServe ships."""
    if name.endswith(".py"):
        sys.path.insert(0, str(folder))
        module = importlib.import_module(Path(name).stem)
    else:
        module = importlib.import_module(f"ts.torch_handler.{name}")
    classes = list_classes_from_module(module)
    if len(classes) != 1 or not hasattr(classes[0], "handle"):
        raise ArchiveError(f"handler {name} must define exactly one class with a handle method, got {len(classes)}.")
    return classes[0]()


def _alone(context: Context, index: int) -> Context:
    """Return a context for one request of a batch, as if it had come by itself."""
    alone = copy.copy(context)
    alone.request_ids = {0: context.get_request_id(index)}
    alone.request_processor = [RequestProcessor(context.get_all_request_header(index))]
    return alone


def _flush_forever(runtime: GuardRuntime, cache: Any) -> None:
    """Hand the counts to TorchServe once a second; a call per request would cost 0.17 ms each."""
    metrics = {
        name: cache.add_metric_to_cache(name, "Count", list(labels), MetricTypes(kind))
        for name, kind, labels in prometheus_names()
    }
    while True:
        for sample in runtime.metrics.drain():
            metrics[sample.name].add_or_update(sample.value, list(sample.labels))
        time.sleep(_FLUSH_SECONDS)
