"""Re-training the last layer (RTLL), the defence that table 5 compares with."""

from __future__ import annotations

from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from guard.suspect.model import SuspectModel
from guard.types import Float32Array, IntArray

EPOCHS = 200
BATCH_SIZE = 64
LEARNING_RATE = 1e-3


class RetrainedLastLayer:
    """The suspect model with a new last fully connected layer, trained on clean images; all other layers stay.

    The layer starts from PyTorch's random weights for `Linear`; 200 epochs of Adam (learning rate 1e-3, batches of 64,
    no weight decay) on cross-entropy, without augmentation. No image is flagged.

    Parameters
    ----------
    module : Module
        The suspect model; not changed. Its last `Linear` must give the logits.
    seed : int
        Of start weights and batches.

    References
    ----------
    .. [1] Adi, Baum, Cisse, Pinkas, Keshet (2018), Turning your weakness into a strength: "Re-Train Last Layer".
    """

    def __init__(self, module: nn.Module, seed: int = 0) -> None:
        name = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)][-1]
        self._below = SuspectModel(module, split=name, depths=())
        self._seed = seed

    def fit(self, images: Float32Array, labels: IntArray) -> Self:
        """Train the layer on clean images (n, channels, height, width) and true labels (n,)."""
        activations = self._below.activations(images)
        inputs, targets = torch.from_numpy(activations.features), torch.from_numpy(np.array(labels))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            self._layer = nn.Linear(inputs.shape[1], activations.logits.shape[1])
            optimizer = torch.optim.Adam(self._layer.parameters(), lr=LEARNING_RATE)
            for _ in range(EPOCHS):
                order = torch.randperm(len(inputs))
                for start in range(0, len(order), BATCH_SIZE):
                    rows = order[start : start + BATCH_SIZE]
                    loss = F.cross_entropy(self._layer(inputs[rows]), targets[rows])
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
        return self

    def predict(self, images: Float32Array) -> IntArray:
        """Return the labels that the model gives with the new layer, shape (n,)."""
        features = torch.from_numpy(self._below.activations(images).features)
        with torch.no_grad():
            labels: IntArray = self._layer(features).argmax(1).numpy()
        return labels
