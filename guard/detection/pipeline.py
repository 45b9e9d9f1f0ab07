"""The guard itself: fit on clean images, inspect new ones. The waist of the package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch

from guard.config import PLACES, SERVING_SETTINGS, GuardConfig
from guard.detection.copies import copy_groups, equal_rows
from guard.detection.cross_fitting import Progress, cross_fit
from guard.detection.fitted import FittedGuard
from guard.detection.kept_reference import kept_reference
from guard.detection.soundness import check_varied
from guard.detection.training_set import TrainingSet, check_labels
from guard.errors import ConfigError, DataError, SuspectModelError
from guard.statistics.calibration import check_rate, conformal_p_values
from guard.statistics.class_ranks import class_groups
from guard.suspect.batch_dependence import batch_dependence
from guard.suspect.model import BATCH_SIZE, SuspectModel
from guard.types import (
    BACKUP,
    Action,
    Activations,
    Float32Array,
    IntArray,
    Scores,
    Verdict,
)

_ONE_BY_ONE = (
    "Mend that, or let the server answer one request after the other: batching = 'never', rows_per_request = 1."
)
_CLEAN = "no more suspicious than clean images"
#: Of shape (n, channels, height, width), float32.
Images = Float32Array | torch.Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Guard(FittedGuard):
    """Says of every input of a suspect model whether it is poisoned.

    Made by `fit`, `fit_activations` or `load`; `dataclasses.replace` makes a variant. Its attributes are those of
    `FittedGuard`.
    """

    @classmethod
    def fit(
        cls,
        suspect: SuspectModel,
        clean_images: Float32Array,
        clean_labels: IntArray,
        config: GuardConfig | None = None,
        *,
        class_names: Sequence[str] | None = None,
        threads: int = 1,
        progress: Progress | None = None,
    ) -> Self:
        """Fit a guard on clean images; poisoned ones are neither needed nor wanted.

        Parameters
        ----------
        suspect : SuspectModel
            The network to guard.
        clean_images : ndarray of shape (n, channels, height, width), float32
            What the network takes, after the user's own preprocessing; finite.
        clean_labels : ndarray of shape (n,), int
            True labels, 0-based.
        config : GuardConfig, optional
            Settings; defaults if left out.
        class_names : sequence of str, optional
            For people only; kept in the bundle.
        threads : int
            How many folds are fitted side by side, >= 1: a core and a copy of the activations for each. The guard is
            the same for any number.
        progress : callable, optional
            Called with a line of text and the share done.

        Raises
        ------
        DataError
            If images or labels break a rule, or are too few for the requested rate.
        SuspectModelError
            If the network cannot be split, or its answer to an image depends on the others of its batch and requests
            are not answered one by one (setting `batching`).
        """
        config = config or GuardConfig()
        images = np.asarray(clean_images)
        check_rate(config.false_positive_rate, len(images))
        if progress is not None:
            progress("running the suspect model on the clean images", 0.0)
        if suspect.split_points is None:
            suspect.locate(images, clean_labels)
        dependence = batch_dependence(suspect.module.eval(), images)
        if dependence and (config.batching != "never" or config.rows_per_request != 1):
            raise SuspectModelError(f"{dependence}. {_ONE_BY_ONE}")
        size = 1 if dependence else BATCH_SIZE
        activations = suspect.activations(images, size)
        noisy = None
        if config.image_noise_std > 0:
            noisy = suspect.activations(_with_noise(images, config.image_noise_std, config.seed), size)
        labels = check_labels(clean_labels, len(images), activations.logits.shape[1], "labels", "per image")
        if progress is not None:
            progress("looking for copies among the clean images", 0.1)
        guard = cls.fit_activations(
            activations,
            labels,
            config,
            noisy=noisy,
            groups=copy_groups(images, labels),
            class_names=class_names,
            threads=threads,
            progress=progress,
        )
        return replace(
            guard,
            suspect=suspect,
            input_shape=tuple(images.shape[1:]),
            input_range=_range_of(images),
            batch_dependence=dependence,
        )

    @classmethod
    def fit_activations(
        cls,
        activations: Activations,
        labels: IntArray,
        config: GuardConfig | None = None,
        *,
        noisy: Activations | None = None,
        groups: IntArray | None = None,
        class_names: Sequence[str] | None = None,
        threads: int = 1,
        progress: Progress | None = None,
    ) -> Self:
        """Fit a guard on clean activations, for a model that is no PyTorch module.

        Parameters
        ----------
        activations : Activations
            Of clean inputs.
        labels : ndarray of shape (n,), int
            True labels in [0, n_classes).
        noisy : Activations, optional
            Of the same inputs with noise added; detectors learn from them too, calibration does not.
        groups : ndarray of shape (n,), int, optional
            One number per input, the same for copies of each other, see `copy_groups`; what is promised is promised of
            distinct inputs. Without it, those with equal activations are copies.
        threads : int
            As of `fit`.

        Raises
        ------
        DataError
            If a value is not finite, shapes do not agree, or the images are too few for the requested rate.
        """
        config = config or GuardConfig()
        if groups is None:
            groups = equal_rows([array for _, array in activations.items()])
        training = TrainingSet(activations, labels, noisy=noisy, groups=groups)
        n_classes, n = activations.logits.shape[1], int(training.is_distinct.sum())
        check_rate(config.false_positive_rate, n, len(activations) - n)
        if n < 2 * (folds := config.fewest_folds):
            who, cure = ("a fit", "") if config.folds is None else (f"folds={folds}", ", or fewer folds")
            raise DataError(f"{who} needs at least {2 * folds} clean images, got {n}. Give more{cure}.")
        if config.false_positive_rate_scope == "class":
            class_groups(activations.predicted_labels[training.is_distinct], n_classes, config.false_positive_rate)
        if config.anytime and config.mode == "paper":
            raise ConfigError("anytime goes with mode 'calibrated': the published rule knows one depth. Leave it out.")
        if class_names is not None and len(class_names) != n_classes:
            raise DataError(
                f"the suspect model has {n_classes} classes, got {len(class_names)} class names. "
                "Give one name per class, in the model's order."
            )

        try:
            check_varied(dict(activations.items()))
        except DataError as error:
            raise DataError(f"{error} Name other layers (--split, --depth), or mend the network.") from error
        fitted = cross_fit(config, training, threads=threads, progress=progress)
        guard = cls(
            config=config,
            ensemble=fitted.ensemble,
            fusion=fitted.fusion,
            clean_scores=fitted.clean_scores,
            clean_answers=fitted.clean_answers,
            reference=kept_reference(activations, training.same_as),
            reference_labels=training.labels,
            realised_false_positive_rate=fitted.realised_false_positive_rate,
            contradictions=fitted.contradictions,
            class_names=tuple(class_names) if class_names is not None else None,
            reference_groups=training.groups if n < len(activations) else None,
            noisy_reference=kept_reference(noisy, np.arange(len(noisy))) if noisy is not None else None,
            early=fitted.early,
        )
        try:
            guard._check_calibration({})
        except DataError as error:
            raise DataError(
                f"these clean images give a guard that no server would load: {error} Give more images of each class, "
                "and look whether the network gets them right."
            ) from error
        return guard

    def inspect(self, images: Float32Array) -> list[Verdict]:
        """Return one verdict per image, in order.

        Parameters
        ----------
        images : ndarray of shape (n, channels, height, width), float32
            What the suspect model takes.

        Raises
        ------
        DataError
            If images break a rule, or cannot be scored; never answered as clean.
        """
        if self.suspect is None:
            raise DataError("this guard has no suspect model: call inspect_activations(), or load it with a suspect.")
        images = np.asarray(images)
        if self.input_shape is not None and images.shape[1:] != self.input_shape:
            wanted = ", ".join(str(size) for size in self.input_shape)
            raise DataError(f"images must have shape (n, {wanted}) as in fit, got {images.shape}.")
        if len(images) == 0:
            return []
        size = 1 if self.config.batching == "never" else BATCH_SIZE
        activations = _scorable(self.suspect.activations(images, size))
        return self.decide(self.complete(activations, images), images)

    def inspect_activations(self, activations: Activations) -> list[Verdict]:
        """Return one verdict per row of activations, in order.

        Raises
        ------
        DataError
            If a value is not finite or a width differs from `fit`, or a backup is needed, which looks at images.
        """
        return self.decide(_scorable(activations))

    def decide(
        self, activations: Activations, images: Images | None = None, *, ask_backup: bool = False
    ) -> list[Verdict]:
        """Return one verdict per row; the caller answers for finite values, as `inspect_activations` does.

        Parameters
        ----------
        activations : Activations of n rows
            From `complete`, where a backup is one of the detectors.
        images : ndarray or Tensor of shape (n, channels, height, width), float32, optional
            The same inputs, for the backup. It runs once, on the flagged rows alone, and only if somebody asks.
        ask_backup : bool
            Ask for a second opinion under every action, not under `relabel` only.
        """
        labels = activations.predicted_labels
        scores = self.scores(activations)
        action, opinions = self.action, {}
        if action == "relabel" or ask_backup:
            opinions = self._opinions(activations, images, np.flatnonzero(scores.is_poisoned))
        names = self.ensemble.names
        rows = zip(
            labels.tolist(),
            scores.is_poisoned.tolist(),
            scores.p_values.tolist(),
            scores.combined.tolist(),
            scores.raw.tolist(),
            strict=True,
        )
        verdicts = []
        for row, (label, is_poisoned, p_value, combined, raw) in enumerate(rows):
            opinion = opinions.get(row)
            on_this = action if is_poisoned else "observe"
            if on_this == "relabel" and opinion is None:
                on_this = "flag"
            verdicts.append(
                Verdict(
                    label=label,
                    final_label=int(opinion.argmax()) if on_this == "relabel" and opinion is not None else label,
                    is_poisoned=is_poisoned,
                    p_value=p_value,
                    score=combined,
                    action=on_this,
                    detector_scores=dict(zip(names, raw, strict=True)),
                    surprise=dict(zip(names, scores.surprise[row].tolist(), strict=True)) if is_poisoned else {},
                    reason=self._reason(scores, row) if is_poisoned else _CLEAN,
                    second_opinion=opinion,
                    depth=self.depth,
                )
            )
        return verdicts

    def examined(self, verdict: Verdict, activations: Activations, images: Images) -> Verdict:
        """Return the verdict on one unflagged row with what a flagged one has: surprise and second opinion.

        Parameters
        ----------
        verdict : Verdict
        activations : Activations of 1 row
            From `complete`, where a backup is one of the detectors.
        images : ndarray or Tensor of shape (1, channels, height, width), float32
        """
        (surprise,) = self.scores(activations).surprise.tolist()
        return replace(
            verdict,
            surprise=dict(zip(self.ensemble.names, surprise, strict=True)),
            second_opinion=self._opinions(activations, images, np.arange(1)).get(0),
        )

    @property
    def action(self) -> Action:
        """What is done with a flagged input: as the settings have it, but `flag` where no opinion is fit to relabel."""
        return "flag" if self.config.action == "relabel" and not self.relabels else self.config.action

    def second_opinion(self, activations: Activations, images: Images | None, rows: IntArray) -> Float32Array:
        """Return the logits of the backup for some rows, shape (len(rows), n_classes); without one, of the head.

        Raises
        ------
        DataError
            If there is a backup and no images.
        """
        if self.backup is None:
            return (self.whole or self.ensemble).replacement_logits(activations[rows])
        if BACKUP in activations.depths:
            return activations.at(BACKUP)[rows]
        if images is None:
            raise DataError("this guard's backup looks at images: call inspect(images), or give decide() the images.")
        return self.backup.logits(images[rows])

    def complete(self, activations: Activations, images: Images) -> Activations:
        """Return activations with the backup's logits where the backup is one of the detectors; else as they are."""
        if self.backup is None or "backup" not in self.ensemble.names or BACKUP in activations.depths:
            return activations
        logits = self.backup.logits(images)
        return Activations(activations.logits, activations.features, {**activations.depths, BACKUP: logits})

    def _opinions(self, activations: Activations, images: Images | None, rows: IntArray) -> dict[int, Float32Array]:
        """Return the second opinion on some rows by their number, without those that are not finite."""
        if len(rows) == 0:
            return {}
        logits = self.second_opinion(activations, images, rows)
        return {row: opinion for row, opinion in zip(rows.tolist(), logits, strict=True) if np.isfinite(opinion).all()}

    def scores(self, activations: Activations) -> Scores:
        """Return all scores of a batch as arrays; one row per input."""
        raw = self.ensemble.score_fused(activations)
        surprise = self.fusion.surprise(raw)
        combined = self.fusion.combine(surprise, activations.logits)
        if self.class_ranks is None:
            p_values = conformal_p_values(combined, self.clean_scores)
        else:
            p_values = self.class_ranks.p_values(combined, activations.predicted_labels)
        is_poisoned = self.fusion.decide(combined, p_values, self.config.false_positive_rate)
        return Scores(raw, surprise, combined, p_values, is_poisoned)

    def with_config(self, **changes: Any) -> Guard:
        """Return the same fitted guard under other serving settings (rate, action, ...); nothing is fitted again.

        Raises
        ------
        ConfigError, DataError
            If a setting breaks its rule or is fixed by fitting, or the clean images are too few for the rate.
        """
        if places := sorted(changes.keys() & PLACES):
            raise ConfigError(f"{places[0]} is no setting of a guard: it says where things are. Give it to the server.")
        fixed = sorted((changes.keys() & GuardConfig.model_fields.keys()) - SERVING_SETTINGS)
        if fixed:
            raise ConfigError(f"{fixed[0]} is fixed when a guard is fitted. Fit again to change it.")
        other = replace(self, config=self.config.replace(**changes))
        check_rate(other.config.false_positive_rate, len(self.clean_scores))
        batching, rows = other.config.batching, other.config.rows_per_request
        alone = self.config.batching == "never"  # so it was fitted
        if self.batch_dependence and (batching not in ("never", self.config.batching) or (alone and rows != 1)):
            raise ConfigError(
                f"batching = {batching!r} and rows_per_request = {rows!r} do not go with this guard: "
                f"{self.batch_dependence}. {_ONE_BY_ONE}"
            )
        if (other.config.max_guard_ms or other.config.deadline_header) and not self.early:
            raise ConfigError(
                "max_guard_ms and deadline_header need verdicts at several depths. Fit again with anytime = true, on a "
                "network with earlier depths."
            )
        if other.config.min_depth is not None:
            other.at_depth(other.config.min_depth)
        return other

    def at_depth(self, depth: str) -> Guard:
        """Return the guard that looks no deeper than this, for a verdict in less time at the same false-positive rate.

        It decides like any other, and cannot be saved.

        Raises
        ------
        ConfigError
            If there is no such early verdict.
        """
        for early in self.early:
            if early.depth == depth:
                return replace(
                    self,
                    depth=depth,
                    whole=self.whole or self.ensemble,
                    ensemble=early.ensemble,
                    fusion=early.fusion,
                    clean_scores=early.clean_scores,
                    clean_answers=early.clean_answers,
                    realised_false_positive_rate=early.realised_false_positive_rate,
                )
        known = ", ".join(early.depth for early in self.early) or "none"
        raise ConfigError(f"there is no verdict at depth {depth!r}: known are {known}. Fit with anytime = true.")

    def _reason(self, scores: Scores, row: int) -> str:
        top = int(scores.surprise[row].argmax())
        among = "clean images" if self.class_ranks is None else "the clean images that its answer is compared with"
        return (
            f"as suspicious as {100 * scores.p_values[row]:.2g} % of {among}; "
            f"strongest sign: {self.ensemble.names[top]} = {scores.raw[row, top]:.3g}"
        )


def _range_of(images: Float32Array) -> tuple[tuple[float, float], ...]:
    """Return the least and the greatest value of each channel."""
    low, high = images.min(axis=(0, 2, 3)), images.max(axis=(0, 2, 3))
    return tuple((round(float(least), 6), round(float(most), 6)) for least, most in zip(low, high, strict=True))


def _with_noise(images: Float32Array, std: float, seed: int) -> Float32Array:
    """Return images with Gaussian noise, float32; drawn image by image, so that no array of all is held in float64."""
    rng = np.random.default_rng(seed)
    noisy = np.empty(images.shape, dtype=np.float32)
    for image, row in zip(images, noisy, strict=True):
        row[...] = image + rng.normal(0, std, image.shape)
    return noisy


def _scorable(activations: Activations) -> Activations:
    finite = activations.finite_rows
    if not finite.all():
        raise DataError(f"activations of input {int(np.argmin(finite))} are not finite; it cannot be scored.")
    return activations
