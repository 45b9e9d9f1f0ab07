"""The suspect model: loaded without running anything of its file, and watched while it answers.

This is the one place that runs the suspect model. One forward pass yields `Activations`: the logits, the features at
the split layer, and pooled features at earlier depths.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from guard.errors import DataError, SuspectModelError, did_you_mean
from guard.suspect.batch_dependence import check_modes, modes_of
from guard.suspect.checkpoints import load_weights
from guard.suspect.contents import MOST_ROWS, LayerContent, layer_contents, sample_rows
from guard.suspect.digest import attribute_marks, constant_attributes, weights_digest
from guard.suspect.outputs import find_output, set_output_place
from guard.suspect.recording import OnForward, Turn, device_of, record
from guard.suspect.split_points import OUTPUT_SUFFIX, SplitPoints, find_split_points, model_input, module_named
from guard.suspect.weights import check_weights_file
from guard.types import Activations, Float32Array, IntArray
from guard.users_code import why_it_failed

#: Images that the network is given at once, where nobody says otherwise.
BATCH_SIZE = 256


class SuspectModel:
    """An image classifier that nobody vouches for, ready to be asked for its activations.

    Parameters
    ----------
    module : Module
        Takes float32 images (n, channels, height, width) and returns logits (n, n_classes): as a tensor, or anywhere
        in tuples, lists, dictionaries and named fields. One logit per image, (n, 1) or (n,), or its sigmoid, stands
        for two classes. It is put into eval mode.
    split : str, optional
        Name of a module whose input is the features, or `"name:output"`; found by itself if None.
    depths : sequence of str, optional
        Names of modules whose outputs are the earlier depths; found by themselves if None.
    output : str, optional
        Where the logits are in what the module returns: keys, fields and positions joined by dots; found by itself if
        None.
    device : str or torch.device, optional
        Where to move the module; None leaves it where it is.

    Attributes
    ----------
    module : Module
        The module itself.

    Raises
    ------
    SuspectModelError
        If the module is compiled, scripted or replicated, so that its layers cannot be watched.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        split: str | None = None,
        depths: Sequence[str] | None = None,
        output: str | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        _check_watchable(module)
        self._given_modes = modes_of(module)
        self.module = (module if device is None else module.to(device)).eval()
        self._points: SplitPoints | None = None
        self._layers: list[nn.Module] = []  # the split's and the depths' modules, in the order of the points
        self._split = split
        self._depths = None if depths is None else tuple(depths)
        self._output = output
        self._sample: Activations | None = None  # of the most images so far, for `contents`
        self._attributes = attribute_marks(self.module)
        self._digest: str | None = None
        self._lock = threading.RLock()
        self._turn = Turn()

    @classmethod
    def load(
        cls,
        path: str | Path,
        architecture: str,
        *,
        state_key: str | None = None,
        split: str | None = None,
        depths: Sequence[str] | None = None,
        output: str | None = None,
        device: str | torch.device | None = None,
    ) -> SuspectModel:
        """Build the architecture from the user's code and fill in the weights of an untrusted file.

        Parameters
        ----------
        path : str or Path
            safetensors, or a state dict or checkpoint saved by `torch.save`. Nothing of the file is executed.
        architecture : str
            `"package.module:factory"`; `factory()` returns the module without weights.
        state_key : str, optional
            Where in the file the weights lie, where several sets fit; see `guard.suspect.checkpoints.load_weights`.
        split, depths, output, device
            As for the class.

        Returns
        -------
        suspect : SuspectModel

        Raises
        ------
        UnsafeWeightsError
            If loading the file could run code.
        SuspectModelError
            If the architecture cannot be built, or no set of weights fits it, or several do.
        """
        check_weights_file(path)
        module = build_architecture(architecture)
        _check_watchable(module)
        load_weights(module, path, state_key=state_key, architecture=architecture)
        return cls(module.eval(), split=split, depths=depths, output=output, device=device)

    def check_given_mode(self, images: Float32Array) -> None:
        """Refuse a network that was given in train mode, and answers these images otherwise there than in eval mode.

        Its server runs it as it was given, and a guard is fitted in eval mode. Raises SuspectModelError with numbers.
        """
        check_modes(self.module, self._given_modes, images)

    @property
    def device(self) -> torch.device:
        """Where the module is; the CPU for one without parameters."""
        return device_of(self.module)

    @property
    def split_points(self) -> SplitPoints | None:
        """The layers in use; None before `locate`, `use_split_points` or the first `activations`."""
        return self._points

    @property
    def digest(self) -> str:
        """SHA-256 of all that changes the answers and is no code, 64 hexadecimal digits; computed once.

        Of tensors that are plain attributes, those count that were there at first and no forward pass has changed.
        """
        if self._digest is None:
            self._digest = weights_digest(self.module, constant_attributes(self.module, self._attributes))
        return self._digest

    @property
    def contents(self) -> tuple[LayerContent, ...]:
        """What split and depths carry, by the largest `activations` so far; empty before the first."""
        if self._sample is None:
            return ()
        split, *depths = layer_contents(self._sample)
        return (dataclasses.replace(split, is_averaged=self._located().columns is not None), *depths)

    def locate(self, images: Tensor | Float32Array, labels: IntArray | None = None) -> SplitPoints:
        """Find the split points and the logits from example images, keep to them, and return them.

        Parameters
        ----------
        images : ndarray or Tensor of shape (n, channels, height, width), float32
            At least one image. Layers are found on the first two, logits in a container on up to 128.
        labels : ndarray of shape (n,), int, optional
            True labels, by which the logits are told from other outputs.

        Raises
        ------
        DataError
            If they are no such images.
        SuspectModelError
            If a layer that was named does not exist or does not fit, no split is found, or it is not clear which of
            the outputs are the logits; the message says what to name. Also for multi-label classifiers.
        """
        _check_images(images[:2])
        with self._lock, self._turn.taken_by(self):
            self.module.eval()
            output = find_output(self.module, images, labels, self._output)
            points = find_split_points(self.module, images, self._split, self._depths)
        points = dataclasses.replace(points, output=output)
        self.use_split_points(points)
        return points

    def use_split_points(self, points: SplitPoints) -> None:
        """Use split points that were found earlier, as a bundle stores them.

        Raises
        ------
        SuspectModelError
            If the module has no layer of such a name.
        """
        names = (points.split.removesuffix(OUTPUT_SUFFIX), *points.depths)
        self._layers = [module_named(self.module, name) for name in names]
        self._points = points
        self._sample = None
        set_output_place(self.module, points.output)

    def activations(
        self, images: Tensor | Float32Array, batch_size: int = BATCH_SIZE, progress: Callable[[int], None] | None = None
    ) -> Activations:
        """Run the suspect model once over the images and return what it left behind.

        The split points are located on the first call. Calls from several threads wait for each other; a `watch` that
        is open at the same time does not see these forward passes.

        Parameters
        ----------
        images : ndarray or Tensor of shape (n, channels, height, width), float32, finite
            What the model takes, after the user's own preprocessing; n >= 1. They are not changed.
        batch_size : int, default=256
            Images per forward pass.
        progress : callable, optional
            Called after every batch with the number of images done so far.

        Returns
        -------
        activations : Activations
            One row per image, in order, float32, sharing no memory with the model.

        Raises
        ------
        DataError
            If the images break the rules above; names the first bad shape, dtype or index.
        SuspectModelError
            If the model returns no logits of shape (n, n_classes), or a layer did not run.
        """
        _check_images(images)
        if batch_size < 1:
            raise DataError(f"batch_size must be at least 1, got {batch_size}.")
        parts: list[Activations] = []
        with self._lock:
            if self._points is None:
                self.locate(images)
            recording = record(
                self.module, self._layers, self._located(), lambda got, _: parts.append(got), self._turn, owner=self
            )
            with self._turn.taken_by(self), recording, torch.no_grad():
                self.module.eval()
                for start in range(0, len(images), batch_size):
                    batch = images[start : start + batch_size]
                    self.module(model_input(self.module, batch))
                    if len(parts[-1]) != len(batch):
                        raise SuspectModelError(
                            f"the suspect model must return one row of logits per image, got {len(parts[-1])} rows "
                            f"for {len(batch)} images."
                        )
                    if progress is not None:
                        progress(start + len(batch))
        activations = Activations.concatenate(parts)
        if self._sample is None or len(self._sample) < min(len(activations), MOST_ROWS):
            self._sample = sample_rows(activations)
        return activations

    @contextmanager
    def watch(self, on_forward: OnForward) -> Iterator[None]:
        """While open, hand the activations of every forward pass of the module to a callback.

        For serving: the module is called by somebody else, from any thread. Gradients and mode are the caller's
        business. The watch may stay open for the life of a server.

        Parameters
        ----------
        on_forward : callable (activations, inputs) -> Tensor or None
            Called at the end of every forward pass, in its thread, with float32 activations that share no memory with
            the model, and the module's first argument as the module left it. A tensor that it returns replaces the
            logits in the module's output. An exception that it raises leaves the forward pass. Forward passes that it
            makes itself are not watched.

        Raises
        ------
        SuspectModelError
            If no split points are set; in a forward pass, if there are no logits or a layer did not run.
        """
        with record(self.module, self._layers, self._located(), on_forward, self._turn):
            yield

    def _located(self) -> SplitPoints:
        if self._points is None:
            raise SuspectModelError("no split points are set. Call locate(images) or use_split_points(points) first.")
        return self._points


