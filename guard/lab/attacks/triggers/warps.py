"""Triggers that bend the image: WaNet."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from guard.errors import DataError
from guard.lab.attacks.triggers.checks import (
    check_count,
    check_positive,
    check_seed,
    check_share,
    check_unit_images,
    image_rng,
)
from guard.types import Float32Array

_AT_ONCE = 1000  # images per grid_sample, so that their grids do not fill the memory


def wanet(
    images: Float32Array, *, k: int = 4, s: float = 0.5, grid_rescale: float = 1.0, seed: int = 0, noise: bool = False
) -> Float32Array:
    """Warp the image smoothly, by about s / 2 pixels on average.

    A k x k grid of offsets, uniform in [-1, 1] and divided by their mean size, is enlarged bicubically to the image;
    s times that, divided by the height, is added to where each pixel is read (coordinates run from -1 to 1), and all
    is multiplied by `grid_rescale` and cut off at the edges. Pixels are read bilinearly.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        At least 2 x 2. Not changed.
    k : int
        Points of the control grid along each side, >= 2.
    s : float
        Strength, > 0.
    grid_rescale : float
        In (0, 1]: keeps the warp inside the image.
    seed : int
        Of the control grid.
    noise : bool
        The paper's noise mode: on top of the warp every pixel of every image moves by an offset of its own, uniform in
        [-1, 1] / height, drawn from the seed and the image's pixels. In training such images keep their true label, so
        that the network learns this one warp and not warping as such.

    Returns
    -------
    images : ndarray of the same shape, float32

    Raises
    ------
    DataError
        If images or parameters break a rule.

    References
    ----------
    .. [1] Nguyen, Tran (2021), WaNet: Imperceptible Warping-based Backdoor Attack (arXiv 2102.10369), section 3.2:
       k = 4, s = 0.5; noise mode of section 3.3.
    """
    check_unit_images(images)
    check_count("k", k, least=2)
    check_positive("s", s)
    check_share("grid_rescale", grid_rescale, above=0.0)
    check_seed("seed", seed)
    height, width = images.shape[2:]
    if min(height, width) < 2:
        raise DataError(f"a warp needs images of at least 2 x 2, got {height} x {width}.")
    warp = _warp(height, width, k, s, seed)
    warped = np.empty_like(images)
    for start in range(0, len(images), _AT_ONCE):
        part = images[start : start + _AT_ONCE]
        grid = warp.expand(len(part), -1, -1, -1)
        if noise:
            offsets = np.stack([image_rng(row, seed).uniform(-1, 1, (height, width, 2)) for row in part])
            grid = grid + torch.from_numpy(offsets.astype(np.float32)) / height
        grid = (grid * grid_rescale).clamp(-1, 1)
        with torch.inference_mode():
            pixels = torch.from_numpy(np.require(part, requirements=["C", "W"]))
            warped[start : start + _AT_ONCE] = functional.grid_sample(pixels, grid, align_corners=True).numpy()
    return np.clip(warped, 0.0, 1.0)


def _warp(height: int, width: int, k: int, s: float, seed: int) -> torch.Tensor:
    """Return where each pixel is read, shape (1, height, width, 2), x before y, in [-1, 1] but for the edges."""
    control = np.random.default_rng(seed).uniform(-1, 1, (1, 2, k, k)).astype(np.float32)
    control /= np.abs(control).mean()
    field = functional.interpolate(torch.from_numpy(control), size=(height, width), mode="bicubic", align_corners=True)
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    identity = torch.stack((columns, rows), dim=-1)[None]
    return identity + s * field.permute(0, 2, 3, 1) / height
