"""Pictures for people: PNG files made anew from numbers or from a hostile request body, never the body itself."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image

from guard.errors import DataError
from guard.types import AnyArray, Float32Array

#: Longest side of a picture that is sent to a browser, in pixels; larger ones are made smaller.
MAX_SIDE = 1024
#: Largest picture that is decoded from a request body, in pixels (height * width).
MAX_BODY_PIXELS = 2**24
#: What a body may be; others decode too, but each decoder is a door.
BODY_FORMATS = ("PNG", "JPEG")


def picture_of_tensor(image: Float32Array) -> bytes:
    """Return one model input as a PNG file.

    Parameters
    ----------
    image : ndarray of shape (channels, height, width), float32
        Values in [0, 1] are shown as they are; others are stretched over their own range, as a normalised input would
        be too dark or too bright. 1 channel is grey, of 3 or more the first 3 are red, green and blue.

    Raises
    ------
    DataError
        If it is no such array, or over `MAX_BODY_PIXELS`.
    """
    image = np.asarray(image, dtype=np.float32)
    if image.ndim != 3 or 0 in image.shape:
        raise DataError(f"a picture needs shape (channels, height, width), none empty, got {image.shape}.")
    if image.shape[1] * image.shape[2] > MAX_BODY_PIXELS:
        raise DataError(f"the picture has {image.shape[1] * image.shape[2]} pixels, more than {MAX_BODY_PIXELS}.")
    image = np.nan_to_num(image[:3] if len(image) >= 3 else image[:1], posinf=0.0, neginf=0.0)
    low, high = float(image.min()), float(image.max())
    if low < -1e-3 or high > 1 + 1e-3:
        image = (image - low) / max(high - low, 1e-12)
    pixels = np.rint(255 * image.clip(0, 1)).astype(np.uint8)
    return _png(Image.fromarray(pixels[0]) if len(pixels) == 1 else Image.fromarray(pixels.transpose(1, 2, 0)))


def picture_of_body(body: bytes) -> bytes:
    """Return what a client sent as a PNG file of our own making; its content type is not believed.

    Raises
    ------
    DataError
        If the body is no PNG or JPEG image, is damaged, or is over `MAX_BODY_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            image = Image.open(io.BytesIO(body), formats=BODY_FORMATS)
        with image:
            if image.width * image.height > MAX_BODY_PIXELS:
                raise DataError(f"the body has {image.width} x {image.height} pixels, more than {MAX_BODY_PIXELS}.")
            if image.mode.startswith(("I", "F")):
                raise DataError("the body has more than 8 bits per channel.")
            return _png(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    except DataError:
        raise
    except Image.DecompressionBombError as error:  # Pillow refuses the largest before it says their size
        raise DataError(f"the body has more than {MAX_BODY_PIXELS} pixels.") from error
    except Exception as error:  # whatever a decoder trips over in a hostile file
        raise DataError(f"the body is no readable PNG or JPEG image ({type(error).__name__}).") from error


def heat_picture(heat: AnyArray, height: int, width: int) -> bytes:
    """Return a map of shares in [0, 1] as a see-through PNG to lay over a picture of height x width pixels.

    Orange over both light and dark; the more opaque, the higher. Each cell keeps sharp edges.
    """
    strength = np.asarray(heat, dtype=np.float64).clip(0, 1)
    pixels = np.zeros((*strength.shape, 4), dtype=np.uint8)
    pixels[..., :3] = (255, 122, 0)
    pixels[..., 3] = np.rint(190 * strength)
    scale = MAX_SIDE / max(height, width, 1)
    size = (max(1, round(width * min(scale, 8))), max(1, round(height * min(scale, 8))))
    return _png(Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST))


def _png(image: Image.Image) -> bytes:
    if max(image.size) > MAX_SIDE:
        image.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
