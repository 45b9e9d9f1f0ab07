"""The neurons of a network, layer by layer in the order in which they run, and how to silence some of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from guard.errors import SuspectModelError
from guard.suspect.outputs import logits_of, output_place
from guard.suspect.recording import device_of
from guard.types import Float32Array


@dataclass(frozen=True, slots=True)
class UnitLayer:
    """A convolution or a fully connected layer; a unit is one filter, or one row of the matrix.

    Attributes
    ----------
    name : str
    norm : str
        Name of the batch normalisation that takes this layer's output; empty if none does.
    units : int
    is_convolution : bool
    """

    name: str
    norm: str
    units: int
    is_convolution: bool


def find_unit_layers(module: nn.Module, images: Float32Array) -> tuple[list[UnitLayer], UnitLayer]:
    """Return all layers before the last one, and the last one, which gives the logits.

    Parameters
    ----------
    module : Module
        In eval mode; not changed.
    images : ndarray of shape (n, channels, height, width), float32
        One forward pass is run over the first two.

    Raises
    ------
    SuspectModelError
        If no convolution or fully connected layer runs, or there is only one.
    """
    found: dict[str, tuple[nn.Module, Any]] = {}
    norms: dict[str, str] = {}
    handles = []

    def watch_layer(name: str, layer: nn.Module) -> Any:
        def keep(_layer: nn.Module, _args: Any, output: Any) -> None:
            found.pop(name, None)  # a layer that runs twice counts where it ran last
            found[name] = (layer, output)

        return layer.register_forward_hook(keep)

    def watch_norm(norm: str, layer: nn.Module) -> Any:
        def compare(_layer: nn.Module, args: Any) -> None:
            norms.update({name: norm for name, (_, output) in found.items() if args and args[0] is output})

        return layer.register_forward_pre_hook(compare)

    try:
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                handles.append(watch_layer(name, layer))
            elif isinstance(layer, _BatchNorm) and layer.affine:
                handles.append(watch_norm(name, layer))
        with torch.no_grad():
            logits_of(module(torch.tensor(images[:2]).to(device_of(module))), output_place(module))
    finally:
        for handle in handles:
            handle.remove()
    layers = [
        UnitLayer(name, norms.get(name, ""), len(layer.get_parameter("weight")), isinstance(layer, nn.Conv2d))
        for name, (layer, _) in found.items()
    ]
    if len(layers) < 2:
        raise SuspectModelError(
            f"a network needs two or more convolutions or fully connected layers to be pruned, {len(layers)} ran."
        )
    return layers[:-1], layers[-1]


def silence(module: nn.Module, layer: UnitLayer, units: Iterable[int]) -> dict[str, Tensor]:
    """Set all weights of some units to zero, in place, with those of the batch normalisation behind them.

    Returns
    -------
    keep : dict of str to bool Tensor
        Of every parameter that was touched, by name, the entries that were left.
    """
    rows = torch.tensor(sorted(units), dtype=torch.long)
    keep = {}
    for owner in (layer.name, layer.norm):
        for kind in ("weight", "bias"):
            name = f"{owner}.{kind}"
            parameter = dict(module.named_parameters()).get(name) if owner else None
            if parameter is None:
                continue
            keep[name] = torch.ones(parameter.shape, dtype=torch.bool)
            keep[name][rows] = False
            with torch.no_grad():
                parameter[rows.to(parameter.device)] = 0.0
    return keep
