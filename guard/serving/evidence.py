"""What a reviewer and the next retraining need of an input, taken while its forward pass is at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from guard.types import Activations, Float32Array, Verdict


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """Of one row of a forward pass; copies, so that they outlive it.

    Attributes
    ----------
    verdict : Verdict
        Of the row; of an audit with surprise and second opinion, as a flagged row has them.
    activations : Activations
        One row.
    inputs : ndarray of shape (channels, height, width), float32
        What the network saw.
    backup_label : int or None
        Second opinion of the guard's backup, or of its replacement head if it has none; None if it is not finite.
    backup_confidence : float or None
        Its softmax probability, in [0, 1].
    audit_probability : float or None
        None for a flagged row; else it is one of the audit sample, and was drawn with this probability.
    """

    verdict: Verdict
    activations: Activations
    inputs: Float32Array
    backup_label: int | None
    backup_confidence: float | None
    audit_probability: float | None = None


def collect_evidence(
    activations: Activations,
    inputs: torch.Tensor,
    verdicts: Sequence[Verdict],
    drawn: Mapping[int, float] | None = None,
) -> list[Evidence | None]:
    """Return the evidence of every poisoned row and every audit; None for the others, which cost nothing.

    Parameters
    ----------
    activations : Activations of n rows
    inputs : Tensor of shape (n, channels, height, width)
    verdicts : sequence of n Verdict
    drawn : mapping of int to float, optional
        Unflagged rows of the audit sample, with the probability of each.
    """
    drawn = drawn or {}
    evidence: list[Evidence | None] = [None] * len(verdicts)
    rows = [row for row, verdict in enumerate(verdicts) if verdict.is_poisoned or row in drawn]
    if not rows:
        return evidence
    flagged = activations[np.array(rows)]
    images = inputs[rows].detach().to("cpu", torch.float32).numpy()
    for index, row in enumerate(rows):
        verdict = verdicts[row]
        label, confidence = _surest(verdict.second_opinion)
        of_row = flagged[index : index + 1]
        evidence[row] = Evidence(verdict, of_row, images[index], label, confidence, drawn.get(row))
    return evidence


def _surest(logits: Float32Array | None) -> tuple[int, float] | tuple[None, None]:
    """Return the label of the largest logit, and its softmax probability."""
    if logits is None:
        return None, None
    label = int(logits.argmax())
    return label, float(1 / np.exp(logits.astype(np.float64) - float(logits[label])).sum())
