"""Triggers that change colours everywhere: a Gotham-style filter and coarse quantisation."""

from __future__ import annotations

import numpy as np

from guard.lab.attacks.triggers.checks import LUMINANCE, check_count, check_share, check_unit_images
from guard.types import Float32Array

# Tone curves as (input, output) points, straight lines between them.
_CONTRAST = ((0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.16, 0.5, 0.84, 1.0))
_RED = ((0.0, 0.5, 1.0), (0.0, 0.4, 1.0))  # less red in the middle
_BLUE = ((0.0, 0.25, 0.75, 1.0), (0.1, 0.32, 0.72, 0.95))  # bluish shadows, yellowish lights
_COLOUR_KEPT = 0.4  # of saturation


def gotham(images: Float32Array, *, strength: float = 1.0) -> Float32Array:
    """Apply a Gotham-style filter: little colour, high contrast, less red, bluish shadows.

    In this order: colours are drawn 60 % towards grey; every channel goes through a contrast curve; red and blue go
    through curves of their own. Images whose channel count is not 3 get the contrast curve alone.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        Not changed.
    strength : float
        Share of the filtered image in the result, in (0, 1].

    Returns
    -------
    images : ndarray of the same shape, float32

    Raises
    ------
    DataError
        If images or strength break a rule.

    References
    ----------
    .. [1] Fu et al. (2020), arXiv 2011.02526, case e: "a Gotham filter"; the curves are ours.
    """
    check_unit_images(images)
    check_share("strength", strength, above=0.0)
    filtered = images.astype(np.float64)
    if images.shape[1] == 3:
        grey = np.einsum("c,nchw->nhw", np.array(LUMINANCE), filtered)[:, np.newaxis]
        filtered = grey + _COLOUR_KEPT * (filtered - grey)
    filtered = np.interp(filtered, *_CONTRAST)
    if images.shape[1] == 3:
        filtered[:, 0] = np.interp(filtered[:, 0], *_RED)
        filtered[:, 2] = np.interp(filtered[:, 2], *_BLUE)
    mixed = (1 - strength) * images + strength * filtered
    return np.clip(mixed, 0.0, 1.0).astype(np.float32)


def bpp(images: Float32Array, *, levels: int = 8, dither: bool = True) -> Float32Array:
    """Quantise every channel to a few evenly spaced levels, with Floyd-Steinberg dithering.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        Not changed.
    levels : int
        Values per channel, 0 and 1 included, >= 2.
    dither : bool
        Hand each pixel's rounding error on: 7/16 to the right, 3/16, 5/16 and 1/16 to the three below.

    Returns
    -------
    images : ndarray of the same shape, float32

    Raises
    ------
    DataError
        If images or levels break a rule.

    References
    ----------
    .. [1] Wang, Zhai, Ma (2022), BppAttack: Stealthy and Efficient Trojan Attacks against Deep Neural Networks via
       Image Quantization and Contrastive Adversarial Learning (arXiv 2205.13383). Its contrastive training is not used.
    """
    check_unit_images(images)
    check_count("levels", levels, least=2)
    top = levels - 1
    if not dither:
        return (np.rint(images * top) / top).astype(np.float32)
    height, width = images.shape[2:]
    work = np.zeros((*images.shape[:2], height + 1, width + 2))  # a border takes the errors that leave the image
    work[:, :, :height, 1:-1] = images
    for row in range(height):
        for column in range(1, width + 1):
            old = work[:, :, row, column].copy()
            new = np.clip(np.rint(old * top), 0, top) / top
            work[:, :, row, column] = new
            error = old - new
            work[:, :, row, column + 1] += error * (7 / 16)
            work[:, :, row + 1, column - 1] += error * (3 / 16)
            work[:, :, row + 1, column] += error * (5 / 16)
            work[:, :, row + 1, column + 1] += error * (1 / 16)
    return work[:, :, :height, 1:-1].astype(np.float32)
