"""The guard itself: fit on clean images, inspect new ones, save, load. The waist of the package."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from guard.backups.backup import Backup
from guard.bundle import read_bundle, write_bundle
from guard.calibration import check_rate, conformal_p_values
from guard.config import SERVING_SETTINGS, GuardConfig
from guard.cross_fitting import EarlyFit, LabelledCounts, Progress, cross_fit
from guard.ensemble import Ensemble
from guard.errors import BundleError, ConfigError, DataError
from guard.fusion import Fusion, new_fusion
from guard.split_points import SplitPoints
from guard.suspect import SuspectModel
from guard.types import (
    BACKUP,
    FEATURES,
    Action,
    Activations,
    AnyArray,
    Float32Array,
    Float64Array,
    IntArray,
    Scores,
    Verdict,
)

_CLEAN = "no more suspicious than clean images"
#: Of shape (n, channels, height, width), float32.
Images = Float32Array | torch.Tensor


class Guard:
    """Says of every input of a suspect model whether it is poisoned.

    Made by `fit`, `fit_activations` or `load`, not by its constructor.

    Attributes
    ----------
    config : GuardConfig
        Settings that it was fitted with.
    suspect : SuspectModel or None
        The guarded model; None if it was fitted on activations alone.
    input_shape : tuple of int or None
        Shape of one image, as in `fit`.
    class_names : tuple of str or None
    preprocessing : str or None
        What made the images of `fit` out of files, in words, where that was not this package; kept in the bundle.
    reference, reference_labels : Activations, ndarray of shape (n,)
        The clean data it was fitted on.
    noisy_reference : Activations or None
        Of the same inputs with noise added, if the detectors learned from such copies.
    retrained_with : LabelledCounts or None
        How many labelled inputs it learned from; None if it was never retrained.
    backup : Backup or None
        Whose label `relabel` answers with, and a reviewer sees; None: the replacement head's.
    recovery : mapping of str to float
        Share of planted triggers that each candidate gave their true label, by name; empty if nothing was measured.
    relabels : bool
        False if the second opinion did not reach the floor: `relabel` then only flags.
    early : tuple of EarlyFit
        Verdicts that look at the first depths only, the shallowest first; see `at_depth`.
    depth : str
        Where this guard stops looking; empty for one that looks at everything.
    realised_false_positive_rate : float
        Share of clean images flagged at the rate of `fit`, on folds that neither detectors nor calibration had seen.
    digest : str or None
        Digest of the bundle that it was saved to or loaded from.
    """

    def __init__(
        self,
        *,
        config: GuardConfig,
        ensemble: Ensemble,
        fusion: Fusion,
        clean_scores: Float64Array,
        reference: Activations,
        reference_labels: IntArray,
        realised_false_positive_rate: float,
        class_names: tuple[str, ...] | None = None,
        noisy_reference: Activations | None = None,
        early: tuple[EarlyFit, ...] = (),
    ) -> None:
        self.config = config
        self.ensemble = ensemble
        self.fusion = fusion
        self.reference = reference
        self.reference_labels = reference_labels
        self.realised_false_positive_rate = realised_false_positive_rate
        self.class_names = class_names
        self.noisy_reference = noisy_reference
        self.early = early
        self.depth = ""
        self.retrained_with: LabelledCounts | None = None
        self.suspect: SuspectModel | None = None
        self.input_shape: tuple[int, ...] | None = None
        self.preprocessing: str | None = None
        self.backup: Backup | None = None
        self.recovery: dict[str, float] = {}
        self.relabels = True
        self.digest: str | None = None
        self._clean_scores = clean_scores  # combined, out of fold, ascending
        self._whole = ensemble  # with the replacement head, whatever depth this guard looks at
        self._of_suspect: tuple[str | None, SplitPoints | None] = (None, None)  # what a bundle said, without its model

    @classmethod
    def fit(
        cls,
        suspect: SuspectModel,
        clean_images: Float32Array,
        clean_labels: IntArray,
        config: GuardConfig | None = None,
        *,
        class_names: Sequence[str] | None = None,
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
        progress : callable, optional
            Called with a line of text and the share done.

        Raises
        ------
        DataError
            If images or labels break a rule, or are too few for the requested rate.
        SuspectModelError
            If the network cannot be split.
        """
        config = config or GuardConfig()
        images = np.asarray(clean_images)
        check_rate(config.false_positive_rate, len(images))
        if progress is not None:
            progress("running the suspect model on the clean images", 0.0)
        activations = suspect.activations(images)
        noisy = None
        if config.image_noise_std > 0:
            noise = np.random.default_rng(config.seed).normal(0, config.image_noise_std, images.shape)
            noisy = suspect.activations((images + noise).astype(np.float32))
        guard = cls.fit_activations(
            activations, clean_labels, config, noisy=noisy, class_names=class_names, progress=progress
        )
        guard.suspect = suspect
        guard.input_shape = tuple(images.shape[1:])
        return guard

    @classmethod
    def fit_activations(
        cls,
        activations: Activations,
        labels: IntArray,
        config: GuardConfig | None = None,
        *,
        noisy: Activations | None = None,
        class_names: Sequence[str] | None = None,
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

        Raises
        ------
        DataError
            If a value is not finite, shapes do not agree, or the images are too few for the requested rate.
        """
        config = config or GuardConfig()
        labels = _checked_labels(activations, labels)
        n_classes = activations.logits.shape[1]
        check_rate(config.false_positive_rate, len(labels))
        if len(labels) < 2 * config.folds:
            raise DataError(f"folds={config.folds} needs at least {2 * config.folds} clean images, got {len(labels)}.")
        if config.anytime and config.mode == "paper":
            raise ConfigError("anytime goes with mode 'calibrated': the published rule knows one depth. Leave it out.")
        if noisy is not None and len(noisy) != len(labels):
            raise DataError(f"noisy activations must have {len(labels)} rows, one per image, got {len(noisy)}.")
        if class_names is not None and len(class_names) != n_classes:
            raise DataError(f"the suspect model has {n_classes} classes, got {len(class_names)} class names.")

        fitted = cross_fit(config, activations, labels, noisy=noisy, progress=progress)
        return cls(
            config=config,
            ensemble=fitted.ensemble,
            fusion=fitted.fusion,
            clean_scores=fitted.clean_scores,
            reference=activations,
            reference_labels=labels,
            realised_false_positive_rate=fitted.realised_false_positive_rate,
            class_names=tuple(class_names) if class_names is not None else None,
            noisy_reference=noisy,
            early=fitted.early,
        )

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
        activations = _scorable(self.suspect.activations(images))
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
                    label,
                    int(opinion.argmax()) if on_this == "relabel" and opinion is not None else label,
                    is_poisoned,
                    p_value,
                    combined,
                    on_this,
                    dict(zip(self.ensemble.names, raw, strict=True)),
                    self._reason(scores, row) if is_poisoned else _CLEAN,
                    opinion,
                    self.depth,
                )
            )
        return verdicts

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
            return self._whole.replacement_logits(activations[rows])
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
        return {row: own for row, own in zip(rows.tolist(), logits, strict=True) if np.isfinite(own).all()}

    def scores(self, activations: Activations) -> Scores:
        """Return all scores of a batch as arrays; one row per input."""
        raw = self.ensemble.score(activations)
        surprise = self.fusion.surprise(raw)
        combined = self.fusion.combine(surprise)
        p_values = conformal_p_values(combined, self._clean_scores)
        is_poisoned = self.fusion.decide(combined, p_values, self.config.false_positive_rate)
        return Scores(raw, surprise, combined, p_values, is_poisoned)

    def with_config(self, **changes: Any) -> Guard:
        """Return the same fitted guard under other serving settings (rate, action, ...); nothing is fitted again.

        Raises
        ------
        ConfigError, DataError
            If a setting breaks its rule or is fixed by fitting, or the clean images are too few for the rate.
        """
        fixed = sorted((changes.keys() & GuardConfig.model_fields.keys()) - SERVING_SETTINGS)
        if fixed:
            raise ConfigError(f"{fixed[0]} is fixed when a guard is fitted. Fit again to change it.")
        other = copy.copy(self)
        other.config = self.config.replace(**changes)
        check_rate(other.config.false_positive_rate, len(self._clean_scores))
        if (other.config.max_guard_ms or other.config.deadline_header) and not self.early:
            raise ConfigError(
                "max_guard_ms and deadline_header need verdicts at several depths. Fit again with anytime = true, on a "
                "network with earlier depths."
            )
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
                other = copy.copy(self)
                other.depth, other.ensemble, other.fusion = depth, early.ensemble, early.fusion
                other._clean_scores = early.clean_scores
                other.realised_false_positive_rate = early.realised_false_positive_rate
                return other
        known = ", ".join(early.depth for early in self.early) or "none"
        raise ConfigError(f"there is no verdict at depth {depth!r}: known are {known}. Fit with anytime = true.")

    def _reason(self, scores: Scores, row: int) -> str:
        top = int(scores.surprise[row].argmax())
        return (
            f"as suspicious as {100 * scores.p_values[row]:.2g} % of clean images; "
            f"strongest sign: {self.ensemble.names[top]} = {scores.raw[row, top]:.3g}"
        )

    def take_over(self, other: Guard) -> None:
        """Take from another guard of the same model what fitting does not make: the model itself, its backup, ..."""
        self.suspect, self._of_suspect = other.suspect, other._of_suspect
        self.input_shape, self.preprocessing = other.input_shape, other.preprocessing
        self.backup, self.recovery, self.relabels = other.backup, dict(other.recovery), other.relabels

    def _about_suspect(self) -> tuple[str | None, SplitPoints | None]:
        """Return digest and split points of the model; without it, what its bundle said, so that nothing is lost."""
        return (self.suspect.digest, self.suspect.split_points) if self.suspect is not None else self._of_suspect

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write the guard as a bundle below `directory` and return its folder, named by its digest.

        Raises
        ------
        BundleError
            If the folder cannot be written.
        DataError
            If it stops at a depth: save the guard that it came from.
        """
        if self.depth:
            raise DataError(f"this guard stops at depth {self.depth!r}. Save the one that it came from.")
        weights_digest, points = self._about_suspect()
        document = {
            "settings": self.config.model_dump(mode="json", exclude={"data_dir"}),
            "class_names": self.class_names,
            "input_shape": self.input_shape,
            "preprocessing": self.preprocessing,
            "n_classes": self.reference.logits.shape[1],
            "weights_digest": weights_digest,
            "split_points": dataclasses.asdict(points) if points is not None else None,
            "depths": list(self.reference.depths),
            "detectors": self.ensemble.describe(),
            "clean_images": len(self.reference_labels),
            "realised_false_positive_rate": self.realised_false_positive_rate,
            "backup": self.backup.description if self.backup is not None else None,
            "recovery": self.recovery,
            "relabels": self.relabels,
            "early": [
                {"depth": one.depth, "realised_false_positive_rate": one.realised_false_positive_rate}
                for one in self.early
            ],
            "retrained_with": self.retrained_with._asdict() if self.retrained_with is not None else None,
        }
        arrays: dict[str, AnyArray] = {"clean_scores": self._clean_scores, "labels": self.reference_labels}
        for prefix, part in (
            ("reference", dict(self.reference.items())),
            ("noisy_reference", dict(self.noisy_reference.items()) if self.noisy_reference is not None else {}),
            ("detector", self.ensemble.arrays()),
            ("fusion", self.fusion.arrays()),
            ("backup", self.backup.arrays() if self.backup is not None else {}),
        ):
            arrays |= {f"{prefix}.{name}": array for name, array in part.items()}
        for place, one in enumerate(self.early):
            own = {"clean_scores": one.clean_scores, **one.fusion.arrays()}
            arrays |= {f"early.{place}.{name}": array for name, array in own.items()}
        path = write_bundle(directory, document, arrays)
        self.digest = path.name
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str], suspect: SuspectModel | None = None) -> Self:
        """Read a bundle that `save` wrote.

        Parameters
        ----------
        path : path-like
            Folder of the bundle.
        suspect : SuspectModel, optional
            The model that it was fitted for; without one only `inspect_activations` works.

        Raises
        ------
        BundleError
            If the bundle is missing, damaged, of a newer schema, or was fitted for other weights.
        """
        stored = read_bundle(path)
        document = stored.document
        try:
            if suspect is not None:
                _match(suspect, document, stored.digest)
            depths = document["depths"]
            noisy = _below(stored.arrays, "noisy_reference.")
            config = GuardConfig(**document["settings"])
            guard = cls(
                config=config,
                ensemble=Ensemble.restore(document["detectors"], _below(stored.arrays, "detector.")),
                fusion=new_fusion(config.mode).restore(_below(stored.arrays, "fusion.")),
                clean_scores=stored.arrays["clean_scores"],
                reference=_activations(_below(stored.arrays, "reference."), depths),
                noisy_reference=_activations(noisy, depths) if noisy else None,
                reference_labels=stored.arrays["labels"],
                realised_false_positive_rate=document["realised_false_positive_rate"],
                class_names=tuple(document["class_names"]) if document["class_names"] else None,
            )
            guard.early = _early_fits(guard, document.get("early", []), _below(stored.arrays, "early."))
            guard.input_shape = tuple(document["input_shape"]) if document["input_shape"] else None
            guard.preprocessing = document["preprocessing"]
            guard.recovery = dict(document.get("recovery") or {})
            guard.relabels = document.get("relabels", True)
            points = document["split_points"]
            guard._of_suspect = (document["weights_digest"], _split_points(points) if points is not None else None)
            about = document.get("backup")
            if about is not None:
                module = suspect.module if suspect is not None else None
                guard.backup = Backup.restore(about, _below(stored.arrays, "backup."), module)
            retrained_with = document.get("retrained_with")
            guard.retrained_with = LabelledCounts(**retrained_with) if retrained_with is not None else None
        except (KeyError, TypeError) as error:
            raise BundleError(f"bundle {stored.digest[:12]} lacks {error}. Fit again with this version.") from error
        except ConfigError as error:
            raise BundleError(f"bundle {stored.digest[:12]} was fitted with other settings: {error}") from error
        guard.suspect = suspect
        guard.digest = stored.digest
        return guard


