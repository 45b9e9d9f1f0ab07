"""Whether a network's answer to an image depends on the others of its batch, or on chance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from guard.errors import SuspectModelError
from guard.suspect.outputs import logits_of, output_place
from guard.suspect.recording import device_of
from guard.suspect.split_points import model_input
from guard.types import Float32Array

#: Batches that are compared: alone, in pairs, and all together.
_SIZES = (1, 2)
_MOST_IMAGES = 32
#: Difference of logits, as a share of their spread, that rounding does not explain.
_NOTICED = 0.01
_MOST_NAMED = 4

#: Layers, each with whether it is in train mode.
Modes = list[tuple[nn.Module, bool]]


def batch_dependence(module: nn.Module, images: Float32Array) -> str:
    """Compare a network's answers to the same images alone, in pairs and together, in the mode that it is in.

    Parameters
    ----------
    module : Module
        Left as it was, and so are its buffers and the global generators.
    images : ndarray of shape (n, channels, height, width), float32
        As many as 32 are used.

    Returns
    -------
    finding : str
        "" if the answers are the same but for rounding; else one line with numbers and the layers that explain it.

    Raises
    ------
    SuspectModelError
        If the same batch gets another answer a second time, or the network takes no image alone.
    """
    batch = torch.tensor(images[:_MOST_IMAGES], device=device_of(module))
    with _as_it_was(module), torch.no_grad():
        together, again = _logits(module, batch, len(batch)), _logits(module, batch, len(batch))
        spread = float(together.std()) or 1.0
        if (moved := _moved(together, again, spread)) > _NOTICED:
            raise SuspectModelError(
                f"the network answers the same images otherwise a second time: its logits move by {moved:.2g} of their "
                f"spread{_explained(module)}. A guard needs a network that repeats itself: call eval() on it, "
                "and give functional dropout training=self.training."
            )
        for size in _SIZES:
            try:
                parts = _logits(module, batch, size)
            except Exception as error:
                raise SuspectModelError(
                    f"the network takes no batch of {size} ({type(error).__name__}: {error}){_explained(module)}. "
                    "Servers send single images."
                ) from error
            if (moved := _moved(together, parts, spread)) > _NOTICED:
                changed = int((parts.argmax(1) != together.argmax(1)).sum())
                return (
                    f"the network's answer to an image depends on the others of its batch: between batches of {size} "
                    f"and {len(batch)} its logits move by {moved:.2g} of their spread, and {changed} of {len(batch)} "
                    f"labels change{_explained(module)}"
                )
    return ""


def modes_of(module: nn.Module) -> Modes:
    """Return every layer with whether it is in train mode."""
    return [(layer, layer.training) for layer in module.modules()]


def check_modes(module: nn.Module, served: Modes, images: Float32Array) -> None:
    """Refuse a network that answers otherwise in the modes that it is served in than in eval mode.

    Parameters
    ----------
    module : Module
        Left as it was.
    served : list of (Module, bool)
        From `modes_of`, before the network was put into eval mode.
    images : ndarray of shape (n, channels, height, width), float32
        As many as 32 are used.

    Raises
    ------
    SuspectModelError
        With numbers, and with the layers that explain it.
    """
    if not any(is_training for _, is_training in served):
        return
    batch = torch.tensor(images[:_MOST_IMAGES], device=device_of(module))
    with _as_it_was(module), torch.no_grad():
        expected = _logits(module.eval(), batch, len(batch))
        for layer, is_training in served:
            layer.training = is_training
        found, explained = _logits(module, batch, len(batch)), _explained(module)
    if (moved := _moved(expected, found, float(expected.std()) or 1.0)) > _NOTICED:
        raise SuspectModelError(
            "the network is left in train mode, where it answers otherwise than in eval mode: its logits move by "
            f"{moved:.2g} of their spread{explained}. Call self.model.eval() in the handler's initialize."
        )


def _logits(module: nn.Module, batch: Tensor, size: int) -> Tensor:
    return torch.cat(
        [
            logits_of(module(model_input(module, part)), output_place(module)).float().cpu()
            for part in torch.split(batch, size)
        ]
    )


def _moved(first: Tensor, second: Tensor, spread: float) -> float:
    return float((first - second).abs().max()) / spread


def _explained(module: nn.Module) -> str:
    """Name the layers that make answers depend on the batch or on chance; "" if none is known to."""
    found = []
    for name, layer in module.named_modules():
        title = f"{name or 'the network'} ({type(layer).__name__}"
        if isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None):
            found.append(f"{title} {'without running statistics' if layer.running_mean is None else 'in train mode'})")
        elif isinstance(layer, _DropoutNd) and layer.training and layer.p > 0:
            found.append(f"{title} in train mode)")
    more = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
    return f"; look at {', '.join(found[:_MOST_NAMED])}{more}" if found else ""


@contextmanager
def _as_it_was(module: nn.Module) -> Iterator[None]:
    """Put modes, buffers and generators back afterwards: a network in train mode changes both while it answers."""
    modes = modes_of(module)
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    devices = [device_of(module)] if device_of(module).type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for layer, is_training in modes:
            layer.training = is_training
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(before[name])
