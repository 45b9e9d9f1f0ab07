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
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd

from guard.errors import SuspectModelError
from guard.types import FEATURES, Float32Array

MAX_DEPTHS = 3
POOL_LIMIT = 512
#: A split of more numbers than this is averaged to so many columns.
LARGEST_SPLIT, SPLIT_COLUMNS = 32768, 4096
OUTPUT_SUFFIX = ":output"
_ROWS = 2  # images of the probe
_CHANNELS_FIRST = (
    _ConvNd,
    _BatchNorm,
    _MaxPoolNd,
    _AvgPoolNd,
    _AdaptiveAvgPoolNd,
    _AdaptiveMaxPoolNd,
    nn.GroupNorm,
    nn.InstanceNorm2d,
)

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
    given: Shape  # shape of the output; maps as (n, channels, height, width), whatever their order
    first: bool  # False where the module ran before in the same forward pass
    takes_news: bool  # whether two images differ in the input, and in the output
    gives_news: bool
    channels_last: tuple[bool, bool] = (False, False)  # of input and output


def find_split_points(
    module: nn.Module,
    example_images: Tensor | Float32Array,
    split: str | None = None,
    depths: Sequence[str] | None = None,
) -> SplitPoints:
    """Find the split layer and up to three earlier depths by one forward pass, or check those that the user named.

    The split is the input of the first `Linear` with one row per image after the last module that returns a feature
    map, so that gates between or after convolutions are not mistaken for it, and whose input is not the same for every
    image, as a class token is before it has seen one. A network without such a layer is split at the input of its last
    convolution if that makes the logits, else at the last output before them; one without convolutions at the input of
    its last `Linear`. Of a layer that runs several times, the last time counts.

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
        If a name is unknown, its module does not run or gives no tensor with one row per image, or no split is found.
    """
    for name in (*([split.removesuffix(OUTPUT_SUFFIX)] if split else []), *(depths or ())):
        module_named(module, name)
    calls = _probe(module, _two_images(model_input(module, example_images[:2])))
    latest = {call.module: call for call in calls if call.name}  # the last call of each
    repeated = {call.name for call in calls if not call.first}
    usable = [call for call in calls if call.name and call.name not in repeated]
    if split is None:
        chosen, at_output = _find_split(calls, usable, list(latest.values()))
        split = chosen.name + OUTPUT_SUFFIX * at_output
    else:
        at_output = split.endswith(OUTPUT_SUFFIX)
        chosen = _named_call(module, split.removesuffix(OUTPUT_SUFFIX), latest)
        _check_shape(split, chosen.given if at_output else chosen.taken)
    moment = chosen.end if at_output else chosen.start
    if depths is None:
        among = usable if any(_is_candidate(call, calls) and call.end < moment for call in usable) else latest.values()
        before = [call for call in among if call.end < moment and _is_candidate(call, calls)]
        layers = _find_depths(before, moment)
        depths = tuple(call.name for call in layers)
    else:
        if FEATURES in depths:
            raise SuspectModelError(f"a depth must not be called {FEATURES!r}: name the last module inside it instead.")
        layers = [_named_call(module, name, latest) for name in depths]
        for name, layer in zip(depths, layers, strict=True):
            _check_shape(name, layer.given)
    shape = chosen.given if at_output else chosen.taken
    last = [split] * chosen.channels_last[at_output]
    last += [name for name, layer in zip(depths, layers, strict=True) if layer.channels_last[True]]
    columns = SPLIT_COLUMNS if len(shape) == 2 and shape[1] > LARGEST_SPLIT else None
    return SplitPoints(split, tuple(depths), channels_last=tuple(last), columns=columns)


def pool_features(tensor: Tensor, limit: int = POOL_LIMIT, *, channels_last: bool = False) -> Tensor:
    """Reduce a layer's output to at most `limit` float32 columns; the result may share memory with `tensor`.

    Parameters
    ----------
    tensor : Tensor of shape (n, channels, height, width), (n, tokens, d) or (n, d), any floating dtype
        A feature map is flattened if it fits, else averaged over the finest square grid that fits; tokens are averaged;
        columns beyond the limit are averaged in groups of neighbours.
    limit : int, default=512
        Most columns of the result, at least 1.
    channels_last : bool
        Whether a feature map is in the order (n, height, width, channels).

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
        if channels_last:
            tensor = tensor.permute(0, 3, 1, 2)
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
    # The same averages, faster on a CPU; on large maps two steps are 2 to 4 times faster still. An exported network
    # knows no size of its batch.
    if torch.compiler.is_exporting() or maps.numel() < 32768:
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


def _two_images(images: Tensor) -> Tensor:
    """Return two images that differ: those given, or the first one with and without noise."""
    if len(images) == 2 and not torch.equal(images[0], images[1]):
        return images
    noise = torch.rand(images[:1].shape, generator=torch.Generator().manual_seed(0)).to(images)
    return torch.cat([images[:1], images[:1] + noise])


def _probe(module: nn.Module, images: Tensor) -> list[_Call]:
    """Run the module once and return every module's calls in the order in which they ended; the last is its own."""
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
        news = (_differs(taken), _differs(given))
        calls.append(_Call(name, called, start, next(clock), taken_shape, shape, name not in seen, *news))
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
    return _in_one_order(calls)


