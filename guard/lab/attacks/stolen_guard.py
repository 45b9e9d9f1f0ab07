"""A copy of the guard that an attacker makes of own clean images, as far as it has gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from guard.config import GuardConfig
from guard.detection.detectors.base import Kind
from guard.detection.ensemble import Ensemble, Member
from guard.detection.kind_scores import SHOWS, KindScores
from guard.detection.whitening import WhitenedSpace
from guard.errors import DataError
from guard.lab.attacks.watched_features import WatchedFeatures
from guard.statistics.confidence import fit_temperature
from guard.suspect.model import SuspectModel
from guard.types import FEATURES, AnyArray, Float32Array, IntArray

_LEAST_SQUARED, _LEAST_SPREAD = 1e-12, 1e-6

#: Takes the features of one depth, (n, d), and the answers, (n,); gives one score per row.
_Term = Callable[[Tensor, Tensor], Tensor]


class _Copy(NamedTuple):
    """A member that has a gradient."""

    kind: Kind
    depth: str
    term: _Term


class StolenGuard:
    """The guard's differentiable members and its combination, fitted on images of the attacker, with a gradient.

    Relative distance and residual in the whitened space at every depth that the guard watches, and the disagreement of
    the replacement head. The local outlier factor ranks neighbours and has no useful gradient; it is left out. Members
    are fitted on one half of the images. Scores are standardised on the other half, where the guard has normal scores
    of p-values. All else is the guard's: kinds, residuals compared over depths, weights (but for the residual, which
    has the whole weight of novelty), and the factors of the network's confidence at a temperature that the attacker's
    clean images tell.

    References
    ----------
    .. [1] Athalye, Carlini, Wagner (2018), Obfuscated Gradients Give a False Sense of Security (arXiv 1802.00420):
       attack the defence by what can be differentiated of it.
    .. [2] Carlini, Wagner (2017), Adversarial Examples Are Not Easily Detected (arXiv 1705.07263): white-box attacks
       on detectors.
    """

    def __init__(self, watched: WatchedFeatures, copies: Sequence[_Copy], combine: _Combination) -> None:
        self._watched, self._copies, self._combine = watched, tuple(copies), combine

    @classmethod
    def fit(cls, module: nn.Module, images: Float32Array, labels: IntArray, *, seed: int = 0) -> Self:
        """Fit the members on one half of the attacker's clean images, and their combination on the other.

        Parameters
        ----------
        module : nn.Module
            The attacker's network; put into eval mode.
        images : ndarray of shape (n, channels, height, width), float32
            Clean, at least 20.
        labels : ndarray of shape (n,), int64
            True labels.
        seed : int
            Of the halves, and of the head.

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
        copies = [
            _Copy(kind, _depth_of(member), term)
            for member, kind in zip(ensemble.members, ensemble.kinds, strict=True)
            for term in _terms(member, ensemble)
        ]
        if not copies:
            raise DataError("no member of the guard has a gradient, so there is nothing to copy.")
        watched = WatchedFeatures(module, points)
        with torch.no_grad():
            parts = [
                (logits, _raw(copies, features, logits.argmax(dim=1)))
                for rows in np.array_split(held, -(-len(held) // 250))
                for logits, features in [watched.of(torch.from_numpy(images[rows]))]
            ]
            logits, raw = (torch.cat(part) for part in zip(*parts, strict=True))
            temperature = fit_temperature(logits.numpy(), labels[held])
            return cls(watched, copies, _Combination([copy.kind for copy in copies], raw, temperature))

    def logits_and_score(self, images: Tensor, answers: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the network's logits (n, n_classes), and a score each (n,), higher = more suspicious, with a gradient.

        Parameters
        ----------
        images : Tensor of shape (n, channels, height, width), float32
        answers : Tensor of shape (n,), int64, optional
            What the network is to be judged for; its own answers if left out.
        """
        logits, features = self._watched.of(images)
        answers = logits.argmax(dim=1) if answers is None else answers
        return logits, self._combine(_raw(self._copies, features, answers), logits)


class _Combination:
    """`CalibratedFusion` for tensors, with standardised scores in the place of normal scores.

    Parameters
    ----------
    kinds : sequence of Kind
        Of the detectors.
    raw : Tensor of shape (n, n_detectors)
        Scores of clean images that the detectors were not fitted on.
    temperature : float
        Of the network's confidence.
    """

    def __init__(self, kinds: Sequence[Kind], raw: Tensor, temperature: float) -> None:
        self._temperature = temperature
        self._scale = _mean_and_spread(raw)
        graded = self._graded(raw, self._scale)
        scores = KindScores.fit(graded.double().numpy(), kinds)
        is_of_kind = scores.kinds[:, np.newaxis] == np.arange(len(scores.shows))
        is_averaged = ~scores.whiten.any(axis=1, keepdims=True)
        self._averaged, self._is_of_kind, self._centre, self._whiten, self._weights = (
            torch.from_numpy(array.astype(np.float32))
            for array in (
                *(is_of_kind * is_averaged / is_of_kind.sum(axis=0), is_of_kind),
                *(scores.centre, scores.whiten, scores.weights),
            )
        )
        self._contradicts = torch.from_numpy(scores.shows == SHOWS.index("contradiction"))
        self._scale_of_kinds = _mean_and_spread(self._of_kinds(graded))

    def __call__(self, raw: Tensor, logits: Tensor) -> Tensor:
        """Return one score per row, shape (n,)."""
        graded = self._graded(self._of_kinds(self._graded(raw, self._scale)), self._scale_of_kinds)
        sure = (logits / self._temperature).softmax(dim=1).max(dim=1, keepdim=True).values
        factors = torch.where(self._contradicts, sure.clamp(min=0.5), 0.5 * (1.0 + sure))
        return ((graded * factors).square() @ self._weights).clamp(min=_LEAST_SQUARED).sqrt()

    def _of_kinds(self, graded: Tensor) -> Tensor:
        distances = ((graded - self._centre) @ self._whiten).square() @ self._is_of_kind
        return graded @ self._averaged + distances.clamp(min=_LEAST_SQUARED).sqrt()

    @staticmethod
    def _graded(scores: Tensor, scale: tuple[Tensor, Tensor]) -> Tensor:
        mean, spread = scale
        return functional.softplus((scores - mean) / spread)


def _mean_and_spread(scores: Tensor) -> tuple[Tensor, Tensor]:
    return scores.mean(dim=0), scores.std(dim=0).clamp(min=_LEAST_SPREAD)


def _raw(copies: Sequence[_Copy], features: Mapping[str, Tensor], answers: Tensor) -> Tensor:
    """Return the scores of the members, shape (n, n_copies)."""
    return torch.stack([copy.term(features[copy.depth], answers) for copy in copies], dim=1)


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
