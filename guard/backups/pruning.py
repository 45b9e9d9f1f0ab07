"""Pruning by rank: filters with the smallest norm, or those that clean images leave silent; then fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from guard.backups.augmentation import Augmentation
from guard.backups.backup_training import FitSettings, Report, fit_network
from guard.backups.clean_set import CleanSet
from guard.backups.purification import CurvePoint, Measure, Purification
from guard.backups.units import UnitLayer, find_unit_layers, silence
from guard.errors import DataError
from guard.suspect.recording import device_of
from guard.types import Float32Array, Float64Array

#: Shares of the curve.
SHARES = tuple(round(0.1 * step, 1) for step in range(10))
_SCOPES = ("layer-wise", "global", "last-layer")
_NORMS = ("l1", "l2")
_BATCH = 256


def _gently() -> FitSettings:
    return FitSettings(epochs=20, patience=20, learning_rate=1e-3, augmentation=Augmentation(erase=0.25))


def _firmly() -> FitSettings:
    """What relearns most of what half of the filters knew, and forgets the trigger; docs/backups.md has the figures."""
    return FitSettings(epochs=40, patience=40, learning_rate=5e-3, augmentation=Augmentation(erase=0.25))


@dataclass(frozen=True, slots=True)
class NormPruningSettings:
    """Settings of pruning by norm.

    Attributes
    ----------
    norm : {"l1", "l2"}
        Of a unit's weights; in `"global"` scope divided by that of as many ones, so that layers can be compared.
    scope : {"layer-wise", "global", "last-layer"}
        The same share of every layer, of all units together, or of the last layer before the logits only.
    share : float
        Of the units, in [0, 1). Every layer keeps one unit at least.
    fine_tuning : FitSettings or None
        What follows; pruned units stay away. None: nothing.
    """

    norm: Literal["l1", "l2"] = "l1"
    scope: Literal["layer-wise", "global", "last-layer"] = "layer-wise"
    share: float = 0.6
    fine_tuning: FitSettings | None = field(default_factory=_firmly)

    def __post_init__(self) -> None:
        if self.norm not in _NORMS or self.scope not in _SCOPES:
            raise DataError(
                f"norm must be one of {', '.join(_NORMS)} and scope one of {', '.join(_SCOPES)}, got {self.norm!r} "
                f"and {self.scope!r}."
            )
        if not 0.0 <= self.share < 1.0:
            raise DataError(f"share must be in [0, 1), got {self.share}.")


@dataclass(frozen=True, slots=True)
class FinePruningSettings:
    """Settings of fine-pruning.

    Attributes
    ----------
    allowed_accuracy_loss : float
        Units of the last convolution are pruned, the most silent first, while the clean accuracy on held-out images
        falls by at most this, a fraction.
    fine_tuning : FitSettings or None
        What follows; pruned units stay away. None: nothing.
    """

    allowed_accuracy_loss: float = 0.04
    fine_tuning: FitSettings | None = field(default_factory=_gently)

    def __post_init__(self) -> None:
        if not 0.0 <= self.allowed_accuracy_loss < 1.0:
            raise DataError(f"allowed_accuracy_loss must be in [0, 1), got {self.allowed_accuracy_loss}.")


def prune_by_norm(
    twin: nn.Module, clean: CleanSet, settings: NormPruningSettings, seed: int, measure: Measure, progress: Report
) -> Purification:
    """Silence the units with the smallest norm, in place, then fine-tune.

    Batch normalisation learns its statistics anew meanwhile: the stored ones are of a network with all its units, and
    nothing is relearned behind them.

    References
    ----------
    .. [1] Mishra, Varshney, Yadav (2023), Mitigating adversarial attacks using pruning.
    """
    layers, _ = find_unit_layers(twin, clean.images)
    if settings.scope == "last-layer":
        layers = [_last_convolution(layers)]
    norms = [_norms(twin, layer, settings) for layer in layers]
    chosen = {share: _smallest(norms, share, settings.scope == "global") for share in {*SHARES, settings.share}}
    curve = tuple(_point(twin, layers, chosen[share], share, measure) for share in SHARES)
    keep = _silence_all(twin, layers, chosen[settings.share])
    if settings.fine_tuning is not None:
        fit_network(twin, clean, settings.fine_tuning, seed=seed, keep=keep, progress=progress)
    pruned = sum(len(units) for units in chosen[settings.share])
    return Purification(sum(layer.units for layer in layers), pruned, curve)


def prune_by_activation(
    twin: nn.Module, clean: CleanSet, settings: FinePruningSettings, seed: int, measure: Measure, progress: Report
) -> Purification:
    """Silence the filters of the last convolution that clean images activate least, in place, then fine-tune.

    References
    ----------
    .. [1] Liu, Dolan-Gavitt, Garg (2018), Fine-pruning: defending against backdooring attacks on deep networks.
    """
    layers, _ = find_unit_layers(twin, clean.images)
    layer = _last_convolution(layers)
    order = np.argsort(mean_activations(twin, layer, clean.images), kind="stable")
    counts = [round(share * layer.units) for share in SHARES]
    curve = tuple(
        _point(twin, [layer], [order[:count]], share, measure) for share, count in zip(SHARES, counts, strict=True)
    )
    least = curve[0].measured["clean_accuracy"] - settings.allowed_accuracy_loss
    pruned = 0
    for count in range(1, layer.units):
        if _point(twin, [layer], [order[:count]], 0.0, measure).measured["clean_accuracy"] < least - 1e-9:
            break
        pruned = count
    keep = silence(twin, layer, order[:pruned])
    if settings.fine_tuning is not None:
        fit_network(twin, clean, settings.fine_tuning, seed=seed, keep=keep, freeze_statistics=True, progress=progress)
    return Purification(layer.units, pruned, curve)


def mean_activations(module: nn.Module, layer: UnitLayer, images: Float32Array) -> Float64Array:
    """Return a unit's mean positive output over images and places, after its batch normalisation; shape (units,)."""
    total, count = torch.zeros(layer.units, dtype=torch.float64), 0

    def add(_layer: nn.Module, _args: Any, output: Tensor) -> None:
        nonlocal count
        positive = output.detach().clamp(min=0).double()
        summed = positive.sum(dim=[axis for axis in range(positive.ndim) if axis != 1]).cpu()
        total.add_(summed)
        count += positive.numel() // layer.units

    handle = module.get_submodule(layer.norm or layer.name).register_forward_hook(add)
    try:
        with torch.no_grad():
            for start in range(0, len(images), _BATCH):
                module(torch.tensor(images[start : start + _BATCH]).to(device_of(module)))
    finally:
        handle.remove()
    means: Float64Array = (total / count).numpy()
    return means


