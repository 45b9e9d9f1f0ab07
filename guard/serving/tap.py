"""A network watched from outside for a few calls: the very rows that reach it, and other logits in place of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from guard.suspect.outputs import logits_of, output_place, with_logits

#: Two rows of the same input differ by no more than this times their largest value: copies are equal, and arithmetic
#: on whole batches may round the last bit otherwise. A trigger of one pixel is thousands of times larger.
_ROUNDING = 4 * torch.finfo(torch.float32).eps


@dataclass(slots=True)
class Tap:
    """What was seen of the forward passes.

    Attributes
    ----------
    inputs : list of Tensor or None
        The network's first argument of every pass, a copy of how it began; None if that was no tensor.
    logits : list of Tensor of shape (n_rows, n_classes)
        What the network's caller got of every pass that ended.
    """

    inputs: list[Tensor | None] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


@contextmanager
def tapped(module: nn.Module, replace: Callable[[Tensor], Tensor] | None = None) -> Iterator[Tap]:
    """Note every forward pass made inside the block.

    Parameters
    ----------
    module : Module
    replace : callable (logits) -> logits, optional
        What the network's caller gets instead, of the same shape.
    """
    tap, place = Tap(), output_place(module)

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else next(iter(kwargs.values()), None)
        tap.inputs.append(inputs.detach().clone() if isinstance(inputs, Tensor) else None)

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        logits = logits_of(output, place).detach()
        given = logits if replace is None else replace(logits)
        tap.logits.append(given.clone())
        return None if replace is None else with_logits(output, given, place)

    hooks = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    try:
        yield tap
    finally:
        for hook in hooks:
            hook.remove()


def is_same_row(first: Tensor, second: Tensor) -> bool:
    """Return whether two rows of a network's input are the same, but for the rounding of arithmetic on batches."""
    if first.shape != second.shape:
        return False
    if torch.equal(first, second):
        return True
    first, second = first.double(), second.double()
    return bool((first - second).abs().max() <= _ROUNDING * first.abs().max())  # NaN is not
