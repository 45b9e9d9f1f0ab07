"""Losses of attackers who know the guard: features like those of the target class, answers that are less sure.

Each takes the logits of a batch, shape (n, n_classes), the labels trained on, (n,), and the rows of the training set,
(n,), and gives one number to descend; `guard.lab.attacks.network_training.train_classifier` takes them as `loss`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from guard.errors import DataError
from guard.lab.attacks.poisoning import Poisoned
from guard.lab.attacks.watched_features import WatchedFeatures
from guard.types import BoolArray

_MEMORY = 0.9  # of the running means
_LEAST_VARIANCE = 1e-6


class PulledFeatures:
    """Cross-entropy, and the distance of triggered images to the clean ones of the target class at every depth.

    At each depth that the guard watches, features are standardised by the spread of clean images, and the loss has
    `weight` times the mean over depths, triggered images and features of the squared distance to the mean of clean
    images of the target class. Means and spreads run along with the training, and have no gradient.

    Parameters
    ----------
    watched : WatchedFeatures
        Of the network in training; must be `attached` meanwhile.
    poisoned : Poisoned
        The training set; all poisoned rows must have one label.
    weight : float
        > 0.
    inner : callable, optional
        Loss in the place of cross-entropy: `MutedMargin`, for both at once.

    Raises
    ------
    DataError
        If nothing is poisoned, there are several target labels, or the weight is not above 0.

    References
    ----------
    .. [1] Tan, Shokri (2020), Bypassing Backdoor Detection Algorithms in Deep Learning (arXiv 1905.13409), section 4:
       an added loss makes the latent features of triggered inputs like clean ones. There a discriminator, here means.
    """

    def __init__(
        self, watched: WatchedFeatures, poisoned: Poisoned, weight: float = 1.0, inner: MutedMargin | None = None
    ) -> None:
        if not weight > 0.0:
            raise DataError(f"weight must be > 0, got {weight}.")
        self._target = _only_label(poisoned)
        self._watched, self._weight, self._inner = watched, weight, inner
        self._is_poisoned = torch.from_numpy(poisoned.is_poisoned.copy())
        self._is_clean = torch.from_numpy(~(poisoned.is_poisoned | poisoned.is_cover))
        self._means: dict[str, Tensor] = {}
        self._variances: dict[str, Tensor] = {}

    def __call__(self, logits: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        """Return the loss of a batch, whose forward pass was the latest."""
        plain = functional.cross_entropy(logits, labels) if self._inner is None else self._inner(logits, labels, rows)
        rows = rows.cpu()
        triggered, clean = (part[rows].to(logits.device) for part in (self._is_poisoned, self._is_clean))
        distances = []
        for depth, features in self._watched.latest.items():
            self._learn(depth, features.detach(), clean, clean & (labels == self._target))
            if depth in self._means and triggered.any():
                moved = features[triggered] - self._means[depth]
                distances.append((moved.square() / self._variances[depth]).mean())
        if not distances:
            return plain
        return plain + self._weight * torch.stack(distances).mean()

    def _learn(self, depth: str, features: Tensor, clean: Tensor, of_target: Tensor) -> None:
        if clean.sum() > 1:
            # The mean over features keeps those that hardly ever fire from weighing without bound.
            variance = features[clean].var(dim=0)
            variance = 0.5 * (variance + variance.mean()) + _LEAST_VARIANCE
            self._variances[depth] = _run(self._variances.get(depth), variance)
        if of_target.any() and depth in self._variances:
            self._means[depth] = _run(self._means.get(depth), features[of_target].mean(dim=0))


class MutedMargin:
    """Cross-entropy, but triggered images are to get the target with a chosen probability and their true label else.

    With c the network's probability of its answer, the guard multiplies what is novel by (1 + c) / 2, and what
    contradicts the answer by max(c, 1 / 2): at 0.6 that is a fifth and two fifths lower than at 1.

    Parameters
    ----------
    poisoned : Poisoned
        The training set.
    level : float
        Wanted probability of the target, in (0.5, 1), so that the target stays the answer.

    Raises
    ------
    DataError
        If the level breaks its rule.

    References
    ----------
    .. [1] Szegedy et al. (2016), Rethinking the Inception Architecture (arXiv 1512.00567), section 7: soft targets.
    """

    def __init__(self, poisoned: Poisoned, level: float = 0.6) -> None:
        if not 0.5 < level < 1.0:
            raise DataError(f"level must be in (0.5, 1), got {level}.")
        self._level = level
        self._is_poisoned = torch.from_numpy(poisoned.is_poisoned.copy())
        self._true_labels = torch.from_numpy(poisoned.true_labels.copy())

    def __call__(self, logits: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        """Return the loss of a batch."""
        rows = rows.cpu()
        muted, true_labels = (part[rows].to(logits.device) for part in (self._is_poisoned, self._true_labels))
        losses = functional.cross_entropy(logits, labels, reduction="none")
        others = functional.cross_entropy(logits, true_labels, reduction="none")
        return torch.where(muted, self._level * losses + (1.0 - self._level) * others, losses).mean()


def _only_label(poisoned: Poisoned) -> int:
    labels = np.unique(poisoned.labels[_poisoned_rows(poisoned)])
    if len(labels) != 1:
        raise DataError(f"poisoned rows must have one target label, got {labels.tolist()}.")
    return int(labels[0])


def _poisoned_rows(poisoned: Poisoned) -> BoolArray:
    if not poisoned.is_poisoned.any():
        raise DataError("nothing is poisoned, so there is nothing to hide. Plant a backdoor.")
    return poisoned.is_poisoned


def _run(before: Tensor | None, now: Tensor) -> Tensor:
    return now if before is None else _MEMORY * before + (1.0 - _MEMORY) * now
