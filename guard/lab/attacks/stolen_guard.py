"""A copy of the guard that an attacker makes of own clean images, as far as it has gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from guard.config import GuardConfig
from guard.detection.ensemble import Ensemble, Member
from guard.detection.whitening import WhitenedSpace
from guard.errors import DataError
from guard.lab.attacks.watched_features import WatchedFeatures
from guard.suspect.model import SuspectModel
from guard.types import FEATURES, AnyArray, Float32Array, IntArray

_LEAST_SQUARED, _LEAST_SPREAD = 1e-12, 1e-6

#: Takes the features of one depth, (n, d), and the answers, (n,); gives one score per row.
_Term = Callable[[Tensor, Tensor], Tensor]


class StolenGuard:
    """The guard's differentiable members, fitted on images of the attacker, with a gradient down to the pixels.

    Relative distance and residual in the whitened space, and the disagreement of the replacement heads, at every depth
    that the guard watches. The local outlier factor ranks neighbours and has no useful gradient; it is left out. Each
    score is standardised on clean images that the members were not fitted on. The combination is simpler than the
    guard's: the root of the mean over kinds of the mean over depths of softplus(z)^2, without the exact p-values,
    without comparing the residuals of several depths, and without the factors of confidence.

    Parameters
    ----------
    watched : WatchedFeatures
        Of the attacker's network, which is in eval mode and not changed.
    terms : mapping of (kind, depth) to callable
    scales : mapping of (kind, depth) to (mean, standard deviation)

    References
    ----------
    .. [1] Athalye, Carlini, Wagner (2018), Obfuscated Gradients Give a False Sense of Security (arXiv 1802.00420):
       attack the defence by what can be differentiated of it.
    .. [2] Carlini, Wagner (2017), Adversarial Examples Are Not Easily Detected (arXiv 1705.07263): white-box attacks
       on detectors.
    """

    def __init__(
        self,
        watched: WatchedFeatures,
        terms: Mapping[tuple[str, str], _Term],
        scales: Mapping[tuple[str, str], tuple[float, float]],
    ) -> None:
        self.watched, self._terms, self._scales = watched, dict(terms), dict(scales)

    @classmethod
    def fit(cls, module: nn.Module, images: Float32Array, labels: IntArray, *, seed: int = 0) -> Self:
        """Fit the members on one half of the attacker's clean images, and standardise their scores on the other.

        Parameters
        ----------
        module : nn.Module
            The attacker's network; put into eval mode.
        images : ndarray of shape (n, channels, height, width), float32
            Clean, at least 20.
        labels : ndarray of shape (n,), int64
            True labels.
        seed : int
            Of the halves, and of the heads.

        Raises
        ------
        DataError
            If there are too few images, or no member has a gradient.
        SuspectModelError
            If the network cannot be split.
        """
        if len(images) < 20:
            raise DataError(f"a copy of a guard needs at least 20 images, got {len(images)}.")
        suspect = SuspectModel(module)
        suspect.locate(images, labels)
        points = suspect.split_points
        assert points is not None
        order = np.random.default_rng(seed).permutation(len(images))
        taught, held = order[: len(order) // 2], order[len(order) // 2 :]
        ensemble = Ensemble.for_mode(GuardConfig(seed=seed), points.depths)
        ensemble.fit(suspect.activations(images[taught]), labels[taught])
        terms = {
            (member.kind, _depth_of(member)): term for member in ensemble.members for term in _terms(member, ensemble)
        }
        if not terms:
            raise DataError("no member of the guard has a gradient, so there is nothing to copy.")
        guard = cls(WatchedFeatures(module, points), terms, dict.fromkeys(terms, (0.0, 1.0)))
        with torch.no_grad():
            raw = [guard._raw(torch.from_numpy(images[part])) for part in np.array_split(held, -(-len(held) // 250))]
        for key in terms:
            values = torch.cat([part[key] for part in raw])
            guard._scales[key] = (float(values.mean()), max(float(values.std()), _LEAST_SPREAD))
        return guard

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of detectors that were copied."""
        return tuple(dict.fromkeys(kind for kind, _ in self._terms))

    def score(self, images: Tensor, answers: Tensor | None = None) -> Tensor:
        """Return one score per image, shape (n,); higher = more suspicious, with a gradient.

        Parameters
        ----------
        images : Tensor of shape (n, channels, height, width), float32
        answers : Tensor of shape (n,), int64, optional
            What the network is to be judged for; its own answers if left out.
        """
        return self.logits_and_score(images, answers)[1]

    def logits_and_score(self, images: Tensor, answers: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the network's logits (n, n_classes), and the scores (n,), of one forward pass; see `score`."""
        logits, features = self.watched.of(images)
        answers = logits.argmax(dim=1) if answers is None else answers
        by_kind: dict[str, list[Tensor]] = {}
        for (kind, depth), term in self._terms.items():
            mean, spread = self._scales[kind, depth]
            surprise = functional.softplus((term(features[depth], answers) - mean) / spread).square()
            by_kind.setdefault(kind, []).append(surprise)
        return logits, torch.stack([torch.stack(parts).mean(dim=0) for parts in by_kind.values()]).mean(dim=0).sqrt()

    def _raw(self, images: Tensor) -> dict[tuple[str, str], Tensor]:
        logits, features = self.watched.of(images)
        answers = logits.argmax(dim=1)
        return {(kind, depth): term(features[depth], answers) for (kind, depth), term in self._terms.items()}


def _depth_of(member: Member) -> str:
    return str(getattr(member.detector, "depth", FEATURES))


def _terms(member: Member, ensemble: Ensemble) -> list[_Term]:
    """Return the score of a member as a function of tensors, in a list; an empty one if it has no gradient."""
    state, space = member.detector.state(), ensemble.spaces.get(_depth_of(member))
    if member.kind == "disagreement":
        return [_disagreement(state)]
    if space is not None and member.kind == "residual":
        white = _whitened(space)
        return [lambda features, _answers: white(features)[1].square().sum(dim=1).clamp(min=_LEAST_SQUARED).sqrt()]
    if space is not None and member.kind == "relative_distance":
        return [_relative_distance(state, _whitened(space))]
    return []


def _whitened(space: WhitenedSpace) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return `WhitenedSpace.__call__` for tensors: leading and trailing columns."""
    arrays = {name: torch.from_numpy(np.array(array, dtype=np.float32)) for name, array in space.state().items()}
    lead, _ = space(space.mean[np.newaxis])
    rank, is_whole = lead.shape[1], space.components.shape[0] == space.components.shape[1]

    def whiten(features: Tensor) -> tuple[Tensor, Tensor]:
        standard = (features - arrays["mean"]) / arrays["scale"]
        inner = standard @ arrays["components"]
        white = inner @ arrays["rotation"]
        left = torch.zeros(len(features)) if is_whole else standard.square().sum(dim=1) - inner.square().sum(dim=1)
        rest = left.clamp(min=_LEAST_SQUARED).sqrt() / arrays["rest"]
        return white[:, :rank], torch.cat([white[:, rank:], rest[:, None]], dim=1)

    return whiten


def _relative_distance(state: Mapping[str, AnyArray], white: Callable[[Tensor], tuple[Tensor, Tensor]]) -> _Term:
    means = torch.from_numpy(np.array(state["means"], dtype=np.float32))
    places = torch.from_numpy(np.where(state["is_present"] > 0, np.cumsum(state["is_present"]) - 1, -1))

    def score(features: Tensor, answers: Tensor) -> Tensor:
        distances = torch.cdist(white(features)[0], means).clamp(min=_LEAST_SQUARED)  # (n, classes present)
        own = places[answers].clamp(min=0)  # an answer without clean images is infinite in the guard: no gradient
        mine = distances.gather(1, own[:, None])[:, 0]
        others = distances.scatter(1, own[:, None], torch.inf)
        return mine.log() - others.min(dim=1).values.log()

    return score


def _disagreement(state: Mapping[str, AnyArray]) -> _Term:
    layers = {name: torch.from_numpy(np.array(array, dtype=np.float32)) for name, array in state.items()}
    n_layers = len(layers) // 2

    def score(features: Tensor, answers: Tensor) -> Tensor:
        hidden = features
        for number in range(1, n_layers + 1):
            hidden = hidden @ layers[f"weight_{number}"] + layers[f"bias_{number}"]
            if number < n_layers:
                hidden = hidden.relu()
        mine = hidden.gather(1, answers[:, None])[:, 0]
        others = hidden.scatter(1, answers[:, None], -torch.inf)
        return others.max(dim=1).values - mine

    return score
