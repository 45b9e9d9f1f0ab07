"""Fit a guard on what a command was given, and say what came of it: `guard fit` and `guard wrap` say the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from guard.cli.classes import listed
from guard.cli.images import NamedLabelledImages, naming_rows
from guard.cli.model import tell_passed_over
from guard.cli.output import print_warning, say
from guard.config import GuardConfig
from guard.detection.cross_fitting import Progress
from guard.detection.membership import membership
from guard.detection.pipeline import Guard
from guard.detection.unseen_classes import flagged_of_unseen_classes
from guard.suspect.model import SuspectModel
from guard.suspect.outputs import share_of_several_labels
from guard.types import BoolArray, Float32Array, IntArray

_MOST_THREADS = 8  # as each has its copy of the clean activations
_POOR = 0.5  # share of right answers, below which a guard is of little use


def fit_guard(
    suspect: SuspectModel,
    inputs: Float32Array,
    images: NamedLabelledImages,
    config: GuardConfig,
    threads: int | None,
    report: Progress,
) -> Guard:
    """Fit a guard on images as the network takes them, shape (n, channels, height, width), and warn of what they show.

    Parameters
    ----------
    suspect : SuspectModel
    inputs : ndarray of shape (n, channels, height, width), float32
    images : NamedLabelledImages
        Names, labels and class names of the inputs.
    config : GuardConfig
    threads : int or None
        Folds that are fitted side by side; None = one for each core that PyTorch may use, 8 at most.
    report : callable
        Called with a line of text and the share done.
    """
    if threads is None:
        threads = min(torch.get_num_threads(), _MOST_THREADS)
    with naming_rows(images):
        guard = Guard.fit(
            suspect, inputs, images.labels, config, class_names=images.class_names, threads=threads, progress=report
        )
    tell_membership(suspect, inputs, guard)
    tell_multi_label(guard)
    tell_contradictions(guard)
    return guard


def tell_fit(guard: Guard, images: NamedLabelledImages, layers: Sequence[str] = ()) -> None:
    """Say in a few lines what a guard was fitted on, where it looks, and what rate it keeps."""
    n_classes = guard.reference.logits.shape[1]
    accuracy = 100 * _share_right(guard)
    say(f"clean images    {len(images.names)}, of which the suspect model gets {accuracy:.1f} % right")
    say(f"per class       {images_per_class(guard.reference_labels, n_classes, guard.class_names)}")
    say(f"copies          {copies_among(guard, images.names)}")
    for line in layers:
        say(line)
    say(
        f"false positives {guard.realised_false_positive_rate:.4f} of clean images "
        f"(asked for {guard.config.false_positive_rate:g}, measured out of fold)"
    )
    if guard.class_ranks is not None:
        say(f"rate holds in   {classes_by_themselves(guard.class_ranks.is_shared, guard.class_names)}")


def warn_of_fit(guard: Guard, images: NamedLabelledImages) -> None:
    """Warn of what was passed over, of classes without images, and of a network that gets few of the labels right."""
    tell_passed_over(images.passed_over)
    _tell_missing(guard)
    if guard.class_ranks is not None:
        print_warning(
            "with false_positive_rate_scope 'class' the class that an attacker aims at sets a threshold of its own, "
            "and far more of a backdoor's inputs pass. See docs/detection.md, A rate in each class."
        )
    if (accuracy := _share_right(guard)) < _POOR:
        print_warning(
            f"the suspect model gets only {100 * accuracy:.1f} % of these labels right, so the guard will be poor. "
            "Are the classes in the model's order (--class-names), and the images preprocessed as it wants?"
        )


def _share_right(guard: Guard) -> float:
    return float((guard.reference.predicted_labels == guard.reference_labels).mean())


def images_per_class(labels: IntArray, n_classes: int, names: Sequence[str] | None) -> str:
    """Return in one line how many images the classes have."""
    counts = np.bincount(labels, minlength=n_classes)
    if counts.min() == counts.max():
        return f"{counts[0]} of each of {n_classes} classes"
    fewest = np.argsort(counts, kind="stable")[:3]
    return f"{counts.min()} to {counts.max()} of each of {n_classes} classes; fewest: {listed(fewest, names, counts)}"


def classes_by_themselves(is_shared: BoolArray, names: Sequence[str] | None) -> str:
    """Return in one line in which classes the rate holds, and which share a threshold, shape (n_classes,)."""
    shared = np.flatnonzero(is_shared)
    own = f"each of {len(is_shared) - len(shared)} classes that the model answers"
    if len(shared) == 0:
        return own
    few = f"{listed(shared, names)}: too few clean images are answered so"
    return f"{own}, and in the other {len(shared)} together ({few})"


def copies_among(guard: Guard, names: Sequence[str]) -> str:
    """Return in one line how many of the clean images are copies of others; warn of copies in several classes.

    Parameters
    ----------
    guard : Guard
    names : sequence of str
        Of the clean images.
    """
    groups, labels = guard.reference_groups, guard.reference_labels
    if groups is None:
        return "none found"
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    contradicting = np.flatnonzero(labels != labels[first][group])
    if len(contradicting):
        row = int(contradicting[0])
        print_warning(
            f"{len(contradicting)} clean images are copies of images of another class, the first {names[row]} of "
            f"{names[first[group[row]]]}; the class of the earlier one counts. Which is right?"
        )
    return (
        f"{len(labels) - len(first)} of {len(labels)} images; what is promised is promised of the {len(first)} others"
    )


def _tell_missing(guard: Guard) -> None:
    """Warn of classes of the network that have no clean image, with the rate of false alarms to be expected."""
    counts = np.bincount(guard.reference_labels, minlength=guard.reference.logits.shape[1])
    missing = np.flatnonzero(counts == 0)
    if len(missing) == 0:
        return
    unseen, realised = flagged_of_unseen_classes(guard), guard.realised_false_positive_rate
    share = len(missing) / len(counts)
    overall = share * unseen + (1 - share) * realised
    print_warning(
        f"{len(missing)} of the network's {len(counts)} classes have no clean image: "
        f"{listed(missing, guard.class_names)}. About {100 * unseen:.0f} % of their clean traffic will be flagged "
        f"(measured on classes that were left out): {100 * overall:.1f} % of all traffic if every class is as frequent "
        f"as any other, where {100 * guard.config.false_positive_rate:g} % were asked for."
    )


def tell_membership(suspect: SuspectModel, inputs: Float32Array, guard: Guard) -> None:
    """Warn of clean images that the network seems to have been trained on."""
    found = membership(suspect, inputs, guard.reference_labels)
    if found.is_noticed:
        print_warning(
            f"the network seems to have been trained on these images: it gets {100 * found.errors:.1f} % of them wrong "
            f"(loss {found.loss:.2g}), and {100 * found.moved_errors:.1f} % when they are moved a little (loss "
            f"{found.moved_loss:.2g}). More of the clean traffic will be flagged than asked for. Give images that it "
            "was not trained on. See docs/detection.md, Clean images."
        )


def tell_contradictions(guard: Guard) -> None:
    """Warn of as many sure mistakes of the network as an attack on the calibration needs."""
    found = guard.contradictions
    if found is not None and found.is_noticed:
        print_warning(
            f"{found.told}. A network may be trained so, to raise the guard's threshold above its triggered inputs: "
            "the false-positive rate is then as asked for, and few of them are flagged. Are the labels right? If they "
            f"are, do not trust the network; at least ask for a rate well above {100 * found.share:.1f} %. See "
            "docs/detection.md, Attack on calibration."
        )


def tell_multi_label(guard: Guard) -> None:
    """Warn of a network that seems to answer several labels of one image."""
    logits = guard.reference.logits
    if share := share_of_several_labels(logits):
        print_warning(
            f"on {100 * share:.0f} % of the images two or more of the network's {logits.shape[1]} logits are positive, "
            "and nearly all are far from 0, as of a multi-label classifier. The guard takes the largest for the only "
            "answer. If several labels may be right, guard each by itself: a module that returns one logit is guarded "
            "as two classes. If the network was trained for one class per image, all is well."
        )
