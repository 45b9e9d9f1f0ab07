"""A suspect model as a module with several outputs: its logits, and the features of every watched layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from guard.errors import SuspectModelError
from guard.suspect.model import SuspectModel
from guard.suspect.outputs import logits_of
from guard.suspect.recording import hook_layer, pooling
from guard.suspect.split_points import OUTPUT_SUFFIX, first_tensor, module_named


class FeatureModule(nn.Module):
    """Takes images, and returns what `Activations` hold of them: logits, features, and those of the depths.

    Parameters
    ----------
    network : Module
    place : str
        Where the logits are in what it returns.
    taken : callable
        Returns what the hooks on its layers have left behind.
    """

    def __init__(self, network: nn.Module, place: str, taken: Callable[[], Sequence[Tensor]]) -> None:
        super().__init__()
        self.network = network
        self._place, self._taken = place, taken
        floating = (p.dtype for p in itertools.chain(network.parameters(), network.buffers()) if p.is_floating_point())
        self._dtype = next(floating, torch.float32)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return float32 tensors of shapes (n, n_classes), (n, d), (n, d_1), ..."""
        logits = logits_of(self.network(images.to(self._dtype)), self._place).float()
        return (logits, *self._taken())


@contextmanager
def feature_module(suspect: SuspectModel) -> Iterator[FeatureModule]:
    """Yield a suspect model with the features of its split points as further outputs; hooks are on it meanwhile.

    Raises
    ------
    SuspectModelError
        If no split points are set; in a forward pass, if a layer did not run.
    """
    points = suspect.split_points
    if points is None:
        raise SuspectModelError("no split points are set. Call locate(images) or use_split_points(points) first.")
    names = (points.split.removesuffix(OUTPUT_SUFFIX), *points.depths)
    pools = pooling(points)
    seen: dict[int, Tensor] = {}

    def taker(index: int) -> Callable[..., None]:
        def take(_module: nn.Module, args: object, *output: object) -> None:
            tensor = first_tensor(output[0] if output else args)
            if tensor is not None:
                seen[index] = pools[index](tensor).clone()  # the network may go on to work in place

        return take

    def taken() -> list[Tensor]:
        if missing := [name for index, name in enumerate(names) if index not in seen]:
            raise SuspectModelError(f"layer {missing[0]!r} gave no tensor in a forward pass. Locate the split again.")
        found = [seen[index] for index in range(len(names))]
        seen.clear()
        return found

    handles = [
        hook_layer(module_named(suspect.module, name), points, index, taker(index)) for index, name in enumerate(names)
    ]
    try:
        yield FeatureModule(suspect.module.eval(), points.output, taken).eval()
    finally:
        for handle in handles:
            handle.remove()
