"""Hooks that turn every forward pass of a module into one call with its activations; the serving hot path."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from guard.errors import SuspectModelError
from guard.suspect.outputs import logits_of, with_logits
from guard.suspect.split_points import OUTPUT_SUFFIX, POOL_LIMIT, SplitPoints, first_tensor, pool_features
from guard.types import Activations

#: Takes the activations and the module's first argument; a tensor that it returns replaces the logits.
OnForward = Callable[[Activations, Any], Tensor | None]


class Turn(threading.local):
    """Whose hooks act on the forward passes of this thread; None: those of every recording without an owner."""

    owner: object = None

    @contextmanager
    def taken_by(self, owner: object) -> Iterator[None]:
        """Let only this owner's hooks act on this thread meanwhile."""
        before, self.owner = self.owner, owner
        try:
            yield
        finally:
            self.owner = before


class _Slots(threading.local):
    taken: list[Tensor | None] | None = None  # what this thread's forward pass has left behind so far


@contextmanager
def record(
    root: nn.Module,
    layers: Sequence[nn.Module],
    points: SplitPoints,
    on_forward: OnForward,
    turn: Turn,
    owner: object = None,
) -> Iterator[None]:
    """Keep hooks registered that end every forward pass of `root` in one call of `on_forward`.

    Parameters
    ----------
    root : Module
        The suspect model.
    layers : sequence of Module
        The split's module and those of the depths, in the order of the points.
    points : SplitPoints
        Their names, and whether the split is an input or an output.
    on_forward : callable
        Called in the thread of the forward pass; forward passes that it makes itself are not recorded.
    turn : Turn
        Shared by all recordings of this module.
    owner : object, optional
        Record only while it is this owner's turn.
    """
    slots = _Slots()
    pools = pooling(points)

    def begin(_root: nn.Module, _args: Any) -> None:
        slots.taken = [None] * len(layers) if turn.owner is owner else None

    def taker(index: int) -> Callable[..., None]:
        def take(_module: nn.Module, args: Any, *output: Any) -> None:  # as a pre-hook there is no output
            taken = slots.taken
            if taken is not None:
                tensor = first_tensor(output[0] if output else args)
                taken[index] = None if tensor is None else _copy(pools[index], tensor.detach())

        return take

    def finish(_root: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        taken, slots.taken = slots.taken, None
        if taken is None:
            return None
        activations = _activations(points, logits_of(output, points.output), taken)
        turn.owner, before = slots, turn.owner  # nobody's turn
        try:
            answer = on_forward(activations, args[0] if args else next(iter(kwargs.values()), None))
        finally:
            turn.owner = before
        return None if answer is None else with_logits(output, answer, points.output)

    handles = []
    try:
        handles.append(root.register_forward_pre_hook(begin))
        handles += [hook_layer(layer, points, index, taker(index)) for index, layer in enumerate(layers)]
        handles.append(root.register_forward_hook(finish, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def pooling(points: SplitPoints) -> list[Callable[[Tensor], Tensor]]:
    """Return what makes features of a layer's tensor, for the split and each depth; results may share its memory."""
    last = set(points.channels_last)
    pools = [partial(_pooled, channels_last=name in last) for name in (points.split, *points.depths)]
    pools[0] = partial(pools[0], whole=points.columns is None, limit=points.columns or POOL_LIMIT)
    return list(pools)


def hook_layer(layer: nn.Module, points: SplitPoints, index: int, take: Callable[..., None]) -> RemovableHandle:
    """Let `take(module, args)` or `take(module, args, output)` see what passes through a layer of the points."""
    at_output = index > 0 or points.split.endswith(OUTPUT_SUFFIX)
    return layer.register_forward_hook(take) if at_output else layer.register_forward_pre_hook(take)


def _pooled(tensor: Tensor, whole: bool = False, limit: int = POOL_LIMIT, channels_last: bool = False) -> Tensor:
    """Return pooled features; those of two dimensions are kept `whole` if so wanted."""
    return tensor.float() if whole and tensor.ndim == 2 else pool_features(tensor, limit, channels_last=channels_last)


def _copy(pool: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Return features that nothing the model does later can change."""
    pooled = pool(tensor)
    return pooled.clone() if pooled.data_ptr() == tensor.data_ptr() else pooled


def _activations(points: SplitPoints, logits: Tensor, taken: Sequence[Tensor | None]) -> Activations:
    tensors = [logits.detach().float()]
    for name, tensor in zip((points.split, *points.depths), taken, strict=True):
        if tensor is None:
            raise SuspectModelError(f"layer {name!r} gave no tensor in this forward pass. Locate the split again.")
        tensors.append(tensor if tensor.device == logits.device else tensor.to(logits.device))
    joined = torch.cat(tensors, 1).cpu().numpy()  # one copy, and one transfer, for all
    return Activations.from_columns(joined, [tensor.shape[1] for tensor in tensors], points.depths)


def device_of(module: nn.Module) -> torch.device:
    """Return where a module is; the CPU for one without parameters."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
