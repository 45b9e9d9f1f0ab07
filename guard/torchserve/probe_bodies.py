"""Bodies that a handler is tried with: images that can be told apart, and such as a handler may stumble over."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from guard.serving.single_image import holds_one_image

#: Images that are to be told apart.
MOST_IMAGES = 4
_MOST_PIXELS = 16_000_000  # of a variant
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels -> Pillow mode
_TURNED = (Image.Transpose.ROTATE_180, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM)


def distinct_images(examples: Iterable[bytes], input_shape: Sequence[int] | None) -> list[bytes]:
    """Return up to `MOST_IMAGES` bodies of one image each; where the examples are too few, turned copies of them.

    Parameters
    ----------
    examples : iterable of bytes
        Bodies of requests. Those that hold anything but one image are left out.
    input_shape : (channels, height, width) or None
        Of the network's input. Without an example, noise of that size as PNG stands in; without either there is none.
    """
    images = list(dict.fromkeys(body for body in examples if holds_one_image(body)))[:MOST_IMAGES]
    if not images and input_shape is not None and len(input_shape) == 3 and input_shape[0] in _MODES:
        channels, height, width = input_shape
        rng = np.random.default_rng(0)
        for _ in range(MOST_IMAGES):
            pixels = rng.integers(0, 256, (height, width, channels), np.uint8)
            images.append(_encoded(Image.fromarray(pixels.squeeze(2) if channels == 1 else pixels), "PNG"))
    for turn in _TURNED if images else ():
        if len(images) < MOST_IMAGES:
            opened = Image.open(io.BytesIO(images[0]))
            images.append(_encoded(opened.transpose(turn), opened.format or "PNG"))
    return images


def odd_images(image: bytes) -> dict[str, bytes]:
    """Return variants of an image that a handler may cut into several inputs, resize, or refuse: what each is -> body.

    Parameters
    ----------
    image : bytes
        One that Pillow can read.
    """
    opened = Image.open(io.BytesIO(image))
    kind, (width, height) = opened.format or "PNG", opened.size
    middle, quarter = len(image) // 2, max(1, len(image) // 4)
    made = {
        "that is cut off": image[:middle],
        "with damaged pixels": image[:middle] + bytes(byte ^ 0x55 for byte in image[middle : middle + quarter])
        + image[middle + quarter :],
    }  # fmt: skip
    sizes = {
        "twice as wide": (2, 1),
        "twice as high": (1, 2),
        "three times as wide and high": (3, 3),
        "eight times as wide": (8, 1),
    }
    for description, (across, down) in sizes.items():
        if across * down * width * height > _MOST_PIXELS:
            continue
        sheet = Image.new(opened.mode, (across * width, down * height))
        for column in range(across):
            for row in range(down):
                sheet.paste(opened, (column * width, row * height))
        made[f"that is {description}"] = _encoded(sheet, kind)
    for other_kind in [each for each in ("PNG", "JPEG", "BMP", "WEBP") if each != kind]:
        with contextlib.suppress(OSError, KeyError):  # not every mode fits every format
            made[f"as {other_kind}"] = _encoded(opened, other_kind)
    small = opened.crop((0, 0, max(1, width // 2), max(1, height // 2)))
    other = opened.convert("L" if opened.mode == "RGB" else "RGB")
    made |= {"that is half the size": _encoded(small, kind), "in other colours": _encoded(other, kind)}
    # Where no image is found the bytes themselves may be taken for pixels, of as many inputs as they make.
    rng = np.random.default_rng(0)
    for description, size in {"half": (width // 2 or 1, height // 2 or 1), "twice": (2 * width, 2 * height)}.items():
        if size[0] * size[1] <= _MOST_PIXELS:
            noise = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).convert(opened.mode)
            body = _encoded(noise, kind)
            made[f"of noise that is {description} the size, and cut off"] = body[: 3 * len(body) // 4]
    return made


def _encoded(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.copy().save(stream, kind)  # saving leaves its settings on an image
    return stream.getvalue()