def _differs(tensor: Tensor | None) -> bool:
    """Say whether the two rows of a tensor differ by more than rounding; NaN does."""
    if tensor is None or tensor.ndim < 2 or len(tensor) != 2 or not tensor.is_floating_point():
        return True
    return not bool((tensor[0] - tensor[1]).abs().max() <= 1e-6 * tensor.abs().max())


def _in_one_order(calls: list[_Call]) -> list[_Call]:
    """Give the shapes of maps with the channels last in the order of the others.

    A map's shape is one with the channels last if a `Linear` or a `LayerNorm` over one dimension made it, and no layer
    that wants the channels first saw it.
    """
    last, first = set(), set()
    for call in calls:
        if isinstance(call.module, nn.Linear) or (
            isinstance(call.module, nn.LayerNorm) and _normalises_last(call.module, call.given)
        ):
            last.add(call.given)
        elif isinstance(call.module, _CHANNELS_FIRST):
            first |= {call.taken, call.given}
    last = {shape for shape in last - first if len(shape) == 4}

    def turned(shape: Shape) -> Shape:
        return (shape[0], shape[3], shape[1], shape[2]) if shape in last else shape

    return [
        dataclasses.replace(
            call,
            taken=turned(call.taken),
            given=turned(call.given),
            channels_last=(call.taken in last, call.given in last),
        )
        for call in calls
    ]


def _normalises_last(norm: nn.LayerNorm, shape: Shape) -> bool:
    """Tell a `LayerNorm` over the last dimension from those of ConvNeXt, which turn a map, normalise and turn back."""
    (size, *more) = norm.normalized_shape
    return not more and shape[-1:] == (size,) and (type(norm) is nn.LayerNorm or shape[1:2] != (size,))


def _find_split(calls: list[_Call], usable: list[_Call], latest: list[_Call]) -> tuple[_Call, bool]:
    """Return the call to split at, and whether at its output."""
    maps = [call.end for call in calls if call.name and len(call.given) == 4]
    convolutions = [call for call in usable if isinstance(call.module, _ConvNd) and call.taken[:1] == (_ROWS,)]
    is_convolutional = any(isinstance(call.module, _ConvNd) for call in calls)
    after = max(maps, default=-1) if is_convolutional else -1
    for among in (usable, latest):
        if heads := [call for call in among if _is_row_linear(call) and call.start > after]:
            return (_first_head(heads, calls) if is_convolutional else heads[-1]), False
    output = calls[-1].given
    if convolutions and (convolutions[-1].given[1:2] == output[1:] or len(output) != 2):
        return convolutions[-1], False
    before = [call for call in latest if _has_features(call, calls) and call.given != output]
    if not before:
        raise SuspectModelError(
            "no layer to split at: no Linear or convolution module ran on one row per image. "
            'Name a layer whose output is the features, such as split="backbone:output".'
        )
    return max(before, key=lambda call: call.end), True


def _first_head(heads: list[_Call], calls: list[_Call]) -> _Call:
    """Return the first fully connected layer; where a class token reaches that before any image, the one after it."""
    if heads[0].takes_news:
        return heads[0]
    later = [call for call in heads if call.takes_news]
    tokens = _end_of_tokens([call for call in calls if call.name])
    return next((call for call in later if call.start > tokens), later[-1] if later else heads[0])


def _end_of_tokens(calls: list[_Call]) -> int:
    """Return when the last tokens were given; a fully connected layer before that is a part of attention."""
    return max((call.end for call in calls if len(call.given) == 3), default=-1)


def _find_depths(before: list[_Call], moment: int) -> list[_Call]:
    """Choose up to three of the calls that ended before the split's moment."""
    stages = _without_last(_stage_ends(before), before)[-MAX_DEPTHS:]
    weighted = _weighted(before)
    if stages and 4 * sum(call.start < stages[-1].end for call in weighted) < len(weighted):
        stages = []  # a stem's, before the blocks of a transformer
    missing = MAX_DEPTHS - len(stages)
    if missing:
        stages += _evenly_spaced(_block_outputs(before, stages, moment, missing), missing)
    return sorted(stages, key=lambda call: call.end)


