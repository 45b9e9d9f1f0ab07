"""Decision heads that several guards would train alike, trained once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import numpy as np

from guard.detection.heads.decision_head import DecisionHead
from guard.types import Float32Array, FloatArray, IntArray


@contextmanager
def trained_once() -> Iterator[None]:
    """While open, a head takes over what an equal one has learned from equal data.

    Both modes train the same head on the same features in every fold: a fifth of what a pair of guards costs.
    """
    known: dict[tuple[Any, ...], dict[str, Float32Array]] = {}
    train = DecisionHead.fit

    def fit(self: DecisionHead, features: FloatArray, labels: IntArray, n_classes: int) -> DecisionHead:
        settings = tuple(getattr(self, field.name) for field in fields(self) if field.init)
        data = tuple(hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest() for array in (features, labels))
        key = (settings, features.shape, n_classes, data)
        if key not in known:
            known[key] = train(self, features, labels, n_classes).layers_
        self.layers_ = dict(known[key])
        return self

    DecisionHead.fit = fit  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        DecisionHead.fit = train  # type: ignore[method-assign]