def _last_convolution(layers: Sequence[UnitLayer]) -> UnitLayer:
    """Return the last convolution, or the last layer of a network that has none."""
    return next((layer for layer in reversed(layers) if layer.is_convolution), layers[-1])


def _norms(twin: nn.Module, layer: UnitLayer, settings: NormPruningSettings) -> Float64Array:
    weight = twin.get_parameter(f"{layer.name}.weight").detach().double().cpu().flatten(1)  # (units, weights)
    order = int(settings.norm[1])
    norms = torch.linalg.vector_norm(weight, ord=order, dim=1) / weight.shape[1] ** (1 / order)
    found: Float64Array = norms.numpy()
    return found


def _smallest(norms: Sequence[Float64Array], share: float, together: bool) -> list[list[int]]:
    """Return the units to prune, a list per layer; the largest of each layer is always kept."""
    cut = np.concatenate(norms)
    bar = np.sort(cut)[round(share * len(cut))] if together else 0.0
    chosen = []
    for layer_norms in norms:
        order = np.argsort(layer_norms, kind="stable")
        count = int((layer_norms < bar).sum()) if together else round(share * len(layer_norms))
        chosen.append(order[: min(count, len(layer_norms) - 1)].tolist())
    return chosen


def _point(
    twin: nn.Module, layers: Sequence[UnitLayer], units: Sequence[Any], share: float, measure: Measure
) -> CurvePoint:
    """Measure the network pruned so, and leave it as it was."""
    names = [f"{owner}." for layer in layers for owner in (layer.name, layer.norm) if owner]
    state = {name: tensor.clone() for name, tensor in twin.state_dict().items() if name.startswith(tuple(names))}
    _silence_all(twin, layers, units)
    point = CurvePoint(share, sum(len(numbers) for numbers in units), dict(measure(twin)))
    twin.load_state_dict(state, strict=False)
    return point


def _silence_all(twin: nn.Module, layers: Sequence[UnitLayer], units: Sequence[Any]) -> dict[str, Tensor]:
    keep: dict[str, Tensor] = {}
    for layer, numbers in zip(layers, units, strict=True):
        keep |= silence(twin, layer, (int(unit) for unit in numbers))
    return keep