def _without_last(points: list[_Call], before: list[_Call]) -> list[_Call]:
    """Drop the last point: the features are it, pooled or flattened, unless layers with weights lie between.

    These are fully connected ones, or a convolution that shrinks the map to a single pixel.
    """
    if not points:
        return points
    after = [call for call in before if points[-1].end < call.start]
    tokens = _end_of_tokens(before)
    if any(_shrinks_to_pixel(call) or (_is_row_linear(call) and tokens < call.start) for call in after):
        return points
    return points[:-1]


def _stage_ends(before: list[_Call]) -> list[_Call]:
    """Return the last output at every spatial resolution, in the order of execution."""
    maps = [call for call in _without_excursions(before) if len(call.given) == 4 and math.prod(call.given[2:]) > 1]
    ends = []
    for resolution, last in {call.given[2:]: call for call in maps}.items():
        around = [outer for outer in before if _contains(outer, last)]
        if any(_layout(outer.taken) == _layout(outer.given) != resolution for outer in around):
            continue  # a map inside a block of tokens
        # Where the first layers of the next stage still run at this resolution, take what was handed to that stage.
        for outer in sorted(around, key=lambda call: call.start):
            inside = {call.given[2:] for call in maps if _contains(outer, call)}
            handed = [call for call in maps if call.end < outer.start and call.given[2:] == resolution]
            if _layout(outer.taken) == resolution and inside <= {resolution, _layout(outer.given)} and handed:
                last = handed[-1]
                break
        ends.append(last)
    return sorted(ends, key=lambda call: call.end)


def _without_excursions(before: list[_Call]) -> list[_Call]:
    """Leave out what lies inside a block that takes and gives maps of one other resolution.

    A gate's pooled map, or an attention matrix, may have the size of a stage by chance.
    """
    kept: list[_Call] = []
    around: list[_Call] = []
    for call in sorted(before, key=lambda call: call.start):
        around = [outer for outer in around if outer.end > call.start]
        layout = _layout(call.given)
        if not any(len(o.given) == 4 and _layout(o.taken) == _layout(o.given) != layout for o in around):
            kept.append(call)
        around.append(call)
    return sorted(kept, key=lambda call: call.end)


def _block_outputs(before: list[_Call], picked: list[_Call], moment: int, missing: int) -> list[_Call]:
    """Return the outputs of the repeated blocks that hold most of the network's weighted layers."""
    weighted = _weighted(before)
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


def _weighted(calls: list[_Call]) -> list[_Call]:
    return [call for call in calls if next(call.module.parameters(recurse=False), None) is not None]


def _is_candidate(call: _Call, calls: list[_Call]) -> bool:
    """Say whether a depth can be taken here."""
    return _has_features(call, calls) and call.name != FEATURES


def _has_features(call: _Call, calls: list[_Call]) -> bool:
    """Say whether an output has a row per image, differs between images, and is more than the images themselves."""
    shape = call.given
    return len(shape) in (2, 3, 4) and shape[0] == _ROWS and call.gives_news and shape != calls[-1].taken


def _is_row_linear(call: _Call) -> bool:
    return isinstance(call.module, nn.Linear) and len(call.taken) == 2 and call.taken[0] == _ROWS


def _shrinks_to_pixel(call: _Call) -> bool:
    return isinstance(call.module, _ConvNd) and math.prod(call.given[2:]) == 1 < math.prod(call.taken[2:])


def _contains(outer: _Call, inner: _Call) -> bool:
    return outer.start < inner.start and inner.end < outer.end


def _layout(shape: Shape) -> Shape:
    return shape[2:] if len(shape) == 4 else (-len(shape),)  # a resolution, or a mark for tokens and vectors


def _named_call(module: nn.Module, name: str, latest: Mapping[nn.Module, _Call]) -> _Call:
    found = latest.get(module_named(module, name))
    if found is None:
        raise SuspectModelError(f"layer {name!r} must run in a forward pass, it did not. Name another layer.")
    return found


def _check_shape(name: str, shape: Shape) -> None:
    if len(shape) not in (2, 3, 4) or shape[0] != _ROWS:
        raise SuspectModelError(
            f"layer {name!r} must give one row of 2 to 4 dimensions per image, got shape {shape} for {_ROWS} images. "
            "Name another layer."
        )
