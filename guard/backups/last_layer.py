"""Re-training the last layer (RTLL): a new last fully connected layer on the suspect model's own features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guard.backups.backup_training import Report
from guard.backups.clean_set import CleanSet
from guard.backups.purification import Measure, Purification
from guard.backups.units import find_unit_layers
from guard.errors import DataError, SuspectModelError
from guard.suspect.recording import device_of

_BATCH = 256


@dataclass(frozen=True, slots=True)
class LastLayerSettings:
    """Settings of re-training the last layer: Adam without weight decay, without augmentation.

    Attributes
    ----------
    epochs, batch_size : int
        >= 1.
    learning_rate : float
        > 0.
    """

    epochs: int = 200
    batch_size: int = 64
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size) < 1 or not self.learning_rate > 0.0:
            raise DataError(
                f"epochs and batch_size must be >= 1 and learning_rate > 0, got {self.epochs}, {self.batch_size} and "
                f"{self.learning_rate}."
            )


def retrain_last_layer(
    twin: nn.Module, clean: CleanSet, settings: LastLayerSettings, seed: int, measure: Measure, progress: Report
) -> Purification:
    """Give the last fully connected layer new random weights, and train it alone, in place.

    It takes its start weights from PyTorch's rule for `Linear`. A backdoor that is in the features stays.

    Raises
    ------
    SuspectModelError
        If the layer that gives the logits is not fully connected.

    References
    ----------
    .. [1] Adi, Baum, Cisse, Pinkas, Keshet (2018), Turning your weakness into a strength: "Re-Train Last Layer".
    """
    _, last = find_unit_layers(twin, clean.images)
    layer = twin.get_submodule(last.name)
    if not isinstance(layer, nn.Linear):
        raise SuspectModelError(
            f"rtll needs a fully connected last layer, {last.name!r} is a convolution. Choose another method."
        )
    inputs, targets = _inputs_of(twin, layer, clean).cpu(), torch.tensor(clean.labels)
    device = device_of(twin)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        optimizer = torch.optim.Adam(fresh.parameters(), lr=settings.learning_rate)
        for epoch in range(settings.epochs):
            for rows in torch.split(torch.randperm(len(inputs)), settings.batch_size):
                loss = F.cross_entropy(fresh(inputs[rows]), targets[rows])
                if not torch.isfinite(loss):
                    raise DataError(
                        f"training diverged in epoch {epoch + 1}: the loss is no longer finite. Lower learning_rate "
                        f"(now {settings.learning_rate:g})."
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            progress((epoch + 1) / settings.epochs)
    layer.load_state_dict({name: tensor.to(device) for name, tensor in fresh.state_dict().items()})
    return Purification(units=layer.out_features, pruned=0)


def _inputs_of(twin: nn.Module, layer: nn.Linear, clean: CleanSet) -> Tensor:
    """Return what reaches a layer, shape (n, d)."""
    parts: list[Tensor] = []

    def take(_layer: nn.Module, args: Any) -> None:
        parts.append(args[0].detach().clone())

    handle = layer.register_forward_pre_hook(take)
    try:
        with torch.no_grad():
            for start in range(0, len(clean.images), _BATCH):
                twin(torch.tensor(clean.images[start : start + _BATCH]).to(device_of(twin)))
    finally:
        handle.remove()
    inputs = torch.cat(parts)
    if inputs.ndim != 2 or len(inputs) != len(clean.images):
        raise SuspectModelError(
            f"rtll needs one row of features per image at the last layer, got shape {tuple(inputs.shape)}."
        )
    return inputs
