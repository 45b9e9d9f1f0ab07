"""Triggers that a small network draws anew for every image."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from guard.errors import DataError
from guard.lab.attacks.triggers.checks import check_count, check_seed, check_share, check_unit_images, image_rng
from guard.types import Float32Array

_KERNEL = 5  # side of the first layer's filters
_SHARPNESS = 1.5  # of the squashing; higher = nearer to two values
_LEAST_SPREAD = 1e-6


def input_aware(
    images: Float32Array,
    *,
    opacity: float = 0.35,
    share: float = 0.5,
    width: int = 8,
    seed: int = 0,
    other: bool = False,
) -> Float32Array:
    """Blend in a pattern that depends on the image, at places that depend on the image: x (1 - m) + p m.

    Pattern p and mask m come from a generator of two convolutional layers. The first has `width` filters of 5 x 5,
    drawn normal from the seed and made free of a mean, so that flat regions give nothing; its maps, scaled to unit
    spread within the image, go through tanh. The second, of 3 x 3, gives one map per channel, p = (1 + tanh) / 2, and
    one map for the mask: m is `opacity` where that map is among its highest `share`, and 0 elsewhere.

    The generator is fixed by its seed. It is **not** trained together with the classifier as in [1]_, has no diversity
    loss, and no mask network of its own: what is learned is only the classifier's side of the attack.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        At least 4 x 4. Not changed.
    opacity : float
        Of the pattern where the mask is on, in (0, 1].
    share : float
        Of the pixels where the mask is on, in (0, 1].
    width : int
        Filters of the first layer.
    seed : int
        Of the generator.
    other : bool
        The paper's cross-trigger mode: the image carries the pattern and the mask of another image, and keeps its true
        label in training, so that only the own pattern works. As a trigger sees one image at a time, the other image
        is a copy of this one, mirrored both ways and shifted in a circle by at least a quarter of each side, by
        distances drawn from the seed and the image's pixels.

    Returns
    -------
    images : ndarray of the same shape, float32

    Raises
    ------
    DataError
        If images or parameters break a rule.

    References
    ----------
    .. [1] Nguyen, Tran (2020), Input-Aware Dynamic Backdoor Attack (arXiv 2010.08138), sections 3.2 and 3.3: trigger
       with a mask, eq. 3, and cross-trigger test. Layers, sizes and opacity are ours.
    """
    check_unit_images(images)
    check_share("opacity", opacity, above=0.0)
    check_share("share", share, above=0.0)
    check_count("width", width)
    check_seed("seed", seed)
    channels, height, image_width = images.shape[1:]
    if min(height, image_width) < 4:
        raise DataError(f"a generator needs images of at least 4 x 4, got {height} x {image_width}.")
    layers = _layers(channels, width, seed)
    triggered = np.empty(images.shape, dtype=np.float32)
    with torch.inference_mode():
        for new, original in zip(triggered, images, strict=True):
            seen = _other(original, seed) if other else original
            pattern, mask = _generate(torch.from_numpy(np.array(seen)), layers, share)
            strength = np.float32(opacity) * mask
            new[...] = (1 - strength) * original + strength * pattern
    return np.clip(triggered, 0.0, 1.0)


def _layers(channels: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    first = rng.standard_normal((width, channels, _KERNEL, _KERNEL))
    first -= first.mean(axis=(2, 3), keepdims=True)
    second = rng.standard_normal((channels + 1, width, 3, 3))
    return torch.from_numpy(first.astype(np.float32)), torch.from_numpy(second.astype(np.float32))


def _generate(image: Tensor, layers: tuple[Tensor, Tensor], share: float) -> tuple[Float32Array, Float32Array]:
    """Return pattern (channels, height, width) in [0, 1] and mask (height, width) of 0 and 1; one image at a time."""
    maps = image[None]
    for layer in layers:
        edge = layer.shape[-1] // 2
        maps = functional.conv2d(functional.pad(maps, (edge, edge, edge, edge), mode="replicate"), layer)
        spread = maps.std(dim=(2, 3), unbiased=False, keepdim=True)
        maps = torch.tanh(_SHARPNESS * (maps - maps.mean(dim=(2, 3), keepdim=True)) / (spread + _LEAST_SPREAD))
    place = maps[0, -1].numpy()
    mask = (place >= np.quantile(place, 1 - share)).astype(np.float32)
    pattern: Float32Array = (0.5 + 0.5 * maps[0, :-1]).numpy()
    return pattern, mask


def _other(image: Float32Array, seed: int) -> Float32Array:
    height, width = image.shape[1:]
    rng = image_rng(image, seed)
    down, across = (int(rng.integers(side // 4, side - side // 4 + 1)) for side in (height, width))
    return np.roll(image[:, ::-1, ::-1], (down, across), axis=(1, 2))
