"""The replacement decision head: a small classifier on the suspect model's features, trained on right labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Self

import numpy as np
import torch

from guard.arrays import check_range, require
from guard.detection.heads.head_training import TrainingPlan, train_heads
from guard.errors import DataError, NotFittedError
from guard.types import AnyArray, Float32Array, FloatArray, IntArray

_LAYERS = ("weight_1", "bias_1", "weight_2", "bias_2", "weight_3", "bias_3")


@dataclass
class DecisionHead:
    """Classifier with two hidden layers on features, g in the Fusion paper (arXiv 2011.02526, "New decision function").

    Trained with cross-entropy and Adam; a stratified tenth of the data decides when to stop. Inputs are standardised;
    the standardisation is folded into the first layer afterwards, so that a fitted head is three matrices.

    Parameters
    ----------
    max_epochs, patience : int
        Training ends after `max_epochs`, or `patience` epochs without a lower hold-out loss.
    batch_size : int
        Rows per step.
    learning_rate, weight_decay : float
        Adam's; no unit.
    noise_std : float
        Gaussian noise on the standardised inputs while training, in standard deviations of each feature; 0 = none.
    stops_early : bool
        False: all epochs run, however many rows are held out. Heads that are compared with each other must end alike.
    seed : int
        Seeds initial weights, batches, hold-out and noise; the global generators are not touched.
    """

    max_epochs: int = 60
    patience: int = 4
    batch_size: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    noise_std: float = 0.0
    stops_early: bool = True
    seed: int = 0
    layers_: dict[str, Float32Array] = field(default_factory=dict, init=False, repr=False)

    def fit(self, features: FloatArray, labels: IntArray, n_classes: int) -> Self:
        """Train on clean features.

        Parameters
        ----------
        features : ndarray of shape (n, d)
            Features at one depth, not normalised.
        labels : ndarray of shape (n,), int
            True labels in [0, n_classes).
        n_classes : int
            Width of the output.

        Raises
        ------
        DataError
            If shapes do not agree, a value is not finite, or a label is out of range.
        """
        (fitted,) = self.fit_parts(features, labels, n_classes, [np.arange(len(labels))])
        self.layers_ = fitted.layers_
        return self

    def fit_parts(
        self, features: FloatArray, labels: IntArray, n_classes: int, parts: Sequence[IntArray]
    ) -> list[Self]:
        """Return heads with these settings, each trained on some rows: what `fit` gives but for rounding, in less time.

        Parameters
        ----------
        features, labels, n_classes
            As of `fit`; rows that no part names may be anything.
        parts : sequence of ndarray of int64
            Rows that each head learns from, in this order.

        Raises
        ------
        DataError
            As `fit` does.
        """
        features = features.astype(np.float32, copy=False)
        if features.ndim != 2 or len(features) != len(labels) or not all(len(rows) for rows in parts):
            raise DataError(
                f"features {features.shape} and labels {np.shape(labels)} must have the same, non-zero length."
            )
        for rows in parts:
            check_range(labels[rows], n_classes)
        standards = [_standard(features[rows]) for rows in parts]
        settings = {setting.name: getattr(self, setting.name) for setting in fields(self) if setting.init}
        trained = train_heads(
            torch.from_numpy(np.require(features, requirements="W")),
            torch.from_numpy(np.array(labels, dtype=np.int64)),
            n_classes,
            [torch.from_numpy(rows) for rows in parts],
            [(torch.from_numpy(mean), torch.from_numpy(scale)) for mean, scale in standards],
            TrainingPlan(**settings),
        )
        heads = []
        for weights, (mean, scale) in zip(trained, standards, strict=True):
            arrays = [tensor.numpy() for tensor in weights]
            arrays[0] = arrays[0] / scale[:, None]  # (d, h1); standardisation, folded in
            arrays[1] = arrays[1] - mean @ arrays[0]
            arrays[4] = arrays[4].T
            head = type(self)(**settings)
            head.layers_ = {
                name: np.ascontiguousarray(array, dtype=np.float32) for name, array in zip(_LAYERS, arrays, strict=True)
            }
            heads.append(head)
        return heads

    def logits(self, features: FloatArray) -> Float32Array:
        """Return the head's own logits, shape (n, n_classes), float32.

        Raises
        ------
        NotFittedError
            If `fit` has not been called.
        DataError
            If the number of columns differs from `fit`.
        """
        layers = self.layers_
        if not layers:
            raise NotFittedError("DecisionHead is not fitted. Call fit(features, labels, n_classes) before logits().")
        weight = layers["weight_1"]
        if features.shape[1] != weight.shape[0]:
            raise DataError(
                f"features have {features.shape[1]} columns, fit saw {weight.shape[0]}. Is the split layer the same?"
            )
        # dot, not @: the same product, with half the overhead on one row
        hidden: Float32Array = features.astype(np.float32, copy=False).dot(weight)
        hidden += layers["bias_1"]
        np.maximum(hidden, 0, out=hidden)
        hidden = hidden.dot(layers["weight_2"])
        hidden += layers["bias_2"]
        np.maximum(hidden, 0, out=hidden)
        hidden = hidden.dot(layers["weight_3"])
        hidden += layers["bias_3"]
        return hidden

    def state(self) -> dict[str, AnyArray]:
        """Return the three layers as arrays."""
        return dict(self.layers_)

    @classmethod
    def from_state(cls, state: Mapping[str, AnyArray]) -> Self:
        """Return a fitted head from what `state` returned; DataError if its layers do not fit together."""
        head = cls()
        width: int | None = None
        for weight, bias in zip(_LAYERS[::2], _LAYERS[1::2], strict=True):
            width = require(state, weight, (width, None)).shape[1]
            require(state, bias, (width,))
            if not state[weight].any():
                raise DataError(f"array {weight} must not be zero everywhere.")
        head.layers_ = {name: np.ascontiguousarray(state[name], dtype=np.float32) for name in _LAYERS}
        return head


def _standard(features: Float32Array) -> tuple[Float32Array, Float32Array]:
    """Return mean and scale of each column, shape (d,); DataError if a value is not finite."""
    with np.errstate(invalid="ignore"):
        mean, spread = features.mean(axis=0), features.std(axis=0)
    if not np.isfinite(mean).all():  # both survive a mean
        raise DataError("features must be finite: a NaN or an infinity was found.")
    return mean, np.where(spread > 1e-6 * max(float(spread.max()), 1e-30), spread, 1.0).astype(np.float32)
