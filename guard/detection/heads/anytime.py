"""Decision heads at several depths, trained together, so that an answer is at hand whenever time runs out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from guard.arrays import check_range, require
from guard.detection.heads.head_training import one_thread
from guard.errors import DataError, NotFittedError
from guard.types import AnyArray, Float32Array, FloatArray, IntArray

#: `adaptive`: inverse to each loss's running mean. `constant`: all the same. `linear`: as deep as the head is.
#: `last`: the deepest head alone, to compare with.
Weighting = Literal["adaptive", "constant", "linear", "last"]
_WEIGHTINGS = ("adaptive", "constant", "linear", "last")
_MEMORY = 0.99  # share of a running mean that stays at every step
_LAYERS = ("inputs", "state", "bias", "outputs", "offset")


@dataclass
class AnytimeHeads:
    """A chain of heads on features at L depths: each reads its own depth, and what the head before made of its.

    With features x_k, standardised, the state is s_k = ReLU(V_k x_k + U_k s_(k-1) + b_k) and the logits C_k s_k + c_k.
    The first k heads need the first k depths only, and cost what they cost. As all share states, they are trained
    together, on the sum of their cross-entropies l_k with weights B_k. `"adaptive"` weights are B_k = 1 / (running mean
    of l_k), scaled to a mean of 1, which minimises the geometric mean of the losses [1]_: early losses are larger by
    nature, and with equal weights would get most of the attention.

    Parameters
    ----------
    width : int
        Of the states.
    weighting : {"adaptive", "constant", "linear", "last"}
    epochs, batch_size : int
    learning_rate, weight_decay : float
        AdamW's; the rate falls along a cosine.
    seed : int
        The global generators are not touched.

    References
    ----------
    .. [1] Hu, Dey, Hebert, Bagnell (2017), Learning anytime predictions in neural networks via adaptive loss balancing
       (AdaLoss), arXiv 1708.06832, section 3 and equation 3.
    """

    width: int = 96
    weighting: Weighting = "adaptive"
    epochs: int = 30
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 1e-3
    seed: int = 0
    heads_: list[dict[str, Float32Array]] = field(default_factory=list, init=False, repr=False)

    def fit(self, features: Sequence[FloatArray], labels: IntArray, n_classes: int) -> Self:
        """Train on clean features.

        Parameters
        ----------
        features : sequence of L ndarray of shape (n, d_k)
            In the order in which they come to hand, not normalised.
        labels : ndarray of shape (n,), int
            True labels in [0, n_classes).
        n_classes : int

        Raises
        ------
        DataError
            If there is no depth, lengths do not agree, a value is not finite, a label is out of range, or the weighting
            is unknown.
        """
        if self.weighting not in _WEIGHTINGS:
            raise DataError(f"weighting must be one of {', '.join(_WEIGHTINGS)}, got {self.weighting!r}.")
        if (
            not features
            or len(labels) == 0
            or any(matrix.ndim != 2 or len(matrix) != len(labels) for matrix in features)
        ):
            shapes = [matrix.shape for matrix in features]
            raise DataError(f"features {shapes} must be one or more (n, d) of the length of the labels, {len(labels)}.")
        check_range(labels, n_classes)
        with np.errstate(invalid="ignore"):
            means = [matrix.mean(axis=0, dtype=np.float64) for matrix in features]
            spreads = [matrix.std(axis=0, dtype=np.float64) for matrix in features]
        if not all(np.isfinite(mean).all() for mean in means):  # both survive a mean
            raise DataError("features must be finite: a NaN or an infinity was found.")
        scales = [np.where(s > 1e-6 * max(float(s.max()), 1e-30), s, 1.0) for s in spreads]
        inputs = [
            torch.from_numpy(((matrix - mean) / scale).astype(np.float32))
            for matrix, mean, scale in zip(features, means, scales, strict=True)
        ]
        with one_thread():
            heads = self._train(inputs, torch.from_numpy(np.array(labels, dtype=np.int64)), n_classes)
        self.heads_ = []
        for head, mean, scale in zip(heads, means, scales, strict=True):
            arrays = {name: tensor.detach().numpy().astype(np.float64) for name, tensor in head.items()}
            arrays["inputs"] /= scale[:, None]  # standardisation, folded in
            arrays["bias"] -= mean @ arrays["inputs"]
            self.heads_.append({name: np.ascontiguousarray(a, dtype=np.float32) for name, a in arrays.items()})
        return self

    def _train(self, inputs: Sequence[Tensor], targets: Tensor, n_classes: int) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        heads = [
            self._fresh(matrix.shape[1], first=place == 0, n_classes=n_classes, generator=generator)
            for place, matrix in enumerate(inputs)
        ]
        parameters = [tensor.requires_grad_() for head in heads for tensor in head.values()]
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)
        steps = self.epochs * -(-len(targets) // self.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        means: Tensor | None = None
        for _ in range(self.epochs):
            for rows in torch.split(torch.randperm(len(targets), generator=generator), self.batch_size):
                logits = _forward([matrix[rows] for matrix in inputs], heads)
                losses = torch.stack([functional.cross_entropy(matrix, targets[rows]) for matrix in logits])
                now = losses.detach()
                means = now if means is None else _MEMORY * means + (1.0 - _MEMORY) * now
                loss = (self._weights(means) * losses).sum()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
        return heads

    def _fresh(self, n_features: int, *, first: bool, n_classes: int, generator: torch.Generator) -> dict[str, Tensor]:
        def drawn(fan_in: int, fan_out: int, gain: float) -> Tensor:
            bound = math.sqrt(gain / max(1, fan_in))
            return (torch.rand(fan_in, fan_out, generator=generator) * 2 - 1) * bound

        return {
            "inputs": drawn(n_features, self.width, 6.0 if first else 3.0),  # He; two sources share the variance
            "state": drawn(0 if first else self.width, self.width, 3.0),
            "bias": torch.zeros(self.width),
            "outputs": drawn(self.width, n_classes, 3.0),
            "offset": torch.zeros(n_classes),
        }

    def _weights(self, means: Tensor) -> Tensor:
        if self.weighting == "constant":
            return torch.ones_like(means)
        if self.weighting == "last":
            return torch.eye(len(means))[-1]
        weights: Tensor = torch.arange(1.0, len(means) + 1)
        if self.weighting == "adaptive":
            weights = means.clamp(min=1e-3).reciprocal()
        scaled: Tensor = weights * (len(means) / weights.sum())
        return scaled

    def answers(self, features: Sequence[FloatArray]) -> Iterator[Float32Array]:
        """Yield the logits of one head after the other, shape (n, n_classes); stop asking, and the rest costs nothing.

        Parameters
        ----------
        features : sequence of up to L ndarray of shape (n, d_k)
            The first depths, as many as are at hand.

        Raises
        ------
        NotFittedError
            If `fit` has not been called.
        DataError
            If there are more depths than in `fit`, or a width differs.
        """
        if not self.heads_:
            raise NotFittedError("AnytimeHeads is not fitted. Call fit(features, labels, n_classes) first.")
        if len(features) > len(self.heads_):
            raise DataError(f"there are {len(self.heads_)} heads, got features at {len(features)} depths.")
        state: Float32Array | None = None
        for place, (matrix, head) in enumerate(zip(features, self.heads_, strict=False)):
            if matrix.shape[1] != len(head["inputs"]):
                raise DataError(
                    f"features at depth {place} have {matrix.shape[1]} columns, fit saw {len(head['inputs'])}."
                    " Is the split layer the same?"
                )
            fresh: Float32Array = matrix.astype(np.float32, copy=False).dot(head["inputs"])
            fresh += head["bias"]
            if state is not None:
                fresh += state.dot(head["state"])
            state = np.maximum(fresh, 0, out=fresh)
            yield state.dot(head["outputs"]) + head["offset"]

    def logits(self, features: Sequence[FloatArray]) -> Float32Array:
        """Return the logits of the deepest head that the features reach, shape (n, n_classes)."""
        *_, deepest = self.answers(features)
        return deepest

    def state(self) -> dict[str, AnyArray]:
        """Return all heads as arrays."""
        return {f"{place}.{name}": array for place, head in enumerate(self.heads_) for name, array in head.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, AnyArray]) -> Self:
        """Return fitted heads from what `state` returned; DataError if their layers do not fit together."""
        heads = cls()
        places = sorted({int(name.partition(".")[0]) for name in state if name.partition(".")[0].isdecimal()})
        if not places or places != list(range(len(places))):
            raise DataError(f"heads must be numbered from 0 without a gap, got {places}.")
        width: int | None = None
        n_classes: int | None = None
        for place in places:
            before = 0 if width is None else width
            width = require(state, f"{place}.inputs", (None, width)).shape[1]
            require(state, f"{place}.state", (before, width))
            require(state, f"{place}.bias", (width,))
            n_classes = require(state, f"{place}.outputs", (width, n_classes)).shape[1]
            require(state, f"{place}.offset", (n_classes,))
            if not (state[f"{place}.inputs"].any() and state[f"{place}.outputs"].any()):
                raise DataError(f"head {place} must not be zero everywhere.")
        heads.heads_ = [
            {name: np.ascontiguousarray(state[f"{place}.{name}"], dtype=np.float32) for name in _LAYERS}
            for place in places
        ]
        return heads


def _forward(inputs: Sequence[Tensor], heads: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    logits: list[Tensor] = []
    state: Tensor | None = None
    for matrix, head in zip(inputs, heads, strict=True):
        fresh = torch.addmm(head["bias"], matrix, head["inputs"])
        state = torch.relu(fresh if state is None else fresh + state @ head["state"])
        logits.append(torch.addmm(head["offset"], state, head["outputs"]))
    return logits
