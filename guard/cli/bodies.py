"""Clean images as the bodies of requests, for a handler that decodes them itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from guard.cli.images import NamedImages, NamedLabelledImages, find_images, find_labelled, without_labels
from guard.data.image_files import encode_png, load_images
from guard.errors import DataError
from guard.types import Float32Array

_JSON = (".json",)
_TEXT = (".txt", ".b64", ".base64")
#: A pixel of 8 bits that was divided by 255 is this near to a whole number when it is multiplied again.
_ROUNDING = 1e-3


def find_bodies(
    path: Path, class_names: list[str] | None = None, answers: Callable[[Any], object] | None = None
) -> NamedLabelledImages:
    """Find the images of a .npz or a folder, each as what TorchServe would hand to a handler.

    Parameters
    ----------
    path : Path
        - A folder with one sub-folder per class: every file is a request's body. `.json` is parsed, `.txt`, `.b64` and
          `.base64` become text, as TorchServe does it by their content types; all others are bytes. Where the handler
          fails at that and takes the bytes, they are bytes too: so clients send them without a content type.
        - A `.npz` of images with 8 bits per channel, as `load_images` reads it: each becomes a PNG, without a loss.
    class_names : list of str, optional
        The class list, as for `find_labelled`.
    answers : callable (body) -> object, optional
        The handler's answer to one request; raises where it fails.

    Raises
    ------
    DataError
        If there are none, or numbers of a .npz are no 8-bit pixels.
    """
    if path.suffix.lower() == ".npz" and path.is_file():
        loaded = load_images(path)
        _check_pixels(path, loaded.images)
        if loaded.labels is None:
            raise without_labels(path)
        return NamedLabelledImages(loaded.names, lambda row: encode_png(loaded.images[row]), loaded.labels, class_names)
    found = find_labelled(path, as_bytes=True, class_names=class_names)
    parsed = replace(found, read=lambda row: _parsed(found.read(row), found.names[row]))
    if answers is None or Path(found.names[0]).suffix.lower() not in (*_JSON, *_TEXT):
        return parsed
    with suppress(Exception):  # the reason is given when the first is tried again
        answers(parsed.read(0))
        return parsed
    with suppress(Exception):
        answers(found.read(0))
        return found
    return parsed


def find_requests(path: Path) -> NamedImages:
    """Find images with or without labels, as `find_bodies` reads them.

    Raises
    ------
    DataError
        As `find_bodies`, but for labels.
    """
    if path.suffix.lower() == ".npz" and path.is_file():
        loaded = load_images(path)
        _check_pixels(path, loaded.images)
        return NamedImages(loaded.names, lambda row: encode_png(loaded.images[row]))
    found = find_images(path, as_bytes=True)
    return replace(found, read=lambda row: _parsed(found.read(row), found.names[row]))


def _check_pixels(path: Path, images: Float32Array) -> None:
    if images.shape[1] not in (1, 3):
        raise DataError(f"{path}: images must have 1 or 3 channels to be sent as PNG, got {images.shape[1]}.")
    for image in images:  # one by one: a copy of all of them might not fit
        pixels = image * 255
        if np.abs(pixels - np.rint(pixels)).max() > _ROUNDING or pixels.min() < -_ROUNDING or pixels.max() > 255.1:
            raise DataError(
                f"{path}: float32 images must be 8-bit pixels divided by 255 to be sent to a handler, and these are "
                "not. Give the pixels before any preprocessing, as uint8: the handler preprocesses them."
            )


def _parsed(body: bytes, name: str) -> Any:
    suffix = Path(name).suffix.lower()
    try:
        if suffix in _JSON:
            return json.loads(body)
        return body.decode() if suffix in _TEXT else body
    except (ValueError, RecursionError) as error:
        raise DataError(f"it is no {suffix[1:]} ({error}). Save it again, or leave it out.") from error
