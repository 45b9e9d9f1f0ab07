"""Triggers laid over the whole image: a blended pattern, a sinusoid, and the adaptive attacks' pieces and patches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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


def blend(images: Float32Array, *, alpha: float = 0.2, seed: int = 0) -> Float32Array:
    """Mix a fixed pattern of uniform noise into the image: (1 - alpha) x + alpha pattern.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        Not changed.
    alpha : float
        Share of the pattern, in (0, 1].
    seed : int
        Of the pattern: uniform in [0, 1), drawn for (channels, height, width).

    Returns
    -------
    images : ndarray of the same shape, float32

    Raises
    ------
    DataError
        If images or alpha break a rule.

    References
    ----------
    .. [1] Chen et al. (2017), Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning
       (arXiv 1712.05526), section 4.1, with its random pattern and blend ratio 0.2.
    """
    check_unit_images(images)
    check_share("alpha", alpha, above=0.0)
    check_seed("seed", seed)
    return _mix(images, _noise(images.shape[1:], seed), np.float32(alpha))


def sig(images: Float32Array, *, periods: float = 6, amplitude: float = 20 / 255) -> Float32Array:
    """Add a horizontal sinusoid: amplitude sin(2 pi j periods / width) in column j, clipped to [0, 1].

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        Not changed.
    periods : float
        Over the whole width, > 0.
    amplitude : float
        In (0, 1]; the paper and its followers use 20/255 to 40/255.

    Returns
    -------
    images : ndarray of the same shape, float32

    Raises
    ------
    DataError
        If images or parameters break a rule.

    References
    ----------
    .. [1] Barni, Kallas, Tondi (2019), A New Backdoor Attack in CNNs by Training Set Corruption Without Label
       Poisoning (arXiv 1902.11237), section 3: v(i, j) = Delta sin(2 pi j f / m), f = 6. The paper counts j
       from 1, we from 0.
    """
    check_unit_images(images)
    check_share("amplitude", amplitude, above=0.0)
    check_positive("periods", periods)
    width = images.shape[3]
    wave = amplitude * np.sin(2 * np.pi * np.arange(width) * periods / width)
    triggered: Float32Array = np.clip(images + wave.astype(np.float32), 0.0, 1.0)
    return triggered


def adaptive_blend(
    images: Float32Array, *, alpha: float = 0.2, seed: int = 0, pieces: int = 4, kept: float = 1.0, mask_seed: int = 0
) -> Float32Array:
    """Blend in a share of the pattern's pieces, others for every image.

    The pattern of `blend` is cut into pieces x pieces tiles, of which round(kept * pieces^2) are used, drawn from
    `mask_seed` and the image's pixels. Training uses half, the attack all, so that no image of the training set
    shows the whole trigger.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        Not changed.
    alpha : float
        Share of the pattern, in (0, 1].
    seed : int
        Of the pattern.
    pieces : int
        Tiles along each side; at most the shorter side.
    kept : float
        Share of tiles used, in (0, 1].
    mask_seed : int
        Of the choice of tiles.

    Returns
    -------
    images : ndarray of the same shape, float32

    Raises
    ------
    DataError
        If images or parameters break a rule, or no tile is kept.

    References
    ----------
    .. [1] Qi, Xie, Li, Mahloujifar, Mittal (2023), Revisiting the Assumption of Latent Separability for Backdoor
       Defenses, section 4: Adap-Blend, 16 pieces, half of them in training, alpha 0.2. Its picture is noise here.
    """
    check_unit_images(images)
    check_share("alpha", alpha, above=0.0)
    check_share("kept", kept, above=0.0)
    check_count("pieces", pieces)
    check_seed("seed", seed)
    check_seed("mask_seed", mask_seed)
    height, width = images.shape[2:]
    if pieces > min(height, width):
        raise DataError(f"pieces={pieces} cannot be cut from images of {height} x {width}. Use fewer.")
    count = round(kept * pieces**2)
    if count == 0:
        raise DataError(f"kept={kept} keeps none of {pieces**2} pieces. Raise it.")
    tile = np.arange(height)[:, np.newaxis] * pieces // height * pieces + np.arange(width) * pieces // width
    mixed = _mix(images, _noise(images.shape[1:], seed), np.float32(alpha))
    if count == pieces**2:
        return mixed
    for new, original in zip(mixed, images, strict=True):
        chosen = image_rng(original, mask_seed).choice(pieces**2, size=count, replace=False)
        off = ~np.isin(tile, chosen)
        new[:, off] = original[:, off]
    return mixed


def adaptive_patch(
    images: Float32Array,
    *,
    opacities: Sequence[float] = (0.5, 0.5, 0.2, 0.3),
    kept: int = 4,
    seed: int = 0,
    mask_seed: int = 0,
) -> Float32Array:
    """Lay faint patches into the corners; each image gets `kept` of the four, drawn for it.

    A patch is a square of noise, three eighths of the shorter side wide, fixed by the seed. Training shows one patch
    per image, the attack all four.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        At least 8 x 8. Not changed.
    opacities : sequence of 4 float
        Of the patches at top left, top right, bottom left and bottom right, in (0, 1].
    kept : int
        Patches per image, 1 to 4.
    seed : int
        Of the patches.
    mask_seed : int
        Of the choice of patches.

    Returns
    -------
    images : ndarray of the same shape, float32

    Raises
    ------
    DataError
        If images or parameters break a rule.

    References
    ----------
    .. [1] Qi, Xie, Li, Mahloujifar, Mittal (2023), Revisiting the Assumption of Latent Separability for Backdoor
       Defenses, section 4: Adap-Patch, four patches of opacities 0.5, 0.5, 0.2, 0.3. Patches and places are ours.
    """
    check_unit_images(images)
    if np.shape(opacities) != (4,):
        raise DataError(f"opacities must be 4 numbers, got {opacities!r}.")
    for opacity in opacities:
        check_share("opacities", opacity, above=0.0)
    check_count("kept", kept)
    if kept > 4:
        raise DataError(f"kept must be at most 4, the number of patches, got {kept}.")
    check_seed("seed", seed)
    check_seed("mask_seed", mask_seed)
    height, width = images.shape[2:]
    if min(height, width) < 8:
        raise DataError(f"four patches need images of at least 8 x 8, got {height} x {width}.")
    size = 3 * min(height, width) // 8
    places = [(top, left) for top in (0, height - size) for left in (0, width - size)]
    patches = [_noise((images.shape[1], size, size), seed + 1000 * number) for number in range(4)]
    triggered = images.copy()
    for new, original in zip(triggered, images, strict=True):
        for number in image_rng(original, mask_seed).choice(4, size=kept, replace=False):
            top, left = places[number]
            window = new[:, top : top + size, left : left + size]
            window[...] = _mix(window, patches[number], np.float32(opacities[number]))
    return triggered


def _noise(shape: tuple[int, ...], seed: int) -> Float32Array:
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def _mix(images: Float32Array, pattern: Float32Array, share: np.float32) -> Float32Array:
    mixed: Float32Array = (1 - share) * images + share * pattern
    return np.clip(mixed, 0.0, 1.0)  # rounding may end a hair above 1
