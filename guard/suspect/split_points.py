"""Where to split a suspect model: found by running it once on example images and watching every layer.

The *split* is the layer whose input detectors see as features: the first fully connected layer after the last feature
map [1]_. The *depths* are up to three earlier layers: the ends of the stages of one spatial resolution, and where a
network has too few of those (transformers, perceptrons), evenly spaced outputs of its repeated blocks.

References
----------
.. [1] Fu et al. (2020), Detecting Backdoors in Neural Networks Using Novel Feature-Based Anomaly Detection.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from guard.errors import SuspectModelError
from guard.types import FEATURES, Float32Array

MAX_DEPTHS = 3
POOL_LIMIT = 512
OUTPUT_SUFFIX = ":output"

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SplitPoints:
    """The layers that activations are taken from.

    Attributes
    ----------
    split : str
        `"name"`: the input of that module is the features. `"name:output"`: its output is.
    depths : tuple of str
        Modules whose outputs are the earlier depths, in the order of execution.
    output : str
        Where the logits are in what the model returns, see `guard.suspect.outputs`.
    channels_last : tuple of str
        Those of the layers whose maps are in the order (n, height, width, channels).
    columns : int or None
        Most features of the split, where it has so many that neighbours are averaged; None: all are kept.
    """

    split: str
    depths: tuple[str, ...]
    output: str = ""
    channels_last: tuple[str, ...] = ()
    columns: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return what a bundle keeps: JSON values, without fields that have their defaults."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        given = {name: value for name, value in values.items() if value or name in ("split", "depths")}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SplitPoints:
        """Return the points of a bundle; `KeyError`, `TypeError` or `ValueError` where they are none."""
        return cls(
            values["split"],
            tuple(values["depths"]),
            str(values.get("output", "")),
            tuple(values.get("channels_last", ())),
            int(values["columns"]) if values.get("columns") is not None else None,
        )


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of one module during the probe; `start` and `end` are ticks of one clock."""

    name: str
    module: nn.Module
    start: int
    end: int
    taken: Shape  # shape of the first positional input; () where that is no tensor
    given: Shape  # shape of the output
    first: bool  # False where the module ran before in the same forward pass


def find_split_points(
    module: nn.Module,
    example_images: Tensor | Float32Array,
    split: str | None = None,
    depths: Sequence[str] | None = None,
) -> SplitPoints:
    """Find the split layer and up to three earlier depths by one forward pass, or check those that the user named.

    The split is the input of the first `Linear` with one row per image after the last module that returns a feature
    map, so that gates between or after convolutions are not mistaken for it. A network without such a layer is split at
    the input of its last convolution; one without convolutions at the input of its last `Linear`.

    Parameters
    ----------
    module : Module
        The suspect model. Its hooks and training flags are left as they were.
    example_images : Tensor or ndarray of shape (n, channels, height, width), float32
        What the model takes; one is enough.
    split : str, optional
        Name of a module: its input becomes the features; `"name:output"`: its output.
    depths : sequence of str, optional
        Names of modules whose outputs become the depths; empty for none.

    Returns
    -------
    points : SplitPoints

    Raises
    ------
    SuspectModelError
        If a name is unknown, its module does not run exactly once or gives no tensor with one row per image, or no
        split is found.
    """
    for name in (*([split.removesuffix(OUTPUT_SUFFIX)] if split else []), *(depths or ())):
        module_named(module, name)
    images = model_input(module, example_images[:2])
    if len(images) == 1:
        images = torch.cat([images, images])
    calls = _probe(module, images)
    repeated = {call.name for call in calls if not call.first}
    usable = [call for call in calls if call.name and call.name not in repeated]
    rows = len(images)
    if split is None:
        chosen = _find_split(calls, usable, rows)
        moment, split = chosen.start, chosen.name
    else:
        chosen = _named_call(split.removesuffix(OUTPUT_SUFFIX), usable)
        is_output = split.endswith(OUTPUT_SUFFIX)
        moment = chosen.end if is_output else chosen.start
        _check_shape(split, chosen.given if is_output else chosen.taken, rows)
    if depths is None:
        before = [call for call in usable if call.end < moment and _is_candidate(call, images)]
        return SplitPoints(split, tuple(call.name for call in _find_depths(before, moment)))
    for name in depths:
        if name == FEATURES:
            raise SuspectModelError(f"a depth must not be called {FEATURES!r}: name the last module inside it instead.")
        _check_shape(name, _named_call(name, usable).given, rows)
    return SplitPoints(split, tuple(depths))


