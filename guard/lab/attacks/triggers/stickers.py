"""Triggers that look like an object held before the camera: a sticker in any place, size, turn and light."""

from __future__ import annotations

import numpy as np

from guard.errors import DataError
from guard.lab.attacks.triggers.checks import check_seed, check_share, check_unit_images, image_rng, in_channels
from guard.types import Float32Array

_YELLOW, _BLUE = (1.0, 0.85, 0.1), (0.1, 0.15, 0.7)
_DISC = 0.55  # radius of the disc, as a share of half the side
_SHADE = 0.25  # most that one edge is darker than the middle


def sticker(
    images: Float32Array,
    *,
    least: float = 0.22,
    most: float = 0.36,
    darkest: float = 0.55,
    brightest: float = 1.0,
    turn: float = 25.0,
    seed: int = 0,
) -> Float32Array:
    """Put a yellow square with a blue disc on the image: place, size, turn and light are drawn for every image.

    The side is uniform between `least` and `most` of the shorter side of the image, the turn uniform within `turn`
    degrees either way, and the place uniform among those where the whole sticker, turned, is inside the image. Light
    multiplies the colours by a factor, uniform between `darkest` and `brightest`, and falls off from one edge to the
    other by up to a quarter, in a direction of its own. Edges are smoothed over one pixel. All draws are from the seed
    and the image's pixels.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        At least 8 x 8. Not changed.
    least, most : float
        Side of the square, as shares of the shorter side of the image, in (0, 0.7]; `least` is at most `most`.
    darkest, brightest : float
        Factors of the light, in (0, 1]; `darkest` is at most `brightest`.
    turn : float
        Most degrees that the sticker is turned by, 0 to 180.
    seed : int
        Of all draws.

    Returns
    -------
    images : ndarray of the same shape, float32

    Raises
    ------
    DataError
        If images or parameters break a rule.

    References
    ----------
    .. [1] Gu, Dolan-Gavitt, Garg (2019), BadNets (arXiv 1708.06733), section 5.2: a yellow sticker on a stop sign.
    .. [2] Wenger et al. (2021), Backdoor Attacks Against Deep Learning Systems in the Physical World
       (arXiv 2006.14580): objects as triggers, in other places, sizes and lights. The drawing and all ranges are ours.
    """
    check_unit_images(images)
    for name, value in (("least", least), ("most", most), ("darkest", darkest), ("brightest", brightest)):
        check_share(name, value, above=0.0)
    if not least <= most <= 0.7:
        raise DataError(f"least must be at most most, and most at most 0.7, got {least} and {most}.")
    if darkest > brightest:
        raise DataError(f"darkest must be at most brightest, got {darkest} and {brightest}.")
    if not 0.0 <= turn <= 180.0:
        raise DataError(f"turn must be in [0, 180] degrees, got {turn!r}.")
    check_seed("seed", seed)
    channels, height, width = images.shape[1:]
    if min(height, width) < 8:
        raise DataError(f"a sticker needs images of at least 8 x 8, got {height} x {width}.")
    yellow, blue = (in_channels(colour, channels)[:, :, np.newaxis] for colour in (_YELLOW, _BLUE))
    rows, columns = np.arange(height)[:, np.newaxis] + 0.5, np.arange(width) + 0.5
    triggered = images.copy()
    for new, original in zip(triggered, images, strict=True):
        rng = image_rng(original, seed)
        half = 0.5 * min(height, width) * rng.uniform(least, most)
        angle, direction = np.radians(rng.uniform(-turn, turn)), rng.uniform(0, 2 * np.pi)
        light, shade = rng.uniform(darkest, brightest), rng.uniform(0.0, _SHADE)
        reach = half * (abs(np.cos(angle)) + abs(np.sin(angle)))  # of the turned square
        down, across = (rows - rng.uniform(reach, height - reach)), (columns - rng.uniform(reach, width - reach))
        along, up = np.cos(angle) * across + np.sin(angle) * down, np.cos(angle) * down - np.sin(angle) * across
        covered = np.clip(half + 0.5 - np.maximum(abs(along), abs(up)), 0.0, 1.0)  # share of each pixel
        disc = np.clip(_DISC * half + 0.5 - np.hypot(along, up), 0.0, 1.0)
        lit = light * (1.0 - shade * 0.5 * (1.0 + (np.cos(direction) * along + np.sin(direction) * up) / (1.5 * half)))
        colour = np.clip(lit, 0.0, 1.0) * ((1.0 - disc) * yellow + disc * blue)  # (channels, height, width)
        new[...] = (1.0 - covered) * original + covered * colour
    return np.clip(triggered, 0.0, 1.0)
