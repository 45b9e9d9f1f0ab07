"""Which part of what a network returns are its logits, and how others are put in their place.

A place in the output is written as a path, keys, fields and positions joined by dots (`"1"`, `"heads.class"`); the
empty path means the output itself, its field `logits`, or the first of a tuple or list. A network with one output
number is a classifier of two classes: `":one-logit"` or `":one-probability"` after the path says what the number is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from guard.errors import SuspectModelError
from guard.suspect.split_points import model_input
from guard.types import Float32Array, IntArray

ONE_LOGIT = ":one-logit"
ONE_PROBABILITY = ":one-probability"
#: Images on which outputs are compared, spread over all that are given, and images per forward pass.
_COMPARED = 128
_BATCH = 32
_MAX_DEPTH = 4
_ATTRIBUTE = "_backdoor_guard_output"
#: From this share of rows with two or more outputs above 1/2 on, probabilities are of labels that do not exclude
#: each other.
_MULTI_LABEL_SHARE = 0.1
#: Of the sigmoids of logits, this share is below 0.1 or above 0.9 where labels were learned each by itself: seen were
#: 0.95 to 1.0. Of 53 networks that were trained with cross-entropy, whose logits are often positive, 0.45 to 0.90.
_DECIDED, _DECIDED_SHARE = 2.1972246, 0.93  # log(0.9 / 0.1)


@dataclass(frozen=True, slots=True)
class _Leaf:
    """One tensor of the output with a row per image, read as logits of shape (n, k)."""

    path: str
    kind: str
    logits: Tensor

    @property
    def place(self) -> str:
        return self.path + self.kind

    def __str__(self) -> str:
        width = "1 number" if self.kind else f"{self.logits.shape[1]} numbers"
        return f"{self.path!r} ({width})" if self.path else f"the output itself ({width})"


def logits_of(output: Any, place: str = "") -> Tensor:
    """Return the logits, (n, n_classes), of what a classifier returned.

    Parameters
    ----------
    output : Tensor, or container of tensors
    place : str
        Where in it the logits are, see the module.

    Raises
    ------
    SuspectModelError
        If there are none of that shape.
    """
    found, kind = _at(output, place)
    if isinstance(found, Tensor) and kind and found.ndim in (1, 2) and found.numel() == len(found):
        return _two_classes(found, kind)
    if not isinstance(found, Tensor) or found.ndim != 2:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(output).__name__
        raise SuspectModelError(
            f"the suspect model must return logits of shape (n, n_classes), got {got}. Wrap it in a module that does, "
            "or name the part of its output with guard fit --output (elsewhere --logits; in Python, output)."
        )
    return found


def with_logits(output: Any, logits: Tensor, place: str = "") -> Any:
    """Return the output with other logits, in the same container; one number per row where it was one."""
    found, kind = _at(output, place)
    if kind:
        margin = (logits[:, 1] - logits[:, 0]).to(found.dtype).reshape(found.shape)
        number = margin if kind == ONE_LOGIT else margin.sigmoid()
        changed = (logits != _two_classes(found, kind)).any(1).reshape(found.shape)
        logits = torch.where(changed, number, found)  # the others to the last bit
    return _replaced(output, _path(output, place), logits)


def output_place(module: nn.Module) -> str:
    """Return where a suspect model, or a copy of one, has its logits; empty where nothing else is known."""
    return getattr(module, _ATTRIBUTE, "")


def set_output_place(module: nn.Module, place: str) -> None:
    """Note on the module where its logits are, so that copies of it know, too."""
    if place != output_place(module):
        setattr(module, _ATTRIBUTE, place)


def find_output(
    module: nn.Module, images: Tensor | Float32Array, labels: IntArray | None = None, named: str | None = None
) -> str:
    """Find the logits in what a module returns: as wide as there are classes, and right on clean images.

    Parameters
    ----------
    module : Module
        In eval mode.
    images : ndarray or Tensor of shape (n, channels, height, width), float32
    labels : ndarray of shape (n,), int, optional
        Their true labels. Without them only an output that leaves no choice is found.
    named : str, optional
        The path that the user gave.

    Returns
    -------
    place : str
        See the module.

    Raises
    ------
    SuspectModelError
        If nothing in the output can be logits, several parts can, or the labels do not exclude each other.
    """
    if labels is not None and np.ndim(labels) != 1:
        raise _multi_label(f"the labels have shape {np.shape(labels)}")
    kind = getattr(getattr(module, "config", None), "problem_type", None)  # transformers
    if kind == "multi_label_classification":
        raise _multi_label(f"its configuration says {kind}")
    first = _run(module, images[:2])
    usual = _path(first, "")
    if named is None and (isinstance(first, Tensor) or usual == ["logits"]) and _is_usual(_at(first, "")[0]):
        return ""
    rows = np.unique(np.linspace(0, len(images) - 1, _COMPARED).astype(np.int64))
    outputs = [_run(module, images[part]) for part in np.array_split(rows, -(-len(rows) // _BATCH))]
    chosen_labels = None if labels is None else torch.as_tensor(np.asarray(labels)[rows])
    leaves = _leaves(outputs, len(rows), chosen_labels)
    if named is not None:
        leaf = next((leaf for leaf in leaves if leaf.path == named), None)
        if leaf is None:
            raise SuspectModelError(
                f"the suspect model's output has no {named!r} with one row per image: it has {_listed(leaves)}. "
                "Name one of these."
            )
    else:
        leaf = _chosen(leaves, ".".join(usual), chosen_labels, first)
    _check_exclusive(leaf.logits)
    return "" if leaf.place == ".".join(usual) else leaf.place


def share_of_several_labels(logits: Float32Array) -> float:
    """Return on which share of the images two or more labels seem to be answered at once, in [0, 1].

    0 unless it is at least a tenth, and the logits, shape (n, n_classes), are decided one by one as those of a
    multi-label classifier are. A network that was trained with cross-entropy, and is very sure, can look like one.
    """
    several = float(((logits > 0).sum(axis=1) > 1).mean())
    is_decided = float((np.abs(logits) > _DECIDED).mean()) >= _DECIDED_SHARE
    return several if is_decided and several >= _MULTI_LABEL_SHARE else 0.0


def _is_usual(value: Any) -> bool:
    """Say whether this is plainly logits: several per row, and no independent probabilities."""
    return isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] > 1 and not _are_independent(value)


def _are_independent(values: Tensor) -> bool:
    """Say whether these are probabilities that do not sum to one."""
    inside = bool(((values >= 0) & (values <= 1)).all())
    return inside and bool(((values.float().sum(1) - 1).abs() > 1e-2).any())


def _check_exclusive(logits: Tensor) -> None:
    several = float(((logits > 0.5).sum(1) > 1).float().mean())
    if _are_independent(logits) and several > _MULTI_LABEL_SHARE:
        raise _multi_label(f"two or more of its {logits.shape[1]} probabilities exceed 0.5 on {100 * several:.0f} %")


def _multi_label(why: str) -> SuspectModelError:
    return SuspectModelError(
        f"the suspect model is a multi-label classifier, and a guard needs one label per image: {why}. "
        "Guard each label by itself: a module that returns one logit is guarded as two classes."
    )


def _run(module: nn.Module, images: Tensor | Float32Array) -> Any:
    with torch.no_grad():
        return module(model_input(module, images))


def _chosen(leaves: list[_Leaf], usual: str, labels: Tensor | None, output: Any) -> _Leaf:
    """Return the leaf that is the logits: the only one, or the one that is right on clean images."""
    if not leaves:
        logits_of(output)  # says what there is instead
        raise SuspectModelError("the suspect model must return one row of logits per image.")
    if labels is None:
        usable = [leaf for leaf in leaves if leaf.path == usual] or leaves
        if len(usable) > 1:
            raise _ask(leaves)
        return usable[0]
    wanted = int(labels.max()) + 1
    usable = [leaf for leaf in leaves if leaf.logits.shape[1] >= wanted]
    if not usable:
        raise SuspectModelError(
            f"the suspect model must return logits of {wanted} or more classes, as the labels have: "
            f"it returns {_listed(leaves)}. Are these its labels?"
        )
    right = {leaf.place: float((leaf.logits.argmax(1) == labels).float().mean()) for leaf in usable}
    best = max(usable, key=lambda leaf: right[leaf.place])
    margin = 1.5 / len(labels) ** 0.5  # three standard deviations of a share
    near = [
        leaf
        for leaf in usable
        if right[leaf.place] > right[best.place] - margin
        and not torch.equal(leaf.logits.argmax(1), best.logits.argmax(1))
    ]
    same = [leaf for leaf in usable if torch.equal(leaf.logits.argmax(1), best.logits.argmax(1))]
    if near:  # as good, with other answers: the width must tell, or the usual place
        same = [leaf for leaf in [*same, *near] if leaf.logits.shape[1] == wanted]
        if not same or (len(same) > 1 and all(leaf.path != usual for leaf in same)):
            raise _ask(usable, right)
    return min(same, key=lambda leaf: (leaf.path != usual, _is_softmax(leaf.logits)))


def _is_softmax(values: Tensor) -> bool:
    return bool((values >= 0).all()) and bool(((values.float().sum(1) - 1).abs() < 1e-3).all())


def _ask(leaves: list[_Leaf], right: Mapping[str, float] | None = None) -> SuspectModelError:
    return SuspectModelError(
        f"the suspect model returns several tensors that may be its logits: {_listed(leaves, right)}. "
        "Name the logits with guard fit --output (elsewhere --logits; in Python, output)."
    )


def _listed(leaves: list[_Leaf], right: Mapping[str, float] | None = None) -> str:
    shares = right or {}
    return (
        ", ".join(
            f"{leaf}{f', {100 * shares[leaf.place]:.0f} % right' if leaf.place in shares else ''}"
            for leaf in leaves[:8]
        )
        or "no such tensor"
    )


def _leaves(outputs: list[Any], n_rows: int, labels: Tensor | None) -> list[_Leaf]:
    """Return every tensor with one row per image, of several batches, read as logits."""
    parts = [dict(_tensors(output, ())) for output in outputs]
    leaves = []
    for path in parts[0]:
        tensors = [part[path].detach().float().cpu() for part in parts if path in part]
        if len(tensors) < len(parts) or {tensor.ndim for tensor in tensors} - {1, 2}:
            continue
        values = torch.cat([tensor.reshape(len(tensor), -1) for tensor in tensors])
        if len(values) != n_rows:
            continue
        kind = _kind(values, labels) if values.shape[1] == 1 else ""
        leaves.append(_Leaf(path, kind, _two_classes(values, kind) if kind else values))
    return leaves


def _kind(numbers: Tensor, labels: Tensor | None) -> str:
    """Say what one number per row is: a logit, or the probability of class 1."""
    if not bool(((numbers >= 0) & (numbers <= 1)).all()):
        return ONE_LOGIT
    if labels is not None:
        logit, probability = (((numbers[:, 0] > cut) == (labels == 1)).float().mean() for cut in (0.0, 0.5))
        return ONE_LOGIT if logit > probability else ONE_PROBABILITY
    return ONE_PROBABILITY


def _two_classes(numbers: Tensor, kind: str) -> Tensor:
    """Return the logits (0, z) of two classes, shape (n, 2), whose softmax is the sigmoid of z."""
    column = numbers.reshape(-1, 1)
    logit = column if kind == ONE_LOGIT else torch.logit(column.float(), eps=1e-7)
    return torch.cat([torch.zeros_like(logit), logit], 1)


def _tensors(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.ndim > 0:
            yield ".".join(path), value
    elif len(path) < _MAX_DEPTH:
        for key, inner in _children(value):
            yield from _tensors(inner, (*path, key))


def _children(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(str(key), inner) for key, inner in value.items()]
    if hasattr(value, "_fields"):  # a named tuple
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, tuple | list):
        return [(str(place), inner) for place, inner in enumerate(value)]
    return list(getattr(value, "__dict__", {}).items())


def _path(output: Any, place: str) -> list[str]:
    path = place.partition(":")[0]
    if path:
        return path.split(".")
    if isinstance(output, Tensor):
        return []
    if getattr(output, "logits", None) is not None or isinstance(output, Mapping):
        return ["logits"]
    if hasattr(output, "_fields"):
        return [output._fields[0]]
    return ["0"] if isinstance(output, tuple | list) else []


def _at(output: Any, place: str) -> tuple[Any, str]:
    """Return what is at a place of the output, None if nothing is, and the kind of one number."""
    found = output
    for key in _path(output, place):
        found = dict(_children(found)).get(key, getattr(found, key, None))
    return found, "".join(place.partition(":")[1:])


def _replaced(value: Any, path: list[str], tensor: Tensor) -> Any:
    if not path:
        return tensor
    key, *rest = path
    inner = _replaced(dict(_children(value)).get(key, getattr(value, key, None)), rest, tensor)
    if hasattr(value, "_replace"):
        return value._replace(**{key: inner})
    if isinstance(value, tuple | list):
        return type(value)(inner if place == int(key) else item for place, item in enumerate(value))
    changed = copy.copy(value)
    if isinstance(changed, Mapping):
        changed[next(known for known in changed if str(known) == key)] = inner  # type: ignore[index]
    else:
        setattr(changed, key, inner)
    return changed
