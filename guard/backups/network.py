"""The network that a backup is built on: small, made from five numbers, so that a bundle can make it again."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from guard.errors import DataError

_WIDTHS = (32, 48, 64, 96)
_SMALLEST_SIDE = 8


class BackupCnn(nn.Module):
    """Four 3 x 3 convolutions with batch norm and ReLU, three MaxPool 2, the largest of each quarter, one Linear.

    For images of any size from 8 x 8; about 100,000 weights. Shares nothing with the suspect model.

    Parameters
    ----------
    n_classes, channels : int
        >= 2 and >= 1.
    """

    def __init__(self, n_classes: int, channels: int) -> None:
        super().__init__()
        if n_classes < 2 or channels < 1:
            raise DataError(f"n_classes must be >= 2 and channels >= 1, got {n_classes} and {channels}.")
        self.blocks = nn.Sequential()
        for before, width in pairwise((channels, *_WIDTHS)):
            layers: list[nn.Module] = [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            if width != _WIDTHS[-1]:
                layers.append(nn.MaxPool2d(2))
            self.blocks.append(nn.Sequential(*layers))
        self.pool = nn.AdaptiveMaxPool2d(2)
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(0.3)
        self.fc = nn.Linear(4 * _WIDTHS[-1], n_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape (n, n_classes)."""
        logits: Tensor = self.fc(self.dropout(self.flatten(self.pool(self.blocks(images)))))
        return logits


def backup_cnn(n_classes: int, channels: int, image_size: tuple[int, int], seed: int) -> BackupCnn:
    """Return an untrained `BackupCnn` in eval mode; the global random state is left as it was.

    Raises
    ------
    DataError
        If a number is too small.
    """
    if min(image_size) < _SMALLEST_SIDE:
        raise DataError(f"images must be at least {_SMALLEST_SIDE} pixels high and wide, got {tuple(image_size)}.")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = BackupCnn(n_classes, channels)
    return network.eval()
