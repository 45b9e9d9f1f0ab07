"""Triggers that move pixels instead of painting them."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from guard.attacks.triggers.checks import check_range, check_unit_images, check_whole
from guard.attacks.triggers.randomness import image_rng
from guard.types import Float32Array

# Images warped at a time: bounds the memory.
_CHUNK = 2048


def wanet(
    images: Float32Array,
    *,
    k: int = 4,
    s: float = 0.5,
    grid_rescale: float = 1.0,
    seed: int = 0,
    noise: bool = False,
) -> Float32Array:
    """Warp the image a little and smoothly, always by the same field; or, as a cover, by that field and noise.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        Any size, any number of channels. Not changed.
    k : int
        The field comes from k x k random control points, at least 2.
    s : float
        Strength in [0, 10]: the mean shift of the control points is s / 2 pixels.
    grid_rescale : float
        The places where pixels are read are multiplied by this, in [0, 1]; a little less than 1 keeps the warp off
        the border, where places are cut off.
    seed : int
        Draws the control points and the noise, at least 0.
    noise : bool
        Noise mode: every pixel of every image is read up to half a pixel further off, uniformly. Such images keep
        their true labels in training, which teaches the network the exact field. Drawn from the seed and the image's
        own values.

    Returns
    -------
    images : ndarray of the same shape, float32
        A new array.

    Raises
    ------
    DataError
        If the images or a parameter break the rules above.

    References
    ----------
    .. [1] Nguyen, Tran (2021), WaNet, ICLR (arXiv 2102.10369), sections 3.2 and 3.3: control points uniform in [-1, 1],
       divided by their mean absolute value, bicubic upsampling, field s / height (here both ways: the paper's images
       are square), cut off at [-1, 1], bilinear reading; k = 4, s = 0.5. The noise is uniform in [-1, 1] / height.
    """
    check_unit_images(images)
    check_whole("k", k, 2)
    check_range("s", s, 0.0, 10.0)
    check_range("grid_rescale", grid_rescale, 0.0, 1.0)
    check_whole("seed", seed, 0)
    if not images.size:
        return images.copy()
    grid = _backdoor_grid(images.shape[2], images.shape[3], k, s, grid_rescale, seed)
    return np.concatenate([_warp(images[i : i + _CHUNK], grid, seed, noise) for i in range(0, len(images), _CHUNK)])


def _backdoor_grid(height: int, width: int, k: int, s: float, rescale: float, seed: int) -> torch.Tensor:
    control = np.random.default_rng(seed).uniform(-1.0, 1.0, (1, 2, k, k))
    control /= np.abs(control).mean()
    field = functional.interpolate(torch.from_numpy(control), size=(height, width), mode="bicubic", align_corners=True)
    rows, columns = torch.linspace(-1.0, 1.0, height).double(), torch.linspace(-1.0, 1.0, width).double()
    identity = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)  # (height, width, (x, y))
    grid = (identity + s * field[0].permute(1, 2, 0) / height) * rescale
    return grid.clamp(-1.0, 1.0).float()


def _warp(images: Float32Array, grid: torch.Tensor, seed: int, noise: bool) -> Float32Array:
    grids = grid.expand(len(images), -1, -1, -1)
    if noise:
        size = tuple(grid.shape)
        offsets = np.stack([image_rng(image, seed).random(size, dtype=np.float32) for image in images])
        grids = (grids + (2.0 * torch.from_numpy(offsets) - 1.0) / images.shape[2]).clamp(-1.0, 1.0)
    source = torch.from_numpy(np.ascontiguousarray(images))
    warped = functional.grid_sample(source, grids, mode="bilinear", align_corners=True)
    result: Float32Array = warped.clamp(0.0, 1.0).numpy()
    return result
