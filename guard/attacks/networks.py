"""Architectures that the demo and the benchmark train; imports only torch, so the file also works as a model file."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MnistCnn(nn.Module):
    """Two convolutions and two fully connected layers for 1 x 28 x 28 images.

    Conv 1-16 k5, ReLU, MaxPool 2, Conv 16-32 k5, ReLU, MaxPool 2, Linear 512-512, ReLU, Linear 512-10; no padding,
    281,034 weights. Takes float32 (n, 1, 28, 28) in [0, 1], gives logits (n, 10).

    References
    ----------
    .. [1] Gu, Dolan-Gavitt, Garg (2019), BadNets (arXiv 1708.06733), Table 1, which pools by average.
    .. [2] Fu et al. (2020), arXiv 2011.02526, Table 9.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, kernel_size=5)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=5)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(512, 512)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(512, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape (n, 10)."""
        x = self.pool1(self.relu1(self.conv1(images)))  # (n, 16, 12, 12)
        x = self.pool2(self.relu2(self.conv2(x)))  # (n, 32, 4, 4)
        x = self.relu3(self.fc1(self.flatten(x)))  # (n, 512)
        logits: Tensor = self.fc2(x)
        return logits


def mnist_cnn(seed: int | None = None) -> MnistCnn:
    """Return an untrained `MnistCnn`.

    Parameters
    ----------
    seed : int, optional
        Start weights drawn from this seed, the global random state left as it was. None draws from the global state.
    """
    if seed is None:
        return MnistCnn()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MnistCnn()