def build_architecture(architecture: str) -> nn.Module:
    """Call the user's factory, named `"package.module:factory"`, and return its module.

    Raises
    ------
    SuspectModelError
        If the name is malformed, cannot be imported, fails, or returns no module.
    """
    module_name, _, factory_name = architecture.partition(":")
    if not module_name or not factory_name:
        raise SuspectModelError(f'architecture must be "package.module:factory", got {architecture!r}.')
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's code
        alone = f'Importing it must work by itself: try `python -c "import {module_name}"`.'
        raise SuspectModelError(
            f"architecture {architecture!r} cannot be imported: {why_it_failed(error, alone, module=module_name)}"
        ) from error
    factory = _part_of(found, factory_name, architecture)
    if isinstance(factory, nn.Module):
        raise SuspectModelError(
            f"architecture {architecture!r} is a network already ({type(factory).__name__}), and must be what builds "
            "one. Name its class, or a function that returns it."
        )
    try:
        module = factory()
    except Exception as error:
        if (trace := error.__traceback__) is not None and trace.tb_next is not None:  # from within the factory
            raise SuspectModelError(
                f"architecture {architecture!r} fails when it is called: "
                f"{why_it_failed(error, 'Mend it, or name another function.')}"
            ) from error
        raise SuspectModelError(
            f"architecture {architecture!r} must be callable without arguments, but it failed with "
            f"{type(error).__name__}: {error}. Name a function that fills them in."
        ) from error
    if not isinstance(module, nn.Module):
        raise SuspectModelError(
            f"architecture {architecture!r} must return a torch.nn.Module, got {type(module).__name__}."
        )
    return module


