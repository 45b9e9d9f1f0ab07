"""What a guard is made of, and how it is stored: everything that fitting made, as one bundle."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from guard.arrays import require
from guard.backups.backup import Backup
from guard.config import PLACES, GuardConfig
from guard.detection.contradictions import Contradictions
from guard.detection.cross_fitting import EarlyFit
from guard.detection.ensemble import Ensemble
from guard.detection.fusion import Fusion, new_fusion
from guard.detection.soundness import (
    ANSWERS,
    GROUPS,
    KEPT,
    REMEDY,
    Calibration,
    check_backup,
    check_calibration,
    check_same_answers,
    check_stored,
    reproduction,
    rows_scored,
    share_right,
)
from guard.detection.training_set import LabelledCounts
from guard.errors import BundleError, ConfigError, DataError, NotFittedError
from guard.statistics.class_ranks import ClassRanks, class_groups
from guard.storage.bundle import read_bundle, write_bundle
from guard.suspect.model import SuspectModel
from guard.suspect.split_points import SplitPoints
from guard.types import BACKUP, FEATURES, Activations, AnyArray, BoolArray, Float64Array, IntArray

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, kw_only=True)
class FittedGuard:
    """The parts of a fitted guard; `Guard` says what is done with them. Nothing about one ever changes.

    Attributes
    ----------
    config : GuardConfig
        Settings that it was fitted with.
    ensemble : Ensemble
        Its detectors.
    fusion : Fusion
        Makes one score of theirs.
    clean_scores : ndarray of shape (n,), float64, ascending
        Combined scores of the distinct clean images, out of fold.
    clean_answers : ndarray of shape (n,), int64, or None
        What the network answers to the images of `clean_scores`, in their order; None in an older bundle.
    class_ranks : ClassRanks or None
        What gives p-values within classes; None where the rate holds for all clean inputs together.
    reference, reference_labels : Activations, ndarray of shape (n,)
        The clean data it was fitted on, rounded where that changes nothing, see `kept_reference`.
    reference_groups : ndarray of shape (n,), int64, or None
        One number per clean input, the same for copies of each other; None = there are no copies.
    realised_false_positive_rate : float
        Share of distinct clean images flagged at the rate of `fit`, on folds that neither detectors nor calibration
        had seen.
    contradictions : Contradictions or None
        Wrong answers to clean images that the network is sure of, and its features contradict; None in an older bundle.
    class_names : tuple of str or None
    noisy_reference : Activations or None
        Of the same inputs with noise added, if the detectors learned from such copies.
    early : tuple of EarlyFit
        Verdicts that look at the first depths only, the shallowest first; see `at_depth`.
    depth : str
        Where this guard stops looking; empty for one that looks at everything.
    whole : Ensemble or None
        The detectors of the guard that one with a `depth` came from.
    suspect : SuspectModel or None
        The guarded model; None if it was fitted on activations alone.
    weights_digest : str or None
        Of the guarded model, as its bundle has it, where the model itself is not at hand.
    split_points : SplitPoints or None
        The same.
    input_shape : tuple of int or None
        Shape of one image, as in `fit`.
    input_range : tuple of (float, float) or None
        Least and greatest value of each channel of the images of `fit`.
    preprocessing : str or None
        What made the images of `fit` out of files, in words, where that was not this package; kept in the bundle.
    batch_dependence : str
        How the answer to a request depends on the others of its batch, with numbers; empty if it does not.
    retrained_with : LabelledCounts or None
        How many labelled inputs it learned from; None if it was never retrained.
    backup : Backup or None
        Whose label `relabel` answers with, and a reviewer sees; None: the replacement head's.
    recovery : mapping of str to float
        Share of planted triggers that each candidate gave their true label, by name; empty if nothing was measured.
    relabels : bool
        False if the second opinion did not reach the floor: `relabel` then only flags.
    images_from : str or None
        Path of the clean images that it was fitted on, in the same order; the review page compares with them.
    digest : str or None
        Digest of the bundle that it was loaded from.
    """

    config: GuardConfig
    ensemble: Ensemble
    fusion: Fusion
    clean_scores: Float64Array
    reference: Activations
    reference_labels: IntArray
    realised_false_positive_rate: float
    contradictions: Contradictions | None = None
    reference_groups: IntArray | None = None
    class_names: tuple[str, ...] | None = None
    noisy_reference: Activations | None = None
    early: tuple[EarlyFit, ...] = ()
    depth: str = ""
    whole: Ensemble | None = None
    suspect: SuspectModel | None = None
    weights_digest: str | None = None
    split_points: SplitPoints | None = None
    input_shape: tuple[int, ...] | None = None
    input_range: tuple[tuple[float, float], ...] | None = None
    preprocessing: str | None = None
    batch_dependence: str = ""
    retrained_with: LabelledCounts | None = None
    backup: Backup | None = None
    recovery: Mapping[str, float] = field(default_factory=dict)
    relabels: bool = True
    images_from: str | None = None
    digest: str | None = None
    clean_answers: IntArray | None = None
    class_ranks: ClassRanks | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_ranks", self._class_ranks())

    def _class_ranks(self) -> ClassRanks | None:
        if self.config.false_positive_rate_scope == "all":
            return None
        if self.clean_answers is None:
            raise ConfigError(
                "false_positive_rate_scope 'class' needs to know what the network answered to the clean images of the "
                "calibration, and this bundle is of a version that did not keep it. Fit again, or take the scope 'all'."
            )
        n_classes = self.reference.logits.shape[1]
        groups = class_groups(self.clean_answers, n_classes, self.config.false_positive_rate)
        return ClassRanks.among(self.clean_scores, self.clean_answers, groups)

    @property
    def is_distinct(self) -> BoolArray:
        """The first of every group of copies among the clean reference, shape (n,)."""
        n = len(self.reference_labels)
        groups = np.arange(n) if self.reference_groups is None else self.reference_groups
        return np.isin(np.arange(n), np.unique(groups, return_index=True)[1])

    def _calibration(self) -> Calibration:
        return Calibration(self.ensemble, self.fusion, self.clean_scores)

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
        suspect = self.suspect
        weights_digest = self.weights_digest if suspect is None else suspect.digest
        points = self.split_points if suspect is None else suspect.split_points
        document = {
            "settings": self.config.portable(),
            "class_names": self.class_names,
            "input_shape": self.input_shape,
            "input_range": self.input_range,
            "preprocessing": self.preprocessing,
            "n_classes": self.reference.logits.shape[1],
            "weights_digest": weights_digest,
            "split_points": points.as_dict() if points is not None else None,
            "depths": list(self.reference.depths),
            "detectors": self.ensemble.describe(),
            "clean_images": len(self.reference_labels),
            "reference_accuracy": share_right(self.reference, self.reference_labels),
            "realised_false_positive_rate": self.realised_false_positive_rate,
            "backup": self.backup.description if self.backup is not None else None,
            "recovery": dict(self.recovery),
            "relabels": self.relabels,
            "early": [
                {"depth": early.depth, "realised_false_positive_rate": early.realised_false_positive_rate}
                for early in self.early
            ],
            "retrained_with": self.retrained_with._asdict() if self.retrained_with is not None else None,
            "contradictions": asdict(self.contradictions) if self.contradictions is not None else None,
        }
        if self.images_from is not None:
            document["images_from"] = self.images_from
        if self.batch_dependence:
            document["batch_dependence"] = self.batch_dependence
        sample = self.reference[rows_scored(len(self.reference))]
        arrays: dict[str, AnyArray] = {
            "clean_scores": self.clean_scores,
            "labels": self.reference_labels,
            KEPT: reproduction(self._calibration(), sample),
        }
        if self.reference_groups is not None:
            arrays[GROUPS] = self.reference_groups
        if self.clean_answers is not None:
            arrays[ANSWERS] = self.clean_answers
        for prefix, part in (
            ("reference", dict(self.reference.items())),
            ("noisy_reference", dict(self.noisy_reference.items()) if self.noisy_reference is not None else {}),
            ("detector", self.ensemble.arrays()),
            ("fusion", self.fusion.arrays()),
            ("backup", self.backup.arrays() if self.backup is not None else {}),
        ):
            arrays |= {f"{prefix}.{name}": array for name, array in part.items()}
        for place, early in enumerate(self.early):
            again = reproduction(Calibration(early.ensemble, early.fusion, early.clean_scores), sample)
            early_arrays = {"clean_scores": early.clean_scores, KEPT: again, **early.fusion.arrays()}
            if early.clean_answers is not None:
                early_arrays[ANSWERS] = early.clean_answers
            arrays |= {f"early.{place}.{name}": array for name, array in early_arrays.items()}
        return write_bundle(directory, document, arrays)

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
            If the bundle is missing, damaged, of a newer schema, or was fitted for other weights; or if its arrays
            break their rules, or its calibration does not come out when the clean reference is scored again.
        """
        stored = read_bundle(path)
        check_stored(stored)
        document = stored.document
        try:
            if suspect is not None:
                _match(suspect, document, stored.digest)
            depths = document["depths"]
            noisy = _below(stored.arrays, "noisy_reference.")
            config, places = GuardConfig.from_portable(document["settings"])
            if places:
                logger.warning(
                    "bundle %s holds %s, which may tell a password to whoever reads it; it is not used. "
                    "Write it without: guard bundle clean %s",
                    stored.digest[:12],
                    ", ".join(places),
                    stored.digest[:12],
                )
            ensemble = Ensemble.restore(document["detectors"], _below(stored.arrays, "detector."))
            points, about, weights = document["split_points"], document.get("backup"), _below(stored.arrays, "backup.")
            check_backup(weights)
            retrained_with = document.get("retrained_with")
            layers = [depth for depth in depths if depth != BACKUP]
            guard = cls(
                config=config,
                ensemble=ensemble,
                fusion=new_fusion(config.mode).restore(_below(stored.arrays, "fusion.")),
                clean_scores=stored.arrays["clean_scores"],
                clean_answers=stored.arrays.get(ANSWERS),
                reference=_activations(_below(stored.arrays, "reference."), depths),
                reference_labels=stored.arrays["labels"],
                contradictions=Contradictions.from_document(document),
                reference_groups=stored.arrays.get(GROUPS),
                realised_false_positive_rate=document["realised_false_positive_rate"],
                class_names=tuple(document["class_names"]) if document["class_names"] else None,
                noisy_reference=_activations(noisy, depths) if noisy else None,
                early=_early_fits(ensemble, config, layers, document.get("early", []), _below(stored.arrays, "early.")),
                suspect=suspect,
                weights_digest=document["weights_digest"],
                split_points=SplitPoints.from_dict(points) if points is not None else None,
                input_shape=tuple(document["input_shape"]) if document["input_shape"] else None,
                input_range=tuple((low, high) for low, high in document.get("input_range") or ()) or None,
                preprocessing=document["preprocessing"],
                batch_dependence=str(document.get("batch_dependence", "")),
                retrained_with=LabelledCounts(**retrained_with) if retrained_with is not None else None,
                backup=Backup.restore(about, weights, suspect.module if suspect else None) if about else None,
                recovery=document.get("recovery") or {},
                relabels=document.get("relabels", True),
                images_from=document.get("images_from"),
                digest=stored.digest,
            )
            guard._check_calibration(stored.arrays)
        except (KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"bundle {stored.digest[:12]} lacks {error}. Fit again with this version.") from error
        except (ValueError, IndexError, OverflowError, NotFittedError) as error:  # DataError is one, too
            reason = " ".join(str(error).split())[:300]
            raise BundleError(f"bundle {stored.digest[:12]} is not sound: {reason} {REMEDY}") from error
        except ConfigError as error:
            raise BundleError(f"bundle {stored.digest[:12]} was fitted with other settings: {error}") from error
        return guard

    def _check_calibration(self, arrays: Mapping[str, AnyArray]) -> None:
        """Refuse a calibration that does not come out, with DataError; `arrays` of a bundle hold what did in fit."""
        rows = rows_scored(len(self.reference))
        sample, labels = self.reference[rows], self.reference_labels[rows]
        check_calibration("the guard", self._calibration(), sample, labels, arrays.get(KEPT))
        for place, verdict in enumerate(self.early):
            name, kept = f"the verdict at {verdict.depth}", arrays.get(f"early.{place}.{KEPT}")
            require({"clean_scores": verdict.clean_scores}, "clean_scores", (len(self.clean_scores),))
            check_same_answers(name, self.clean_answers, verdict.clean_answers)
            early = Calibration(verdict.ensemble, verdict.fusion, verdict.clean_scores)
            check_calibration(name, early, sample, labels, kept)


