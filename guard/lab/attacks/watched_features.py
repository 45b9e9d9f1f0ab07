"""What a guard would see of a network, with gradients: pooled features at the split layer and at the earlier depths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

from torch import Tensor, nn

from guard.errors import SuspectModelError
from guard.suspect.split_points import (
    OUTPUT_SUFFIX,
    POOL_LIMIT,
    SplitPoints,
    find_split_points,
    first_tensor,
    module_named,
    pool_features,
)
from guard.types import FEATURES, Float32Array


class WatchedFeatures:
    """Features of the latest forward pass, at the layers and pooled in the way of `guard.suspect`, not detached.

    Parameters
    ----------
    module : nn.Module
    points : SplitPoints
        Layers that the guard watches.

    Attributes
    ----------
    latest : dict of str to Tensor of shape (n, d)
        By depth, `"features"` for the split layer; empty before the first forward pass while `attached`.
    """

    def __init__(self, module: nn.Module, points: SplitPoints) -> None:
        self.module = module
        self.points = points
        self.latest: dict[str, Tensor] = {}

    @classmethod
    def locate(cls, module: nn.Module, images: Float32Array) -> Self:
        """Find the layers that a guard with default settings would watch, from example images; eval mode is set."""
        return cls(module, find_split_points(module.eval(), images))

    @contextmanager
    def attached(self) -> Iterator[Self]:
        """Watch the module's forward passes while open."""
        points, handles = self.points, []
        try:
            split = module_named(self.module, points.split.removesuffix(OUTPUT_SUFFIX))
            if points.split.endswith(OUTPUT_SUFFIX):
                handles.append(split.register_forward_hook(self._taker(FEATURES, points.split, points.columns)))
            else:
                handles.append(split.register_forward_pre_hook(self._taker(FEATURES, points.split, points.columns)))
            for name in points.depths:
                handles.append(module_named(self.module, name).register_forward_hook(self._taker(name, name, None)))
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self.latest = {}

    def of(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits (n, n_classes) and the features by depth of images (n, channels, height, width)."""
        with self.attached():
            logits: Tensor = self.module(images)
            return logits, dict(self.latest)

    def _taker(self, depth: str, layer: str, columns: int | None) -> Callable[..., None]:
        pooled = partial(pool_features, channels_last=layer in self.points.channels_last)

        def take(_module: nn.Module, args: Any, *output: Any) -> None:  # as a pre-hook there is no output
            tensor = first_tensor(output[0] if output else args)
            if tensor is None:
                raise SuspectModelError(f"layer {layer!r} gave no tensor in this forward pass. Locate the split again.")
            whole = depth == FEATURES and columns is None and tensor.ndim == 2
            self.latest[depth] = tensor.float() if whole else pooled(tensor, columns or POOL_LIMIT)

        return take