def _part_of(module: Any, factory_name: str, architecture: str) -> Any:
    """Return what a dotted name stands for in a module, of which parts may be imported only now."""
    found = module
    try:
        for part in factory_name.split("."):
            found = getattr(found, part)
    except AttributeError:
        place = getattr(module, "__file__", None) or ("a folder" if hasattr(module, "__path__") else "part of Python")
        raise SuspectModelError(
            f"architecture {architecture!r}: module {module.__name__!r} ({place}) has no {factory_name!r}. "
            f"{_what_it_defines(module, factory_name)}"
        ) from None
    except Exception as error:
        raise SuspectModelError(
            f"architecture {architecture!r} cannot be imported: {why_it_failed(error, 'Mend it, or name another one.')}"
        ) from error
    return found


def _what_it_defines(module: Any, wanted: str) -> str:
    """Name the functions and classes that a module of the user's defines itself, the closest one if there is one."""
    name = module.__name__
    own = [key for key, value in vars(module).items() if callable(value) and getattr(value, "__module__", "") == name]
    public = [key for key in own if not key.startswith("_")]
    return did_you_mean(wanted, public) if public else "It defines no function and no class."


def _check_watchable(module: nn.Module) -> None:
    if not isinstance(module, nn.Module):
        raise SuspectModelError(f"the suspect model must be a torch.nn.Module, got {type(module).__name__}.")
    try:
        inspect.signature(module.forward).bind(None)
    except TypeError as error:
        raise SuspectModelError(
            f"forward of the suspect model ({type(module).__name__}) must be callable with the images alone, as its "
            f"first positional argument: {error}. Wrap it in a module whose forward(images) fills in the rest."
        ) from None
    except ValueError:  # no signature to read, as of a compiled function
        pass
    for inner in module.modules():
        if isinstance(inner, torch.jit.ScriptModule):
            kind, instead = "a TorchScript module", "Build the architecture in Python and load its state dict."
        elif "_orig_mod" in inner._modules or inner._compiled_call_impl is not None:
            kind, instead = "compiled by torch.compile", "Give the module as it was before torch.compile."
        elif isinstance(inner, nn.DataParallel):
            kind, instead = "wrapped in DataParallel", "Give its .module."
        else:
            continue
        raise SuspectModelError(f"the suspect model is {kind}, and hooks on its layers do not work there. {instead}")


def _check_images(images: Tensor | Float32Array) -> None:
    if not isinstance(images, np.ndarray | Tensor):
        raise DataError(f"images must be an ndarray or a Tensor, got {type(images).__name__}.")
    if images.ndim != 4 or len(images) == 0:
        raise DataError(f"images must have shape (n, channels, height, width), n >= 1, got {tuple(images.shape)}.")
    if images.dtype not in (np.dtype(np.float32), torch.float32):
        raise DataError(f"images must be float32, got {images.dtype}. Apply the model's own preprocessing first.")
    for start in range(0, len(images), 256):  # in pieces, to need little memory
        chunk = images[start : start + 256]
        finite = torch.isfinite(chunk) if isinstance(chunk, Tensor) else torch.from_numpy(np.isfinite(chunk))
        if not finite.all():
            bad = start + int((~finite.flatten(1).all(1)).nonzero()[0])
            raise DataError(f"images must be finite: image {bad} holds NaN or infinity. Check its preprocessing.")
