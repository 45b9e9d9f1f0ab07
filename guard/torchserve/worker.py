"""What a worker of TorchServe does for a handler, outside a server: imports its class, makes contexts, asks it."""

from __future__ import annotations

import copy
import importlib
import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from guard.errors import ArchiveError, DataError
from guard.extras import require
from guard.resources import resource_path
from guard.users_code import why_it_failed


class Remedy(NamedTuple):
    """What a person can do about a handler that cannot be imported, or does not initialise."""

    imports: str
    initialize: str


#: For handlers that are named file by file.
ADD_FILES = Remedy(
    "Add it with --extra-file if it is a file of yours, else install the package that has it.",
    "Does it need a --model-file or an --extra-file?",
)


def new_context(folder: Path, gpu: int | None, model_settings: dict[str, Any]) -> Any:
    """Return TorchServe's context for an unpacked archive, as a worker gives it to `initialize`.

    Parameters
    ----------
    folder : Path
        The unpacked archive, with its manifest.
    gpu : int or None
    model_settings : dict
        What the archive's YAML file says.

    Raises
    ------
    MissingExtraError
        If TorchServe is not installed.
    """
    logging.getLogger("ts").setLevel(logging.ERROR)  # it warns of every accelerator that is not installed
    require("torchserve")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its own files open
        from ts.context import Context
        from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

        metrics = MetricsCacheYamlImpl(config_file_path=str(resource_path("metrics.yaml")))
        metrics.initialize_cache()
    manifest = json.loads((folder / "MAR-INF" / "MANIFEST.json").read_text())
    served = manifest["model"]["modelName"]
    return Context(served, str(folder), manifest, 1, gpu, "0.12.0", metrics=metrics, model_yaml_config=model_settings)


def handler_class(name: str, method: str, remedy: str = ADD_FILES.imports) -> type:
    """Return the one class of a TorchServe handler, which must have a method; its module is imported.

    Parameters
    ----------
    name : str
        File name of a module on `sys.path` (`"my_handler.py"`), or the name of one that TorchServe ships.
    method : str
        What the class must be able to do.
    remedy : str
        What to do about one that cannot be imported.

    Raises
    ------
    ArchiveError
        If it cannot be imported, or is not exactly one class with that method.
    """
    from ts.utils.util import list_classes_from_module

    module_name = Path(name).stem if name.endswith(".py") else f"ts.torch_handler.{name}"
    try:
        module = importlib.import_module(module_name)
        classes: list[type] = list_classes_from_module(module)
    except Exception as error:  # importing runs the user's code
        if getattr(error, "name", None) == module_name and isinstance(error, ModuleNotFoundError):
            raise ArchiveError(
                f"handler {name} cannot be imported: TorchServe ships none of that name. Name a file of your own with "
                "its suffix .py."
            ) from error
        raise ArchiveError(f"handler {name} cannot be imported: {why_it_failed(error, remedy, remedy)}") from error
    if len(classes) != 1 or not callable(getattr(classes[0], method, None)):
        raise ArchiveError(
            f"handler {name} must define exactly one class, with a {method} method; it defines {len(classes)}. "
            "See TorchServe's custom handlers with a class."
        )
    return classes[0]


def request_context(context: Any, ids: Sequence[str | None], headers: Sequence[dict[str, Any]]) -> Any:
    """Return a copy of TorchServe's context for a batch of its own: no status and no header of an answer is set.

    Parameters
    ----------
    context : ts.context.Context
    ids, headers : sequence
        One per request of the batch.
    """
    from ts.context import RequestProcessor

    made = copy.copy(context)
    made.request_ids, made.request_processor = dict(enumerate(ids)), [RequestProcessor(each) for each in headers]
    return made


def probe_context(context: Any, n_requests: int = 1) -> Any:
    """Return a context for requests that no client sent, with the headers that TorchServe gives bytes of no type."""
    kind = "application/octet-stream"
    headers = [{"body": {"content-type": kind}, "content-type": kind} for _ in range(n_requests)]
    return request_context(context, [f"probe-{index}" for index in range(n_requests)], headers)


def asked(handler: Any, context: Any, bodies: Sequence[Any]) -> None:
    """Let a handler answer requests as one batch, in the context that it was initialised with; it keeps the statuses.

    Raises
    ------
    DataError
        If it refuses them, or finds no body in them. Whatever else it raises comes through.
    """
    from ts.context import RequestProcessor
    from ts.utils.util import PredictionException

    context.request_ids = {index: str(index) for index in range(len(bodies))}
    context.request_processor = [RequestProcessor({}) for _ in bodies]
    context.metrics.request_ids = context.request_ids
    try:
        handler.handle([{"body": bytearray(body) if isinstance(body, bytes) else body} for body in bodies], context)
    except PredictionException as error:
        why = f": {error.message}" if error.message else ""
        raise DataError(f"the handler refused the input with status {error.error_code}{why.rstrip('.')}.") from error
    except KeyError as error:
        if error.args != ("data",):
            raise
        raise DataError(
            "the handler takes form fields called 'data' alone, and the server gives it what a client sends as it "
            "is under 'body'. Let it read item.get('data') or item.get('body')."
        ) from error