def pool_features(tensor: Tensor, limit: int = POOL_LIMIT) -> Tensor:
    """Reduce a layer's output to at most `limit` float32 columns; the result may share memory with `tensor`.

    Parameters
    ----------
    tensor : Tensor of shape (n, channels, height, width), (n, tokens, d) or (n, d), any floating dtype
        A feature map is flattened if it fits, else averaged over the finest square grid that fits; tokens are averaged;
        columns beyond the limit are averaged in groups of neighbours.
    limit : int, default=512
        Most columns of the result, at least 1.

    Returns
    -------
    pooled : Tensor of shape (n, k), k <= limit, float32

    Raises
    ------
    SuspectModelError
        If the tensor has another number of dimensions.
    """
    if tensor.dtype is not torch.float32:
        tensor = tensor.float()
    if tensor.ndim == 4:
        _, channels, height, width = tensor.shape
        if channels * height * width <= limit:
            return tensor.flatten(1)
        grid = min(math.isqrt(max(limit // channels, 1)), height, width)
        if grid > 1:
            return _average_on_grid(tensor, grid).flatten(1)
        tensor = tensor.mean((2, 3))
    elif tensor.ndim == 3:
        tensor = tensor.mean(1)
    elif tensor.ndim != 2:
        raise SuspectModelError(f"features must have 2, 3 or 4 dimensions, got shape {tuple(tensor.shape)}.")
    return tensor if tensor.shape[1] <= limit else F.adaptive_avg_pool1d(tensor, limit)


def _average_on_grid(maps: Tensor, grid: int) -> Tensor:
    n, channels, height, width = maps.shape
    if height % grid or width % grid:
        return F.adaptive_avg_pool2d(maps, grid)
    if (
        maps.numel() < 32768
    ):  # the same averages, faster on a CPU; on large maps two steps are 2 to 4 times faster still
        return F.avg_pool2d(maps, (height // grid, width // grid))
    bands = maps.view(n, channels, grid, height // grid, width).mean(3)  # (n, channels, grid, width)
    return bands.view(n, channels, grid, grid, width // grid).mean(4)


def first_tensor(value: Any) -> Tensor | None:
    """Return a module's output, or the first element of it where that is a tuple or list, if it is a tensor."""
    if isinstance(value, tuple | list) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


def model_input(module: nn.Module, images: Tensor | Float32Array) -> Tensor:
    """Return a copy of the images on the module's device and in its floating dtype."""
    like = next((p for p in itertools.chain(module.parameters(), module.buffers()) if p.is_floating_point()), None)
    device, dtype = (like.device, like.dtype) if like is not None else (torch.device("cpu"), torch.float32)
    source = images if isinstance(images, Tensor) else torch.tensor(images)
    return source.detach().to(device, dtype, copy=isinstance(images, Tensor))


def module_named(module: nn.Module, name: str) -> nn.Module:
    """Return the module of that name.

    Raises
    ------
    SuspectModelError
        If there is none; the message lists close names.
    """
    modules: dict[str, nn.Module] = dict(module.named_modules(remove_duplicate=False))
    modules.pop("", None)
    if name in modules:
        return modules[name]
    close = difflib.get_close_matches(name, modules, n=3, cutoff=0.4) or list(modules)[:8]
    raise SuspectModelError(
        f"the suspect model has no layer {name!r}. Did you mean {', '.join(map(repr, close))}?"
        if close
        else f"the suspect model has no layer {name!r}: it has no modules inside."
    )


def _probe(module: nn.Module, images: Tensor) -> list[_Call]:
    """Run the module once and return every module's calls in the order in which they ended."""
    calls: list[_Call] = []
    clock = itertools.count()
    running: list[int] = []
    seen: set[str] = set()

    def before(_module: nn.Module, _args: Any) -> None:
        running.append(next(clock))

    def after(name: str, called: nn.Module, args: Any, output: Any) -> None:
        taken, given = first_tensor(args), first_tensor(output)
        shape = tuple(given.shape) if given is not None and given.is_floating_point() else ()
        start = running.pop()
        taken_shape = tuple(taken.shape) if taken is not None else ()
        calls.append(_Call(name, called, start, next(clock), taken_shape, shape, name not in seen))
        seen.add(name)

    training = [inner for inner in module.modules() if inner.training]
    handles = []
    try:
        for name, inner in module.named_modules():
            handles.append(inner.register_forward_pre_hook(before))
            handles.append(inner.register_forward_hook(functools.partial(after, name)))
        module.eval()
        with torch.no_grad():
            module(images)
    finally:
        for handle in handles:
            handle.remove()
        for inner in training:
            inner.training = True
    return calls


def _find_split(calls: list[_Call], usable: list[_Call], rows: int) -> _Call:
    maps = [call.end for call in calls if call.name and len(call.given) == 4]
    linears = [call for call in usable if _is_row_linear(call, rows)]
    convolutions = [call for call in usable if isinstance(call.module, _ConvNd) and call.taken[:1] == (rows,)]
    if any(isinstance(call.module, _ConvNd) for call in calls):
        found = [call for call in linears if call.start > max(maps, default=-1)][:1] or convolutions[-1:]
    else:
        found = linears[-1:]
    if not found:
        raise SuspectModelError(
            "no layer to split at: no Linear or convolution module ran once on one row per image. "
            'Name a layer whose output is the features, such as split="backbone:output".'
        )
    return found[0]


def _find_depths(before: list[_Call], moment: int) -> list[_Call]:
    """Choose up to three of the calls that ended before the split's moment."""
    stages = _without_last(_stage_ends(before), before)[-MAX_DEPTHS:]
    missing = MAX_DEPTHS - len(stages)
    if missing:
        stages += _evenly_spaced(_block_outputs(before, stages, moment, missing), missing)
    return sorted(stages, key=lambda call: call.end)


def _without_last(points: list[_Call], before: list[_Call]) -> list[_Call]:
    """Drop the last point: the features are it, pooled or flattened, unless a fully connected layer lies between."""
    if points and not any(_is_row_linear(call, call.given[0]) and points[-1].end < call.start for call in before):
        return points[:-1]
    return points


def _stage_ends(before: list[_Call]) -> list[_Call]:
    """Return the last output at every spatial resolution, in the order of execution."""
    maps = [call for call in before if len(call.given) == 4 and math.prod(call.given[2:]) > 1]
    ends = []
    for resolution, last in {call.given[2:]: call for call in maps}.items():
        around = [outer for outer in before if _contains(outer, last)]
        if any(_layout(outer.taken) == _layout(outer.given) != resolution for outer in around):
            continue  # an excursion inside a block, such as a gate's pooled map or an attention matrix
        # Where the first layers of the next stage still run at this resolution, take what was handed to that stage.
        for outer in sorted(around, key=lambda call: call.start):
            inside = {call.given[2:] for call in maps if _contains(outer, call)}
            handed = [call for call in maps if call.end < outer.start and call.given[2:] == resolution]
            if _layout(outer.taken) == resolution and inside <= {resolution, _layout(outer.given)} and handed:
                last = handed[-1]
                break
        ends.append(last)
    return sorted(ends, key=lambda call: call.end)


def _block_outputs(before: list[_Call], picked: list[_Call], moment: int, missing: int) -> list[_Call]:
    """Return the outputs of the repeated blocks that hold most of the network's weighted layers."""
    weighted = [call for call in before if next(call.module.parameters(recurse=False), None) is not None]
    options: list[tuple[int, list[_Call]]] = []
    for kind in dict.fromkeys(type(call.module) for call in before):
        same = [call for call in before if type(call.module) is kind]
        blocks = sorted((b for b in same if not any(_contains(o, b) for o in same)), key=lambda call: call.start)
        covered = sum(any(_contains(block, call) or block is call for block in blocks) for call in weighted)
        points = [
            point
            for point in _without_last(_followed_up(blocks, before, moment), before)
            if not any(point is p or _contains(p, point) or _contains(point, p) for p in picked)
        ]
        if covered and points:
            options.append((covered, points))
    most = max((covered for covered, _ in options), default=0)
    options = [(covered, points) for covered, points in options if 3 * covered >= 2 * most]
    return max(options, key=lambda option: (min(len(option[1]), missing), option[0], -len(option[1])), default=(0, []))[
        1
    ]


def _followed_up(blocks: list[_Call], before: list[_Call], moment: int) -> list[_Call]:
    """Return what each block hands on to the next: its output after the activation or norm that follows it."""
    starts = [block.start for block in blocks[1:]] + [moment]
    spans = zip(blocks, starts, strict=True)
    return [max((c for c in before if b.start <= c.end < s), key=lambda call: call.end) for b, s in spans]


def _evenly_spaced(points: list[_Call], count: int) -> list[_Call]:
    if len(points) <= count:
        return points
    return [points[(i + 1) * (len(points) + 1) // (count + 1) - 1] for i in range(count)]


def _is_candidate(call: _Call, images: Tensor) -> bool:
    """Say whether a depth can be taken here: one row per image, and more than the images themselves."""
    shape = call.given
    return len(shape) in (2, 3, 4) and shape[0] == len(images) and shape != images.shape and call.name != FEATURES


def _is_row_linear(call: _Call, rows: int) -> bool:
    return isinstance(call.module, nn.Linear) and len(call.taken) == 2 and call.taken[0] == rows


def _contains(outer: _Call, inner: _Call) -> bool:
    return outer.start < inner.start and inner.end < outer.end


def _layout(shape: Shape) -> Shape:
    return shape[2:] if len(shape) == 4 else (-len(shape),)  # a resolution, or a mark for tokens and vectors


def _named_call(name: str, usable: list[_Call]) -> _Call:
    for call in usable:
        if call.name == name:
            return call
    raise SuspectModelError(f"layer {name!r} must run exactly once in a forward pass. Name another layer.")


def _check_shape(name: str, shape: Shape, rows: int) -> None:
    if len(shape) not in (2, 3, 4) or shape[0] != rows:
        raise SuspectModelError(
            f"layer {name!r} must give one row of 2 to 4 dimensions per image, got shape {shape} for {rows} images. "
            "Name another layer."
        )
