"""Checkpoints as trainers write them: the one mapping of a file's tensors onto the architecture's names.

Trainers nest the weights under a key of their choice, beside an optimizer and numbers, and wrappers put prefixes
before all names or inside some. Every mapping in the file, below every prefix, is tried against the names and shapes
of the architecture. Exactly one set of tensors must fit; which, is never guessed.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from guard.errors import SuspectModelError
from guard.suspect.weights import JOIN, check_dense, read_weights

#: `state_key` of the tensors that lie at the top of the file.
TOP_LEVEL = "."
_MAX_DEPTH = 8
_MOST_LISTED = 8

#: Parts of names that wrappers add before or inside a name: those that only a wrapper writes, and those that may be
#: an attribute of the architecture, too.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_ATTRIBUTES = _WRAPPERS | {"model", "net", "network", "ema"}
#: What profilers, averages and training loops leave beside the weights.
_COUNTERS = re.compile(
    r"(.*\.)?(n_averaged|total_ops|total_params|num_batches_tracked)|(\w+_)?(loss|acc\d*|accuracy|epoch|steps?|lr)\d*"
)
#: Name of one of several files that hold the weights together.
_PART = re.compile(r"\d+-of-\d+")

_Rename = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class _Candidate:
    """Tensors of one mapping of the file, below one prefix, by the names that the architecture would give them."""

    place: str
    state: dict[str, Any]
    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]

    @property
    def fits(self) -> bool:
        return not (self.missing or self.unexpected or self.misshapen)

    @property
    def fault(self) -> str:
        kinds = (("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", self.misshapen))
        return "; ".join(
            f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for kind, names in kinds
            if names
        )


def load_weights(
    module: nn.Module, path: str | Path, *, state_key: str | None = None, architecture: str = "the architecture"
) -> None:
    """Fill a module with the one set of tensors of an untrusted file that fits it; nothing of the file is executed.

    Parameters
    ----------
    module : Module
        Built from code that is trusted; it may have lazy layers.
    path : str or Path
        safetensors, or what `torch.save` wrote: a state dict, or one nested in dictionaries and lists beside other
        entries. Prefixes of wrappers, counters of profilers and names dropped for tied weights are seen to.
    state_key : str, optional
        Where the tensors lie, where several sets fit: the keys that lead there and the prefix, joined by dots; `"."`
        for the top of the file.
    architecture : str
        What messages call the module.

    Raises
    ------
    UnsafeWeightsError
        If loading the file could run code.
    SuspectModelError
        If the file is missing or damaged, no set of its tensors fits, or several do.
    """
    expected = _Architecture(module)
    candidates = [
        candidate
        for keys, mapping in _mappings(read_weights(path), (), set())
        for candidate in _candidates(expected, keys, mapping)
    ]
    chosen = _chosen(candidates, str(path), architecture, state_key)
    for name, value in chosen.state.items():
        if isinstance(value, Tensor):
            check_dense(str(path), name, value)
            if name in expected.parameters and _holds_nan(value):
                raise SuspectModelError(
                    f"weights file {path}: entry {name!r} holds NaN, so the network cannot answer. Take a checkpoint "
                    "from before its training went wrong, or fetch the file again."
                )
    state = OrderedDict(expected.complete(chosen.state))
    state._metadata = expected.versions  # type: ignore[attr-defined]
    try:
        module.load_state_dict(state)
    except Exception as error:  # a layer that reads its entries in its own way, as quantised ones do
        reason = " ".join(str(error).split())[:200]
        raise SuspectModelError(
            f"weights file {path} does not fit {architecture}: {reason}. Is it the same architecture?"
        ) from error


class _Architecture:
    """What a module's state dict must hold."""

    def __init__(self, module: nn.Module) -> None:
        state = module.state_dict()
        self.state: dict[str, Any] = dict(state)
        self.versions = getattr(state, "_metadata", None)
        self.parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        tensors = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
        groups: dict[int, list[str]] = {}
        for name, tensor in tensors:
            if name in self.state:
                groups.setdefault(id(tensor), []).append(name)
        first = next(iter(self.state), "")
        prefixes = [first[: dot.end()] for dot in re.finditer(r"\.", first)]
        self._shared_prefix = max((p for p in prefixes if all(name.startswith(p) for name in self.state)), default="")
        self._tied = {name: group for group in groups.values() for name in group}

    def names_of(self, name: str) -> list[str]:
        """Return all names of a tensor; several where layers share it."""
        return self._tied.get(name, [name])

    def without_shared_prefix(self, name: str) -> str:
        """Return a name without the part that all names begin with: the file may be of the network inside."""
        return name.removeprefix(self._shared_prefix)

    def complete(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Add what a sound file may leave out: counters of old batch norms, and tied tensors beyond the first."""
        found = {}
        for name, default in self.state.items():
            stored = next((other for other in (name, *self.names_of(name)) if other in state), None)
            found[name] = default if stored is None else state[stored]
        return found

    def compare(self, place: str, state: Mapping[str, Any]) -> _Candidate:
        """Hold tensors against the names and shapes that are wanted."""
        kept = {name: value for name, value in state.items() if name in self.state or not _COUNTERS.fullmatch(name)}
        missing = [
            name
            for name in self.state
            if not any(other in kept for other in self.names_of(name)) and not name.endswith("num_batches_tracked")
        ]
        misshapen = []
        for name in kept.keys() & self.state.keys():
            wanted, got = self.state[name], kept[name]
            if not isinstance(wanted, Tensor) or is_lazy(wanted):
                continue
            if not isinstance(got, Tensor):
                misshapen.append(f"{name} {type(got).__name__} instead of a tensor")
            elif got.shape != wanted.shape:
                misshapen.append(f"{name} {tuple(got.shape)} instead of {tuple(wanted.shape)}")
        unexpected = [name for name, value in kept.items() if name not in self.state and isinstance(value, Tensor)]
        return _Candidate(place, kept, missing, unexpected, sorted(misshapen))


def _mappings(content: Any, keys: tuple[str, ...], seen: set[int]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yield every mapping in a file that holds a named tensor, with the keys that lead to it, outermost first."""
    if id(content) in seen or len(keys) > _MAX_DEPTH:  # a pickle may hold itself
        return
    seen.add(id(content))
    if isinstance(content, Mapping):
        named = {name: value for name, value in content.items() if isinstance(name, str)}
        if any(isinstance(value, Tensor) for value in named.values()):
            yield keys, named
        inner = content.items()
    elif isinstance(content, list | tuple):
        inner = enumerate(content)  # type: ignore[assignment]
    else:
        return
    for key, value in inner:
        yield from _mappings(value, (*keys, str(key)), seen)


def _candidates(expected: _Architecture, keys: tuple[str, ...], mapping: dict[str, Any]) -> list[_Candidate]:
    """Return those that fit of the parts of one mapping, under the least renaming; the nearest one if none does."""
    tried: list[_Candidate] = []
    same: list[_Rename] = [str, _without(_WRAPPERS), _without(_ATTRIBUTES)]
    for rename_wanted, rename_found in zip([*same, expected.without_shared_prefix], [*same, same[0]], strict=True):
        wanted = {rename_wanted(name): name for name in expected.state}
        found = {rename_found(name): value for name, value in mapping.items()}
        if len(wanted) < len(expected.state) or len(found) < len(mapping):
            continue  # two names became the same
        parts = [_part(expected, wanted, found, keys, prefix) for prefix in _prefixes(expected, wanted, found)]
        if fitting := [part for part in parts if part.fits]:
            return fitting
        tried += parts
    return [min(tried, key=_distance)] if tried else []


def _prefixes(expected: _Architecture, wanted: Mapping[str, str], found: Mapping[str, Any]) -> list[str]:
    """Return the prefixes below which the last of the architecture's tensors is found; always the empty one, too."""
    renamed = {name: short for short, name in wanted.items()}
    last = [name for name in expected.state if not _COUNTERS.fullmatch(name)][-1:]
    anchors = [renamed[other] for name in last for other in expected.names_of(name)]
    ends = [name[: -len(anchor)] for anchor in anchors for name in found if name.endswith("." + anchor)]
    return list(dict.fromkeys(["", *ends]))


def _part(
    expected: _Architecture, wanted: Mapping[str, str], found: Mapping[str, Any], keys: tuple[str, ...], prefix: str
) -> _Candidate:
    below = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
    place = ".".join(filter(None, (*keys, prefix.rstrip(".")))) or TOP_LEVEL
    return expected.compare(place, {wanted.get(name, name): value for name, value in below.items()})


def _without(parts: frozenset[str]) -> _Rename:
    return lambda name: ".".join(part for part in name.split(".") if part not in parts)


def _chosen(candidates: list[_Candidate], path: str, architecture: str, state_key: str | None) -> _Candidate:
    """Return the one candidate that fits.

    Raises
    ------
    SuspectModelError
        If none does, or several that differ.
    """
    if not candidates:
        raise SuspectModelError(f"weights file {path} must hold named tensors, it has none. Save model.state_dict().")
    if state_key is not None:
        named = [candidate for candidate in candidates if candidate.place == state_key]
        if not named:
            raise SuspectModelError(
                f"weights file {path} has no tensors for {architecture} under the state key {state_key!r}. "
                f"Name one of {_listed(candidates)}."
            )
        candidates = named
    fitting = [candidate for candidate in candidates if candidate.fits]
    if not fitting:
        nearest = min(candidates, key=_distance)
        where = "" if nearest.place == TOP_LEVEL else f" (nearest is {nearest.place!r})"
        others = f" Tensors were found under {_listed(candidates)}." if len(candidates) > 1 else ""
        raise SuspectModelError(
            f"weights file {path} does not fit {architecture}{where}: {nearest.fault}. "
            f"{JOIN if _PART.search(path) else 'Is it the same architecture and number of classes?'}{others}"
        )
    if any(not _are_equal(fitting[0].state, other.state) for other in fitting[1:]):
        raise SuspectModelError(
            f"weights file {path} has {len(fitting)} sets of tensors that fit {architecture}: {_listed(fitting)}. "
            "Name the one that is served with --state-key (in Python, state_key)."
        )
    return fitting[0]


def _holds_nan(value: Tensor) -> bool:
    is_readable = value.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return is_readable and bool(value.isnan().any())


def _distance(candidate: _Candidate) -> int:
    return len(candidate.missing) + len(candidate.unexpected) + len(candidate.misshapen)


def _listed(candidates: list[_Candidate]) -> str:
    places = list(dict.fromkeys(repr(candidate.place[:80]) for candidate in candidates))
    return ", ".join(places[:_MOST_LISTED]) + (
        f" and {len(places) - _MOST_LISTED} more" if len(places) > _MOST_LISTED else ""
    )


def _are_equal(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    return left.keys() == right.keys() and all(
        value is right[name]
        or (isinstance(value, Tensor) and isinstance(right[name], Tensor) and torch.equal(value, right[name]))
        for name, value in left.items()
    )
