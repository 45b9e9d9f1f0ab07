"""A tiny network for 28 x 28 digits."""

from torch import nn


def make() -> nn.Module:
    """Return the network, untrained."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, 2),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(200, 16),
        nn.ReLU(),
        nn.Linear(16, 10),
    )
