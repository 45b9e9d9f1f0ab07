"""BaDExpert: what is left of the suspect model when it has unlearned the clean images is the backdoor."""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.special import log_softmax

from guard.backups.backup_training import FitSettings, accuracy_of, fit_network
from guard.backups.clean_set import CleanSet
from guard.errors import DataError
from guard.lab.rivals.base import CountedNetwork, Rival
from guard.types import Float32Array, Float64Array, IntArray

_LONGER = 5


class BadExpert(Rival):
    """Probability of the suspect model's answer in a backdoor expert, over that in a finetuned auxiliary model.

    The expert is a copy of the suspect model, finetuned on the clean images with wrong labels, y + 1, until it gives at
    most the asked share of them their true label: a backdoor outlives that. The auxiliary model is a copy finetuned
    with the true labels, which a backdoor outlives less well. With the answer c of the suspect model, the score is
    log p_c(expert) - log p_c(auxiliary): the backdoor expert agrees, and the auxiliary model does not.

    Chosen where [1]_ leaves it open, or as what is known of it here: the joint rule on both confidences is their ratio;
    both learn by AdamW, the auxiliary model for all epochs with a rate that falls, the expert an epoch at a time; no
    augmentation, and running statistics of batch norm stay as they are, as few images would spoil them.

    Parameters
    ----------
    seed : int
        Of the order of the images.
    learning_rate : float
        > 0.
    left_accuracy : float
        Clean accuracy at which the expert has unlearned enough, in (0, 1).
    epochs : int
        Of the auxiliary model, >= 1; the expert has up to five times as many, as a hundred images teach little in one.

    References
    ----------
    .. [1] Xie et al. (2024), BaDExpert: Extracting Backdoor Functionality for Accurate Backdoor Input Detection
       (arXiv 2308.12439), section 3.
    """

    title = "BaDExpert"
    source = "Xie et al. 2024, arXiv 2308.12439"

    def __init__(
        self, *, seed: int = 0, learning_rate: float = 3e-4, left_accuracy: float = 0.2, epochs: int = 10
    ) -> None:
        super().__init__(seed=seed)
        if not 0.0 < left_accuracy < 1.0:
            raise DataError(f"left_accuracy must be in (0, 1), got {left_accuracy}.")
        self.left_accuracy = left_accuracy
        self._settings = FitSettings(epochs, epochs, learning_rate=learning_rate, augmentation=None)

    def _fit(self, images: Float32Array, labels: IntArray) -> None:
        self._expert, self._auxiliary = (self.counted(self.network.module) for _ in range(2))
        self._train(self._auxiliary, images, labels, self._settings, self.seed)
        wrong, one_epoch = (labels + 1) % self.n_classes, dataclasses.replace(self._settings, epochs=1)
        for epoch in range(_LONGER * self._settings.epochs):
            self._train(self._expert, images, wrong, one_epoch, self.seed + epoch)
            if accuracy_of(self._expert.module, images, labels) <= self.left_accuracy:
                break

    def _train(
        self, network: CountedNetwork, images: Float32Array, labels: IntArray, settings: FitSettings, seed: int
    ) -> None:
        clean = CleanSet(images, labels, images, labels, self.n_classes)
        fit_network(network.module, clean, settings, seed=seed, freeze_statistics=True)

    def _score(self, images: Float32Array) -> Float64Array:
        rows, answers = np.arange(len(images)), self.network.logits(images).argmax(axis=1)
        expert, auxiliary = (
            log_softmax(network.logits(images), axis=1)[rows, answers] for network in (self._expert, self._auxiliary)
        )
        scores: Float64Array = expert - auxiliary
        return scores
