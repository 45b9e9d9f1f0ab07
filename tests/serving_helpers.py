"""Archives of the handlers in `handlers_for_tests/`, and one of them driven as a worker would, without Java."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import sys
import warnings
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from guard import Guard
from guard.resources import resource_path
from guard.torchserve.archives.guarded import ServedModel, make_guarded_archive, make_plain_archive
from guard.types import Float32Array

with warnings.catch_warnings():
    warnings.simplefilter("ignore", ResourceWarning)  # ts leaves its version file open
    from ts.context import Context, RequestProcessor
    from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
    from ts.utils.util import list_classes_from_module

HANDLERS = Path(__file__).parent / "handlers_for_tests"
#: Handlers that answer every request with exactly one row of one forward pass.
ONE_ROW_HANDLERS = ("image", "stock", "text", "dropping", "in_place")


def png(image: Float32Array) -> bytes:
    """Return one image of shape (1, h, w), float32 in [0, 1], as the bytes of a grey PNG."""
    stream = io.BytesIO()
    Image.fromarray(np.rint(image[0] * 255).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def served_model(handler: str, module: torch.nn.Module, folder: Path) -> ServedModel:
    """Return what is packed for one of the handlers by the first part of its file's name; "image" is the package's."""
    if handler == "image":
        weights = folder / "weights.safetensors"
        save_file(module.state_dict(), weights)
        return ServedModel(weights, None, "guard.lab.attacks.networks:mnist_cnn", (1, 28, 28))
    weights = folder / "weights.pt"
    torch.save(module.state_dict(), weights)
    base = [] if handler == "stock" else [HANDLERS / "stock_handler.py"]
    file = HANDLERS / f"{handler}_handler.py"
    if handler == "base_handler":
        return ServedModel(weights, "base_handler", model_file=HANDLERS / "mnist_network.py")
    return ServedModel(weights, file, model_file=HANDLERS / "mnist_network.py", extra_files=base)


@dataclass(frozen=True)
class Answered:
    """One answer of a handler, as TorchServe would send it."""

    status: int
    body: Any
    headers: dict[str, str]

    @property
    def verdict(self) -> tuple[str | None, str | None]:
        return self.headers.get("Guard-Verdict"), self.headers.get("Guard-P-Value")


class Worker:
    """One archive unpacked, its handler initialised with a real Context, as in a worker process."""

    def __init__(self, archive: Path, folder: Path, *, flush: bool = False) -> None:
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(folder)
        manifest = json.loads((folder / "MAR-INF" / "MANIFEST.json").read_text())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # ts leaves the file open
            metrics = MetricsCacheYamlImpl(str(resource_path("metrics.yaml")))
            metrics.initialize_cache()
        metrics.set_request_ids("loading")
        served = manifest["model"]["modelName"]
        self.context = Context(served, str(folder), manifest, 8, None, "0.12.0", metrics=metrics, model_yaml_config={})
        file = folder / manifest["model"]["handler"]
        spec = importlib.util.spec_from_file_location(f"{file.stem}_of_{folder.name}", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        sys.path.insert(0, str(folder))
        spec.loader.exec_module(module)
        (kind,) = list_classes_from_module(module)
        if not flush and hasattr(module, "_flush_forever"):
            module._flush_forever = lambda *_: None  # type: ignore[attr-defined]  # `counts` drains instead
        self.handler = kind()
        self.handler.initialize(self.context)

    def close(self) -> None:
        if hasattr(self.handler, "_runtime"):
            self.handler._runtime.close()

    def ask(self, *bodies: Any, headers: list[dict[str, Any]] | None = None) -> list[Answered]:
        """Send bodies as one batch."""
        self.context.request_ids = {index: f"id-{index}" for index in range(len(bodies))}
        self.context.request_processor = [
            RequestProcessor(dict(headers[index]) if headers else {}) for index in range(len(bodies))
        ]
        self.context.metrics.request_ids = self.context.request_ids
        data = [body if isinstance(body, dict) else {"body": body} for body in bodies]
        answers = self.handler.handle(data, self.context)
        assert isinstance(answers, list)
        assert len(answers) == len(bodies)
        return [
            Answered(self.context.get_response_status(index)[0], body, dict(self.context.get_response_headers(index)))
            for index, body in enumerate(answers)
        ]

    def ask_each(self, *bodies: Any) -> list[Answered]:
        """Send bodies one by one."""
        return [self.ask(body)[0] for body in bodies]

    def counts(self) -> dict[str, float]:
        """Return the counters so far, summed over this call and those before: `name{label,label}` -> value."""
        self.totals = getattr(self, "totals", {})
        for sample in self.handler._runtime.metrics.drain():
            key = f"{sample.name}{{{','.join(sample.labels)}}}"
            if sample.kind == "gauge":
                self.totals[key] = sample.value
            else:
                self.totals[key] = self.totals.get(key, 0) + sample.value
        return dict(self.totals)


class Workshop:
    """Makes archives around one network and guard, and workers of them."""

    def __init__(self, guard: Guard, module: torch.nn.Module, folder: Path) -> None:
        self.folder = folder
        self.module = module
        self.bundle = guard.save(folder / "embedded")
        self.guard = replace(guard, digest=self.bundle.name)
        self.workers: list[Worker] = []

    def guarded(self, handler: str = "image", *, name: str | None = None, start: bool = True, **options: Any) -> Any:
        """Return a worker with a guarded archive; settings go in as keywords, like `action="block"`.

        Unless told otherwise its answers carry all details, which tests compare with what the library says. `queue_url`
        goes into the worker's environment, as a server has it.
        """
        url = options.get("queue_url")
        others = ("bundles", "example", "examples", "bundle", "flush")
        settings = {"verdict_detail": "full"} | {key: options.pop(key) for key in list(options) if key not in others}
        flush = options.pop("flush", False)
        name = name or f"{handler}-{len(list(self.folder.glob('*.mar')))}"
        archive = make_guarded_archive(
            name,
            served_model(handler, self.module, self.folder),
            options.pop("bundle", self.bundle),
            model_store=self.folder,
            settings=settings,
            **options,
        )
        if not start:
            return archive
        with patch.dict(os.environ, {"GUARD_QUEUE_URL": url} if url else {}):
            return self._started(archive, flush)

    def plain(self, handler: str = "image", *, name: str | None = None, start: bool = True) -> Any:
        """Return a worker with the unguarded archive."""
        name = name or f"plain-{handler}-{len(list(self.folder.glob('*.mar')))}"
        archive = make_plain_archive(name, served_model(handler, self.module, self.folder), model_store=self.folder)
        return self._started(archive) if start else archive

    def _started(self, archive: Path, flush: bool = False) -> Worker:
        worker = Worker(archive, self.folder / archive.stem, flush=flush)
        self.workers.append(worker)
        return worker

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
