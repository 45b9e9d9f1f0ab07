"""Triggers in the frequency domain."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.fft import dctn, idctn

from guard.errors import DataError
from guard.lab.attacks.triggers.checks import check_count, check_places, check_positive, check_unit_images
from guard.types import Float32Array, Float64Array

# RGB to YUV, ITU-R BT.601.
_TO_YUV = np.array([[0.299, 0.587, 0.114], [-0.14713, -0.28886, 0.436], [0.615, -0.51499, -0.10001]])
_TO_RGB = np.linalg.inv(_TO_YUV)


def dct(
    images: Float32Array,
    *,
    magnitude: float = 30 / 255,
    places: Sequence[tuple[int, int]] = ((15, 15), (31, 31)),
    block: int = 32,
) -> Float32Array:
    """Raise a middle and a high frequency of the colour channels U and V, block by block.

    To each named coefficient of the orthonormal type-II DCT of every block, `magnitude` is added. Blocks are at most
    as large as the image; what is left over at the right and the bottom stays as it is. Places are those of a 32 x 32
    block and are scaled to the block in use, rounding down. Images whose channel count is not 3 are changed themselves.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        At least 2 x 2. Not changed.
    magnitude : float
        Added to each coefficient, > 0, as a share of the pixel range.
    places : sequence of (row, column)
        Coefficients in a 32 x 32 block, 0 to 31.
    block : int
        Side of a block, in pixels, >= 2.

    Returns
    -------
    images : ndarray of the same shape, float32

    Raises
    ------
    DataError
        If images or parameters break a rule.

    References
    ----------
    .. [1] Wang, Yao, Xu, An, Tong, Wang (2022), An Invisible Black-box Backdoor Attack through Frequency Domain
       (FTrojan), ECCV: UV channels, blocks of 32, coefficients (15, 15) and (31, 31), magnitude 30 on small images.
       Other block sizes, what is left over, and images without three channels are our rules.
    """
    check_unit_images(images)
    check_count("block", block, least=2)
    check_positive("magnitude", magnitude)
    check_places(places)
    for row, column in places:
        if not (0 <= row < 32 and 0 <= column < 32):
            raise DataError(f"places must be 0 to 31 in a 32 x 32 block, got ({row}, {column}).")
    height, width = images.shape[2:]
    side = min(block, height, width)
    if side < 2:
        raise DataError(f"frequencies need images of at least 2 x 2, got {height} x {width}.")
    if len(images) == 0:
        return images.copy()
    colour = images.shape[1] == 3
    work = np.einsum("dc,nchw->ndhw", _TO_YUV, images) if colour else images.astype(np.float64)
    scaled = [(row * side // 32, column * side // 32) for row, column in places]
    changed = slice(1, 3) if colour else slice(None)
    for top in range(0, height - side + 1, side):
        for left in range(0, width - side + 1, side):
            window = work[:, changed, top : top + side, left : left + side]
            window[...] = _raised(window, magnitude, scaled)
    mixed = np.einsum("dc,nchw->ndhw", _TO_RGB, work) if colour else work
    triggered: Float32Array = np.clip(mixed, 0.0, 1.0).astype(np.float32)
    return triggered


def _raised(window: Float64Array, magnitude: float, places: Sequence[tuple[int, int]]) -> Float64Array:
    coefficients = dctn(window, axes=(2, 3), norm="ortho")
    for row, column in places:
        coefficients[:, :, row, column] += magnitude
    raised: Float64Array = idctn(coefficients, axes=(2, 3), norm="ortho")
    return raised
