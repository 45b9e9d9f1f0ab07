"""The user's own TorchServe handler outside a server: its network, and the very tensors that reach it."""

from __future__ import annotations

import importlib
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from guard.errors import DataError, SuspectModelError
from guard.serving.tap import is_same_row, tapped
from guard.suspect.weights import check_weights_file
from guard.torchserve.archives.archive import make_archive
from guard.torchserve.row_fidelity import declares_one_row, why_one_by_one
from guard.torchserve.worker import ADD_FILES, Remedy, asked, handler_class, new_context, probe_context
from guard.types import Float32Array
from guard.users_code import why_it_failed

_NAME = "offline"
#: Requests that are compared alone and together.
_TRIED_TOGETHER = 4
_ONE_ROW = "Use --architecture and --preprocess instead."


class UserHandler:
    """A handler that has been initialised, and is asked as TorchServe would ask it.

    Parameters
    ----------
    inner : object
        The handler.
    context : ts.context.Context
        What it was initialised with.
    module : Module
        The network that it serves.
    """

    def __init__(self, inner: Any, context: Any, module: nn.Module) -> None:
        self.module = module
        self._inner = inner
        self._context = context
        #: Whether a batch was compared with its requests alone, and keeps them apart; None before the first batch.
        self._keeps_apart: bool | None = None

    @property
    def declares_one_row(self) -> bool:
        """Whether its class declares that it keeps the requests of a batch apart."""
        return declares_one_row(self._inner)

    @property
    def batch_dependence(self) -> str:
        """What is wrong with its batches, where some were given to `model_inputs`; "" where nothing is known of it."""
        if self._keeps_apart is not False:
            return ""
        return "the handler gives its network another row for a request of a batch than for the same request alone"

    def model_inputs(self, bodies: Sequence[Any]) -> Float32Array:
        """Let the handler answer requests, and return what reached its network: a row per request.

        All requests are one batch, unless a batch of this handler gives a request another row than it has alone: then
        they are answered one by one, as the guard does it in the server.

        Parameters
        ----------
        bodies : sequence
            Bytes, or what TorchServe makes of JSON or text before a handler sees it.

        Returns
        -------
        inputs : ndarray of shape (n, channels, height, width), float32

        Raises
        ------
        DataError
            If the handler answers an error, or anything but one such row reaches the network for a request. Whatever
            the handler raises comes through.
        """
        if len(bodies) == 1:
            return self._row(bodies[0])
        if self._keeps_apart is None:
            self._keeps_apart = self._is_same_together(bodies[:_TRIED_TOGETHER])
        if not self._keeps_apart:
            return np.concatenate([self._row(body) for body in bodies])
        rows = self._seen(bodies)
        if len(rows) != len(bodies):
            raise DataError(f"{len(rows)} rows reach the network for {len(bodies)} requests together.")
        return _as_images(rows)

    def rows_seen(self, body: Any) -> int:
        """Let the handler answer one request, and return how many rows reached its network.

        Raises
        ------
        DataError
            If it answers an error, and whatever the handler raises.
        """
        return len(self._seen([body]))

    def why_one_by_one(self, examples: Sequence[bytes], input_shape: Sequence[int] | None) -> str:
        """Try whether it keeps the requests of a batch apart, with such bodies: "" if it does, else why not."""
        return why_one_by_one(partial(asked_in_probe, self._inner, self._context), self.module, examples, input_shape)

    def _row(self, body: Any) -> Float32Array:
        rows = self._seen([body])
        if len(rows) == 1:
            return _as_images(rows)
        if not rows:
            raise DataError("the handler answers without calling its network as a whole, so a guard would see nothing.")
        raise DataError(f"{len(rows)} rows reach the network for one request, and a guard is fitted on one. {_ONE_ROW}")

    def _is_same_together(self, bodies: Sequence[Any]) -> bool:
        alone = [self._row(body)[0] for body in bodies]
        try:
            together = self._seen(bodies)
        except Exception:  # it runs the user's code, which may take no batches
            return False
        return len(together) == len(alone) and all(
            is_same_row(row, torch.from_numpy(other)) for row, other in zip(together, alone, strict=True)
        )

    def _seen(self, bodies: Sequence[Any]) -> list[Tensor]:
        """Return the rows that reach the network while the handler answers requests as one batch."""
        context = self._context
        with tapped(self.module) as tap:
            asked(self._inner, context, bodies)
        for index in range(len(bodies)):
            if (status := context.get_response_status(index)[0]) >= 400:
                raise DataError(f"the handler refused the input with status {status}.")
        if any(inputs is None for inputs in tap.inputs):
            raise DataError("what the handler gives its network must be one tensor, and is none.")
        return [row for inputs in tap.inputs if inputs is not None for row in inputs.cpu()]


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
        name = Path(handler).name if isinstance(handler, Path) else handler
        with open_unpacked_handler(folder, name, model_attribute=model_attribute, gpu=gpu) as user:
            yield user


