"""Copies among clean images: the same image again (oversampling), or the same moved, turned, mirrored or cropped."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from guard.types import AnyArray, Float32Array, IntArray

#: Correlation of two images, the one moved and warped as fits best, from which they are copies for certain.
_CERTAIN = 0.995
#: From here they are copies in a class where so large a share of the images has another one so near, and so many have.
_LIKELY, _SHARE, _ENOUGH = 0.97, 0.5, 10
_SIZE = 32  # pixels of the shorter side that are compared
_REACH = 4  # pixels of these that an image is moved by, each way; fewer of smaller images
_LEAST_REACH = 2
#: Turns in degrees, parts of the side that a crop keeps, and how far those are moved.
_WARPS = ((-8.0, 1.0, 1), (-4.0, 1.0, 1), (4.0, 1.0, 1), (8.0, 1.0, 1), (0.0, 0.95, 2), (0.0, 0.9, 2), (0.0, 0.85, 2))
_CANDIDATES = 8  # images that each is compared with, nearest in what moving and mirroring do not change
_NOBODY = -1  # where a class has fewer
_ROWS = 32  # images that are compared at once


def copy_groups(images: Float32Array, labels: IntArray) -> IntArray:
    """Return one number per image, the same for an image and its copies.

    Equal images are copies whatever their labels. Near copies are looked for within each class: grey, at most 32 pixels
    wide, two images are correlated with each other under every shift by up to 4 pixels, under turns by 4 and 8 degrees,
    cropped to 95, 90 and 85 % of their sides, and mirrored either way; brightness and contrast do not count. A
    correlation of 0.995 is a copy. One of 0.97 is one in a class
    where at least half of the images have another so near them, as an augmented set has and a natural one has not.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32
    labels : ndarray of shape (n,), int64

    Returns
    -------
    groups : ndarray of shape (n,), int64
        From 0 to the number of distinct images, less 1.
    """
    groups = equal_rows([images])
    first = np.unique(groups, return_index=True)[1]
    left = right = np.empty(0, dtype=np.int64)
    if min(images.shape[2:]) > 4 * _LEAST_REACH:
        left, right = _near_pairs(_small(images[first]), labels[first])
    from scipy.sparse import coo_array  # here, as a server loads less without
    from scipy.sparse.csgraph import connected_components

    links = coo_array((np.ones(len(left)), (left, right)), shape=(len(first), len(first)))
    component: IntArray = connected_components(links, directed=False)[1].astype(np.int64)
    return component[groups]


def equal_rows(arrays: list[AnyArray]) -> IntArray:
    """Return one number per row, the same for rows that are equal in all arrays, shape (n,)."""
    numbers: dict[bytes, int] = {}
    keys = (b"".join(np.ascontiguousarray(row).tobytes() for row in rows) for rows in zip(*arrays, strict=True))
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def _small(images: Float32Array) -> Tensor:
    """Return images of one channel whose shorter side has 32 pixels or a few more, shape (n, height, width)."""
    step = max(1, min(images.shape[2:]) // _SIZE)
    parts = (torch.from_numpy(images[start : start + _ROWS]) for start in range(0, len(images), _ROWS))
    return torch.cat([functional.avg_pool2d(part.mean(1, keepdim=True), step)[:, 0] for part in parts])


def _near_pairs(small: Tensor, labels: IntArray) -> IntArray:
    """Return which of some images (n, height, width) are near copies of another of their class, shape (2, pairs)."""
    n, height, width = small.shape
    classes, class_of, counts = np.unique(labels, return_inverse=True, return_counts=True)
    candidates = torch.full((n, _CANDIDATES), _NOBODY)
    for number in range(len(classes)):
        rows = torch.from_numpy(np.flatnonzero(class_of == number))
        nearest = _nearest(small[rows])
        candidates[rows[:, None], torch.arange(nearest.shape[1])] = rows[nearest]
    reach = min(_REACH, (min(height, width) - 1) // 4)
    core = small[:, reach : height - reach, reach : width - reach]
    best = torch.full(candidates.shape, -1.0)
    for start in range(0, n, _ROWS):
        chunk = slice(start, start + _ROWS)
        others = core[candidates[chunk]]  # (rows, candidates, height, width)
        # To mirror what is compared with is to mirror every moved image.
        sides = torch.stack([others, others.flip(3), others.flip(2)], dim=2)
        compared = _standardised(sides.flatten(0, 2)).view(len(others), _CANDIDATES * 3, -1).transpose(1, 2)
        for windows in _moved(small[chunk], reach):
            alike = torch.bmm(windows, compared).amax(1)
            torch.maximum(best[chunk], alike.view(-1, _CANDIDATES, 3).amax(2), out=best[chunk])
    best[candidates == _NOBODY] = -1.0
    n_near = np.bincount(class_of, (best >= _LIKELY).any(1).numpy(), len(classes))
    is_augmented = (n_near >= _ENOUGH) & (n_near >= _SHARE * counts)
    least = torch.from_numpy(np.where(is_augmented, _LIKELY, _CERTAIN)[class_of])
    found, place = torch.nonzero(best >= least[:, None], as_tuple=True)
    pairs: IntArray = torch.stack([found, candidates[found, place]]).numpy()
    return pairs


def _nearest(small: Tensor) -> Tensor:
    """Return for each image the others most like it whatever their place and side, shape (n, at most 8)."""
    spectrum = torch.fft.rfft2(small - small.mean((1, 2), keepdim=True)).abs()
    spectrum = spectrum + spectrum.flip(1).roll(1, 1)  # that of the mirrored image as well
    described = _standardised(spectrum.sqrt())
    found = []
    for start in range(0, len(small), _ROWS):
        alike = described[start : start + _ROWS] @ described.T
        rows = torch.arange(len(alike))
        alike[rows, start + rows] = -2.0  # not itself
        found.append(alike.topk(min(_CANDIDATES, len(small) - 1), dim=1).indices)
    return torch.cat(found)


def _moved(small: Tensor, margin: int) -> Iterator[Tensor]:
    """Yield the images warped one way after the other, each shifted and without a margin: (n, shifts, pixels)."""
    n, height, width = small.shape
    size = height - 2 * margin, width - 2 * margin
    versions = [(small, margin), *((_warped(small, degrees, share), reach) for degrees, share, reach in _WARPS)]
    for version, reach in versions:
        part = version[:, margin - reach : height - margin + reach, margin - reach : width - margin + reach]
        windows = part.unfold(1, size[0], 1).unfold(2, size[1], 1)
        yield _standardised(windows.reshape(-1, *size)).view(n, (2 * reach + 1) ** 2, -1)


def _warped(small: Tensor, degrees: float, share: float) -> Tensor:
    """Return images turned, and cropped to a share of their sides, in their size."""
    cos, sin = share * np.cos(np.deg2rad(degrees)), share * np.sin(np.deg2rad(degrees))
    matrix = torch.tensor([[[cos, -sin, 0.0], [sin, cos, 0.0]]], dtype=torch.float32)
    grid = functional.affine_grid(matrix, [1, 1, *small.shape[1:]], align_corners=False).expand(len(small), -1, -1, -1)
    turned: Tensor = functional.grid_sample(small[:, None], grid, padding_mode="border", align_corners=False)
    return turned.squeeze(1)


def _standardised(images: Tensor) -> Tensor:
    """Return images, whose memory is taken, as rows of mean 0 and length 1; those without a contour as zeros."""
    rows = images.flatten(1)
    rows -= rows.mean(1, keepdim=True)
    rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-6)
    return rows
