"""The user's own TorchServe handler outside a server: its network, and the tensors that its `preprocess` makes."""

from __future__ import annotations

import importlib
import json
import logging
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from guard.errors import ArchiveError, DataError, SuspectModelError
from guard.resources import resource_path
from guard.serving.archive import make_archive
from guard.types import Float32Array
from guard.weights import check_weights_file

_NAME = "offline"


@dataclass(frozen=True, slots=True)
class UserHandler:
    """A handler that has been initialised.

    Attributes
    ----------
    module : Module
        The network that it serves.
    model_inputs : callable (sequence of bytes) -> ndarray of shape (n, channels, height, width), float32
        Feeds the bodies of n requests through `preprocess` as one batch. Raises DataError if that returns anything but
        one finite row per request, and whatever `preprocess` raises.
    """

    module: nn.Module
    model_inputs: Callable[[Sequence[bytes]], Float32Array]


@contextmanager
def open_user_handler(
    handler: Path | str,
    weights: Path,
    *,
    model_file: Path | None = None,
    extra_files: Sequence[Path] = (),
    model_attribute: str = "model",
    gpu: int | None = None,
) -> Iterator[UserHandler]:
    """Unpack handler, weights and further files as TorchServe would, and run the handler's `initialize`.

    Parameters
    ----------
    handler : Path or str
        Python file with one handler class, or the name of one that TorchServe ships (`"image_classifier"`).
    weights : Path
        Looked into before the handler touches it: a file that could run code is refused.
    model_file, extra_files
        As for `make_archive`.
    model_attribute : str
        Attribute of the handler that holds the network.
    gpu : int, optional
        Number of the GPU that the handler is told to use; None means the CPU.

    Raises
    ------
    UnsafeWeightsError
        If loading the weights file could run code.
    ArchiveError
        If a file is missing, TorchServe is not installed, or the handler is not one class with `preprocess`.
    SuspectModelError
        If `initialize` fails, or leaves no network in that attribute.
    """
    check_weights_file(weights)
    with tempfile.TemporaryDirectory(prefix="guard-handler-") as scratch:
        folder = _unpacked(handler, weights, model_file, extra_files, Path(scratch).resolve())
        sys.path.insert(0, str(folder))
        try:
            name = Path(handler).name if isinstance(handler, Path) else handler
            inner, context = _initialised(name, folder, gpu)
            module = getattr(inner, model_attribute, None)
            if not isinstance(module, nn.Module):
                raise SuspectModelError(
                    f"handler {name}: its attribute {model_attribute!r} must be a torch.nn.Module, "
                    f"got {type(module).__name__}. Name the right one with the setting model_attribute."
                )
            yield UserHandler(module, lambda bodies: _model_inputs(inner, context, bodies))
        finally:
            sys.path.remove(str(folder))
            for key in [key for key, loaded in sys.modules.items() if _lies_in(loaded, folder)]:
                del sys.modules[key]


def _unpacked(
    handler: Path | str, weights: Path, model_file: Path | None, extra_files: Sequence[Path], scratch: Path
) -> Path:
    if isinstance(handler, Path):
        handler_file = handler
    else:  # one of TorchServe's own is not part of an archive; the manifest names it
        handler_file = scratch / "shipped_handler.py"
        handler_file.touch()
    archive = make_archive(
        _NAME,
        model_store=scratch,
        handler=handler_file,
        weights=weights,
        model_file=model_file,
        extra_files=extra_files,
    )
    folder = scratch / "model"
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)  # written by make_archive just now: plain names only
    archive.unlink()
    return folder


def _initialised(name: str, folder: Path, gpu: int | None) -> tuple[Any, Any]:
    """Return an instance of the handler's class and the context that it was initialised with."""
    logging.getLogger("ts").setLevel(logging.ERROR)  # it warns of every accelerator that is not installed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # it leaves its own files open
            from ts.context import Context
            from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

            metrics = MetricsCacheYamlImpl(config_file_path=str(resource_path("metrics.yaml")))
            metrics.initialize_cache()
    except ImportError as error:
        raise ArchiveError("TorchServe is not installed. Install the torchserve package, version 0.12.") from error
    importlib.invalidate_caches()
    manifest = json.loads((folder / "MAR-INF" / "MANIFEST.json").read_text())
    context = Context(_NAME, str(folder), manifest, 1, gpu, "0.12.0", metrics=metrics, model_yaml_config={})
    handler = handler_class(name, "preprocess")
    try:
        inner = handler()
        inner.initialize(context)
    except Exception as error:
        raise SuspectModelError(
            f"handler {name} failed in initialize: {_short(error)}. Does it need a --model-file or an --extra-file?"
        ) from error
    return inner, context


def handler_class(name: str, method: str) -> type:
    """Return the one class of a TorchServe handler, which must have a method; its module is imported.

    Parameters
    ----------
    name : str
        File name of a module on `sys.path` (`"my_handler.py"`), or the name of one that TorchServe ships.
    method : str
        What the class must be able to do.

    Raises
    ------
    ArchiveError
        If it cannot be imported, or is not exactly one class with that method.
    """
    from ts.utils.util import list_classes_from_module

    try:
        module = importlib.import_module(Path(name).stem if name.endswith(".py") else f"ts.torch_handler.{name}")
        classes: list[type] = list_classes_from_module(module)
    except Exception as error:  # importing runs the user's code
        raise ArchiveError(
            f"handler {name} cannot be imported: {_short(error)}. Add what it needs with --extra-file."
        ) from error
    if len(classes) != 1 or not callable(getattr(classes[0], method, None)):
        raise ArchiveError(
            f"handler {name} must define exactly one class, with a {method} method; it defines {len(classes)}. "
            "See TorchServe's custom handlers with a class."
        )
    return classes[0]


def _model_inputs(inner: Any, context: Any, bodies: Sequence[bytes]) -> Float32Array:
    from ts.context import RequestProcessor

    context.request_ids = {index: str(index) for index in range(len(bodies))}
    context.request_processor = [RequestProcessor({}) for _ in bodies]
    context.metrics.request_ids = context.request_ids
    inner.context = context  # as BaseHandler.handle sets it
    result = inner.preprocess([{"body": bytearray(body)} for body in bodies])
    for index in range(len(bodies)):
        if (status := context.get_response_status(index)[0]) >= 400:
            raise DataError(f"the handler refused the input with status {status}.")
    if not isinstance(result, Tensor) or str(result.dtype) != "torch.float32" or result.ndim != 4:
        got = f"{result.dtype} {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise DataError(
            "the handler's preprocess must return one float32 tensor of shape (n, channels, height, width) "
            f"to be used here, got {got}. Use --architecture and --preprocess instead."
        )
    if len(result) != len(bodies):
        raise DataError(
            f"the handler's preprocess must return one row per request here, got {len(result)} for {len(bodies)}. "
            "Use --architecture and --preprocess instead."
        )
    return np.ascontiguousarray(result.detach().cpu().numpy())


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).rstrip('.')}"


def _lies_in(module: Any, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    return isinstance(file, str) and Path(file).is_relative_to(folder)