def without_places(path: Path) -> Path:
    """Write a bundle of an older version again, beside it, without what may hold a password; return the new folder.

    Raises
    ------
    BundleError
        If it is damaged, or cannot be written.
    """
    stored = read_bundle(path)
    settings = {name: value for name, value in stored.document["settings"].items() if name not in PLACES}
    return write_bundle(path.parent, {**stored.document, "settings": settings}, stored.arrays)


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
        suspect.use_split_points(SplitPoints.from_dict(points))


def _early_fits(
    ensemble: Ensemble,
    config: GuardConfig,
    layers: Sequence[str],
    about: Sequence[Mapping[str, Any]],
    arrays: Mapping[str, AnyArray],
) -> tuple[EarlyFit, ...]:
    if [entry["depth"] for entry in about] != layers[: len(about)]:
        raise DataError(f"early verdicts must look at {layers}, in this order.")
    fits = []
    for place, entry in enumerate(about):
        parts = _below(arrays, f"{place}.")
        fusion = new_fusion(config.mode).restore(parts)
        rate = entry["realised_false_positive_rate"]
        shallow = ensemble.up_to(layers[: place + 1])
        fits.append(EarlyFit(entry["depth"], shallow, fusion, parts["clean_scores"], parts.get(ANSWERS), rate))
    return tuple(fits)


def _activations(arrays: Mapping[str, AnyArray], depths: Sequence[str]) -> Activations:
    # A bundle that somebody else wrote may say halves are halves: they are not calculated with.
    single = {name: array.astype(np.float32) if array.dtype == np.float16 else array for name, array in arrays.items()}
    return Activations(single["logits"], single[FEATURES], {name: single[name] for name in depths})


def _below(arrays: Mapping[str, AnyArray], prefix: str) -> dict[str, AnyArray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