@contextmanager
def open_unpacked_handler(
    folder: Path,
    handler: str,
    *,
    model_attribute: str = "model",
    gpu: int | None = None,
    model_settings: Mapping[str, Any] | None = None,
    remedy: Remedy = ADD_FILES,
) -> Iterator[UserHandler]:
    """Run the `initialize` of a handler in an unpacked archive, whose weights were looked into before.

    Parameters
    ----------
    folder : Path
        The unpacked archive, with its manifest.
    handler : str
        File name of the handler in that folder, or the name of one that TorchServe ships.
    model_attribute, gpu
        As for `open_user_handler`.
    model_settings : mapping, optional
        What the archive's YAML file says, as TorchServe hands it to the handler.
    remedy : Remedy
        What a person can do about a handler that does not start.

    Raises
    ------
    ArchiveError, SuspectModelError
        As `open_user_handler`.
    """
    hidden = _loaded_before(folder)
    for key in hidden:
        del sys.modules[key]
    sys.path.insert(0, str(folder))
    try:
        inner, context = _initialised(handler, folder, gpu, dict(model_settings or {}), remedy)
        module = getattr(inner, model_attribute, None)
        if not isinstance(module, nn.Module):
            raise SuspectModelError(
                f"handler {handler}: its attribute {model_attribute!r} must be a torch.nn.Module, "
                f"got {type(module).__name__}. {_right_attribute(inner)}"
            )
        yield UserHandler(inner, context, module)
    finally:
        sys.path.remove(str(folder))
        for key in [key for key, loaded in sys.modules.items() if _lies_in(loaded, folder)]:
            del sys.modules[key]
        sys.modules.update(hidden)


def _right_attribute(inner: Any) -> str:
    """Say how to name the attribute of a handler that holds its network."""
    try:
        found = [name for name, value in vars(inner).items() if isinstance(value, nn.Module)]
    except TypeError:
        found = []
    named = f'model_attribute = "{found[0]}"' if len(found) == 1 else "model_attribute"
    which = f" (networks are in {', '.join(found)})" if len(found) > 1 else ""
    return f"Name the right one with the setting {named} in guard.toml{which}."


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


def _initialised(
    name: str, folder: Path, gpu: int | None, model_settings: dict[str, Any], remedy: Remedy
) -> tuple[Any, Any]:
    """Return an instance of the handler's class and the context that it was initialised with."""
    importlib.invalidate_caches()
    context = new_context(folder, gpu, model_settings)
    handler = handler_class(name, "handle", remedy.imports)
    try:
        inner = handler()
        inner.initialize(context)
    except Exception as error:
        why = why_it_failed(error, remedy.initialize, remedy.imports)
        raise SuspectModelError(f"handler {name} failed in initialize: {why}") from error
    return inner, context


def asked_in_probe(handler: Any, context: Any, items: list[Any]) -> tuple[Any, Any]:
    """Let a handler answer requests that no client sent; return what it did, and their context."""
    made = probe_context(context, len(items))
    return handler.handle(items, made), made


def _as_images(rows: Sequence[Tensor]) -> Float32Array:
    """Return rows as images of one size.

    Raises
    ------
    DataError
        If they are not.
    """
    shapes = dict.fromkeys(f"{row.dtype} {tuple(row.shape)}" for row in rows)
    if len(shapes) > 1 or rows[0].dtype != torch.float32 or rows[0].ndim != 3:
        raise DataError(
            "what reaches the handler's network must be float32 images of one shape (channels, height, width), "
            f"got {' and '.join(shapes)}. {_ONE_ROW}"
        )
    return np.stack([row.numpy() for row in rows])


def _loaded_before(folder: Path) -> dict[str, Any]:
    """Return the loaded modules of the same names as those in a folder, as another archive's handler may have them."""
    names = {file.stem for file in folder.glob("*.py")} | {file.parent.name for file in folder.glob("*/__init__.py")}
    return {key: loaded for key, loaded in sys.modules.items() if key.partition(".")[0] in names}


def _lies_in(module: Any, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    return isinstance(file, str) and Path(file).is_relative_to(folder)
