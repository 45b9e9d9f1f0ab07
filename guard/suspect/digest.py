"""The digest of a network: all that can change its answers and is no code, whatever file or device it comes from.

For ordinary networks, dense tensors in a state dict, it is the SHA-256 over their sorted names, dtypes, shapes and
little-endian bytes. What more there is, packed weights of quantised layers, buffers outside the state dict, extra
state, parametrisations and plain tensor attributes, follows after that, so that it changes no digest of a network
without it.
"""

from __future__ import annotations

import hashlib
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from guard.types import AnyArray

_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
_SCALARS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.Size, torch.device)
_MAX_DEPTH = 16


#: Of one attribute: its tensors and arrays, and how often each was changed in place.
Marks = list[tuple[weakref.ref[Any], int]]


class _Hash(Protocol):
    def update(self, content: Any, /) -> None: ...


def weights_digest(weights: nn.Module | Mapping[str, Any], attributes: Mapping[str, Any] | None = None) -> str:
    """Return the SHA-256 of the weights themselves, whatever file, device or memory layout they come in.

    Parameters
    ----------
    weights : Module or mapping of str to Tensor
        A module stands for its parameters, all its buffers, packed weights, extra state and parametrisations.
    attributes : mapping, optional
        Tensors outside of these by name, see `constant_attributes`.

    Returns
    -------
    digest : str
        64 hexadecimal digits.
    """
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    digest = hashlib.sha256()
    more: list[tuple[str, Any]] = []
    for name in sorted(state):
        value = state[name]
        if isinstance(value, Tensor) and _is_plain(value):
            digest.update(f"{name}\0".encode())
            _add_plain(digest, value)
        else:
            more.append((f"state\0{name}", value))
    if isinstance(weights, nn.Module):
        more += [(f"buffer\0{name}", value) for name, value in weights.named_buffers() if name not in state]
        more += _parametrisations(weights)
    more += [(f"attribute\0{name}", value) for name, value in (attributes or {}).items()]
    for name, value in sorted(more, key=lambda entry: entry[0]):
        digest.update(f"\0{name}\0".encode())
        _add(digest, value)
    return digest.hexdigest()


def tensor_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the tensors and arrays that the modules keep as plain attributes, alone or in lists and dictionaries.

    Those that were computed from parameters, as by `torch.nn.utils.weight_norm`, are left out.
    """
    return {
        f"{name}.{key}".lstrip("."): value
        for name, inner in module.named_modules()
        for key, value in vars(inner).items()
        if key not in _MODULE_ATTRIBUTES and (held := list(_held(value))) and all(map(_is_constant, held))
    }


def attribute_marks(module: nn.Module) -> dict[str, Marks]:
    """Return which objects the attributes are, and their versions, for `constant_attributes` later."""
    return {
        name: [(weakref.ref(held), _version(held)) for held in _held(value)]
        for name, value in tensor_attributes(module).items()
    }


def constant_attributes(module: nn.Module, marks: Mapping[str, Marks]) -> dict[str, Any]:
    """Return those attributes that are still what was marked: caches of a forward pass are not."""
    return {
        name: value
        for name, value in tensor_attributes(module).items()
        if name in marks and _is_unchanged(list(_held(value)), marks[name])
    }


def _is_unchanged(held: list[Tensor | AnyArray], marks: Marks) -> bool:
    return len(held) == len(marks) and all(
        mark() is value and version == _version(value) for value, (mark, version) in zip(held, marks, strict=True)
    )


def _version(value: Tensor | AnyArray) -> int:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _held(value: Any) -> Iterator[Tensor | AnyArray]:
    inner: Iterable[Any] = ()
    if isinstance(value, Tensor | np.ndarray):
        inner = [value]
    elif isinstance(value, list | tuple):
        inner = value
    elif isinstance(value, Mapping):
        inner = value.values()
    return (held for held in inner if isinstance(held, Tensor | np.ndarray))


def _is_constant(value: Tensor | AnyArray) -> bool:
    return not (isinstance(value, Tensor) and value.requires_grad)


def _parametrisations(module: nn.Module) -> list[tuple[str, Any]]:
    """Return class and settings of every parametrisation: the same parameters give other weights under another one."""
    return [
        (f"parametrisation\0{name}.{place}", [type(step).__module__, type(step).__qualname__, _settings(step)])
        for name, inner in module.named_modules()
        if isinstance(inner, ParametrizationList)
        for place, step in enumerate(inner)
    ]


def _settings(module: nn.Module) -> dict[str, Any]:
    values = vars(module).items()
    return {key: value for key, value in values if key not in _MODULE_ATTRIBUTES and isinstance(value, _SCALARS)}


def _is_plain(tensor: Tensor) -> bool:
    return (
        tensor.layout is torch.strided and not tensor.is_quantized and not hasattr(type(tensor), "__tensor_flatten__")
    )


def _add_plain(digest: _Hash, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    content = flat.view(torch.uint8).numpy()  # shares memory: no copy of a contiguous CPU tensor
    if sys.byteorder == "big" and flat.itemsize > 1:
        content = content.reshape(-1, flat.itemsize)[:, ::-1].copy()
    digest.update(content.data)


def _add(digest: _Hash, value: Any, depth: int = 0) -> None:
    """Add any value by its kind and content, never by its address."""
    digest.update(f"{type(value).__module__}.{type(value).__qualname__}\0".encode())
    if isinstance(value, _SCALARS):
        digest.update(f"{value!r}\0".encode())
    elif isinstance(value, Tensor):
        _add_tensor(digest, value, depth)
    elif isinstance(value, np.ndarray) and value.dtype != object:
        _add_plain(digest, torch.from_numpy(np.ascontiguousarray(value)))
    elif depth < _MAX_DEPTH:
        for item in _items(value):
            _add(digest, item, depth + 1)


def _add_tensor(digest: _Hash, tensor: Tensor, depth: int) -> None:
    if tensor.is_quantized:
        _add(digest, [tensor.int_repr(), str(tensor.qscheme()), _scales(tensor)], depth + 1)
    elif hasattr(type(tensor), "__tensor_flatten__"):  # a wrapper of other tensors, as torchao's
        names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        _add(digest, [[getattr(tensor, name) for name in names], context], depth + 1)
    else:
        _add_plain(digest, tensor if tensor.layout is torch.strided else tensor.to_dense())


def _scales(tensor: Tensor) -> list[Any]:
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return [tensor.q_scale(), tensor.q_zero_point()]
    return [tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points(), tensor.q_per_channel_axis()]


def _items(value: Any) -> Iterable[Any]:
    """Return what an object consists of, in an order of its own."""
    if isinstance(value, Mapping):
        return sorted(value.items(), key=lambda item: str(item[0]))
    if isinstance(value, list | tuple):
        return [len(value), *value]
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, torch.ScriptObject):  # packed weights
        return [value.__getstate__()]
    return sorted(vars(value).items()) if hasattr(value, "__dict__") else ()
