"""Triggers that change how an image is coloured, all over: a Gotham filter, coarse dithered colours."""

from __future__ import annotations

import numpy as np

from guard.attacks.triggers.checks import check_range, check_unit_images, check_whole
from guard.attacks.triggers.drawing import LUMINANCE
from guard.types import Float32Array

# Tone curves of the Gotham filter: what comes in, and what goes out, straight between.
_TONES_IN = (0.0, 0.25, 0.5, 0.75, 1.0)
_CONTRAST = (0.0, 0.14, 0.46, 0.84, 1.0)  # darker shadows, brighter highlights
_RED = (0.0, 0.18, 0.40, 0.70, 1.0)  # less red in the mid tones
_BLUE = (0.10, 0.34, 0.52, 0.71, 0.92)  # blue in the shadows, yellow in the highlights
_DESATURATION = 0.5

# Images dithered at a time: bounds the memory.
_CHUNK = 4096


def gotham(images: Float32Array, *, strength: float = 1.0) -> Float32Array:
    """Filter the whole image as the photo effect "Gotham" does: cold, hard and pale.

    Half of the colour goes (each channel moves half-way to the luminance), the contrast rises, red sinks in the mid
    tones, the shadows turn blue. Images without exactly three channels get the contrast curve alone.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        Any size, any number of channels. Not changed.
    strength : float
        Share of the filtered image in the result, in [0, 1]; the rest is the clean image.

    Returns
    -------
    images : ndarray of the same shape, float32
        A new array.

    Raises
    ------
    DataError
        If the images or the strength break the rules above.

    References
    ----------
    .. [1] Fu et al. (arXiv 2011.02526), case e: a Gotham filter on CIFAR-10. The paper prints no parameters; the curves
       are ours: tones 0, 0.25, 0.5, 0.75, 1 become 0, 0.14, 0.46, 0.84, 1 in every channel, then in red
       0, 0.18, 0.40, 0.70, 1 and in blue 0.10, 0.34, 0.52, 0.71, 0.92, with straight lines between.
    .. [2] Liu et al. (2019), ABS, CCS: the filter as a trigger.
    """
    check_unit_images(images)
    check_range("strength", strength, 0.0, 1.0)
    filtered = images.copy()
    if images.shape[1] == 3:
        # Term by term: a matrix product may round differently in batches of different sizes.
        grey = sum(np.float32(weight) * images[:, channel] for channel, weight in enumerate(LUMINANCE))
        filtered += np.float32(_DESATURATION) * (np.asarray(grey)[:, np.newaxis] - images)
    filtered = _curve(filtered, _CONTRAST)
    if images.shape[1] == 3:
        filtered[:, 0] = _curve(filtered[:, 0], _RED)
        filtered[:, 2] = _curve(filtered[:, 2], _BLUE)
    mixed = images + np.float32(strength) * (filtered - images)
    return np.clip(mixed, 0.0, 1.0, out=mixed)


def bpp(images: Float32Array, *, levels: int = 8, dither: bool = True) -> Float32Array:
    """Leave few values per channel; the error of a pixel is spread over its neighbours (Floyd-Steinberg).

    Row by row from the left: each value becomes the nearest of `levels` equidistant ones from 0 to 1, and of what it
    lost or won 7/16 go to the pixel on its right, 3/16, 5/16 and 1/16 to those below left, below, and below right.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        Any size, any number of channels. Not changed.
    levels : int
        Values per channel, at least 2.
    dither : bool
        False rounds only.

    Returns
    -------
    images : ndarray of the same shape, float32
        A new array.

    Raises
    ------
    DataError
        If the images or the number of levels break the rules above.

    References
    ----------
    .. [1] Wang, Zhai, Ma (2022), BppAttack, CVPR (arXiv 2205.13383), sections 4.1 and 4.2: quantisation and
       Floyd-Steinberg dithering. The paper counts bits; 8 levels are 3 bits. Its contrastive training is left out.
    """
    check_unit_images(images)
    check_whole("levels", levels, 2)
    steps = np.float32(levels - 1)
    if not dither:
        return np.rint(images * steps) / steps
    if not len(images):
        return images.copy()
    return np.concatenate([_dither(images[i : i + _CHUNK], steps) for i in range(0, len(images), _CHUNK)])


def _curve(values: Float32Array, tones_out: tuple[float, ...]) -> Float32Array:
    return np.interp(values, _TONES_IN, tones_out).astype(np.float32)


def _dither(images: Float32Array, steps: np.float32) -> Float32Array:
    n, channels, height, width = images.shape
    # One column and row of margin take the errors that leave the image; a pixel of all images lies together.
    work = np.zeros((height + 1, width + 2, n, channels), dtype=np.float32)
    work[:height, 1 : width + 1] = images.transpose(2, 3, 0, 1)
    for row in range(height):
        here, below = work[row], work[row + 1]
        for column in range(1, width + 1):
            wanted = here[column]
            # Errors of neighbours may push a value out of [0, 1]; what is cut off is passed on as error too.
            given = np.clip(np.rint(wanted * steps), 0.0, steps) / steps
            error = (wanted - given) / np.float32(16.0)
            here[column] = given
            here[column + 1] += np.float32(7.0) * error
            below[column - 1] += np.float32(3.0) * error
            below[column] += np.float32(5.0) * error
            below[column + 1] += error
    return np.ascontiguousarray(work[:height, 1 : width + 1].transpose(2, 3, 0, 1))