def _scorable(activations: Activations) -> Activations:
    finite = activations.finite_rows()
    if not finite.all():
        raise DataError(f"activations of input {int(np.argmin(finite))} are not finite; it cannot be scored.")
    return activations


def _checked_labels(activations: Activations, labels: IntArray) -> IntArray:
    labels = np.asarray(labels)
    if labels.shape != (len(activations),):
        raise DataError(f"labels must have shape ({len(activations)},), one per image, got {labels.shape}.")
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"labels must be integers, got {labels.dtype}.")
    n_classes = activations.logits.shape[1]
    if len(labels) and (labels.min() < 0 or labels.max() >= n_classes):
        raise DataError(f"labels must be in [0, {n_classes}), got {labels.min()} to {labels.max()}.")
    finite = activations.finite_rows()
    if not finite.all():
        raise DataError(f"activations of clean image {int(np.argmin(finite))} are not finite. Is the model damaged?")
    return labels.astype(np.int64)


def _match(suspect: SuspectModel, document: Mapping[str, Any], digest: str) -> None:
    """See to it that a bundle belongs to this model, and split the model where the bundle was fitted."""
    weights = document["weights_digest"]
    if weights is not None and weights != suspect.digest:
        raise BundleError(
            f"bundle {digest[:12]} was fitted for weights {weights[:12]}, the suspect model has {suspect.digest[:12]}. "
            "Fit again for these weights."
        )
    points = document["split_points"]
    if points is not None:
        suspect.use_split_points(_split_points(points))


def _split_points(points: Mapping[str, Any]) -> SplitPoints:
    return SplitPoints(points["split"], tuple(points["depths"]))


def _early_fits(
    guard: Guard, about: Sequence[Mapping[str, Any]], arrays: Mapping[str, AnyArray]
) -> tuple[EarlyFit, ...]:
    layers = [depth for depth in guard.reference.depths if depth != BACKUP]
    fits = []
    for place, one in enumerate(about):
        own = _below(arrays, f"{place}.")
        fusion = new_fusion(guard.config.mode).restore(own)
        ensemble = guard.ensemble.up_to(layers[: place + 1])
        rate = one["realised_false_positive_rate"]
        fits.append(EarlyFit(one["depth"], ensemble, fusion, own["clean_scores"], rate))
    return tuple(fits)


def _activations(arrays: Mapping[str, AnyArray], depths: Sequence[str]) -> Activations:
    return Activations(arrays["logits"], arrays[FEATURES], {name: arrays[name] for name in depths})


def _below(arrays: Mapping[str, AnyArray], prefix: str) -> dict[str, AnyArray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
