"""A plain TorchServe handler for image classifiers: one image in, one label with probabilities out. No guard in it."""

from __future__ import annotations

import base64
import io
import json
import sys
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
import torch
from PIL import Image
from ts.torch_handler.base_handler import BaseHandler
from ts.utils.util import PredictionException

from guard.data.image_files import MODES, SERVED_FORMATS, begins_as_picture

DEFAULTS = {
    "mean": 0.0,
    "std": 1.0,
    "class_names": None,
    "scale": 255,
    "resize": False,
    "state_key": None,
    "output": "",
}
REQUIRED = ["architecture", "input_shape"]
READABLE_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"}  # the others have more than 8 bits per channel
MAX_PIXELS = 32_000_000
_LISTED = f"{', '.join(SERVED_FORMATS[:-1])} or {SERVED_FORMATS[-1]}"
UNREADABLE = f"the image cannot be read: it must be a whole {_LISTED}."
LARGEST = 1e30  # far below the end of float32, so that scaling cannot overflow


class ImageHandler(BaseHandler):  # type: ignore[misc]  # ts is untyped
    """Serve the network that `image_handler.json` in the archive describes.

    Keys: `architecture` ("module:factory"), `input_shape` ([channels, height, width]); optional `mean` and `std` (one
    number, or one per channel), `scale` (pixel values are divided by it first, 255), `class_names`, `resize` (false:
    an image of another size is refused), `state_key` (where the weights lie in their file), `output` (where the logits
    lie in what the network returns). A request is the bytes of an image file in one of `SERVED_FORMATS` (of several
    pictures in it the first), their base64 text (or a data: URI), or JSON: nested lists of pixel values of the input
    shape, or {"data": ...} around any of these. What cannot be read gets status 422, alone; an image of too many
    pixels 413, before it is decoded.
    """

    one_row_per_request = True  # declared to the guard: `preprocess` makes one row of every body, or raises

    def initialize(self, context: Any) -> None:
        """Read the settings, build the network, load its weights without running any code of the weights file."""
        from guard.suspect.checkpoints import load_weights
        from guard.suspect.model import build_architecture

        folder = Path(context.system_properties["model_dir"])
        self.settings = {**DEFAULTS, **json.loads((folder / "image_handler.json").read_text())}
        if wrong := set(self.settings) ^ {*DEFAULTS, *REQUIRED}:
            raise ValueError(f"image_handler.json: unknown or missing keys {sorted(wrong)}. Needed: {REQUIRED}.")
        gpu = context.system_properties.get("gpu_id")
        self.device = torch.device(f"cuda:{gpu}" if gpu is not None and torch.cuda.is_available() else "cpu")
        sys.path.insert(0, str(folder))
        self.model = build_architecture(self.settings["architecture"])
        weights = folder / context.manifest["model"]["serializedFile"]
        load_weights(self.model, weights, state_key=self.settings["state_key"])
        self.model.to(self.device).eval()
        self.shape: tuple[int, int, int] = tuple(self.settings["input_shape"])
        self.scale = np.float32(self.settings["scale"])
        per_channel = (self.shape[0], 1, 1)
        self.mean = np.broadcast_to(np.reshape(self.settings["mean"], (-1, 1, 1)), per_channel).astype(np.float32)
        self.std = np.broadcast_to(np.reshape(self.settings["std"], (-1, 1, 1)), per_channel).astype(np.float32)
        self.initialized = True

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[dict[str, Any]]:
        """Answer a batch in order; an item that cannot be read gets a 422, or 413, and spoils no other."""
        self.context = context
        for index in range(len(data)):
            context.set_response_content_type(index, "application/json")
        try:
            return self.postprocess(self.inference(self.preprocess(data)))
        except (ValueError, PredictionException):
            answers: list[dict[str, Any]] = []
        for index, item in enumerate(data):
            try:
                image = self.preprocess([item])
            except (ValueError, PredictionException) as error:
                code, text = getattr(error, "error_code", 422), str(getattr(error, "message", error))
                context.set_response_status(code=code, phrase=HTTPStatus(code).phrase, idx=index)
                answers.append({"code": code, "type": "InputRejected", "message": text, "error": text})
            else:
                answers += self.postprocess(self.inference(image))
        return answers

    def preprocess(self, data: list[dict[str, Any]]) -> torch.Tensor:
        """Turn requests into float32 images of shape (n, channels, height, width).

        ValueError says what is wrong with a request, PredictionException of status 413 that its image is too large.
        """
        images = np.empty((len(data), *self.shape), np.float32)
        for index, item in enumerate(data):
            body = item.get("body")
            images[index] = self._pixels(item.get("data") if body is None else body)
        images /= self.scale
        images -= self.mean
        images /= self.std
        return torch.from_numpy(images)

    def postprocess(self, data: Any) -> list[dict[str, Any]]:
        """Turn what the network returns, with logits of shape (n, n_classes) in it, into one answer per row."""
        from guard.suspect.outputs import logits_of

        names = self.settings["class_names"]
        probabilities = logits_of(data, self.settings["output"]).float().softmax(1)
        return [
            {"label": label, "class_name": names and names[label], "probabilities": [round(p, 6) for p in row]}
            for label, row in zip(probabilities.argmax(1).tolist(), probabilities.tolist(), strict=True)
        ]

    def _pixels(self, body: Any) -> np.ndarray[Any, Any]:
        if isinstance(body, (bytes, bytearray, str)):
            body = parse(body)
        if isinstance(body, dict):
            body = body.get("data")
            body = parse(body) if isinstance(body, str) else body
        if isinstance(body, list):
            return numbers(body, self.shape)
        if isinstance(body, bytes):
            return self._decode(body)
        raise ValueError("a request must hold an image, its base64 text, or nested lists of numbers.")

    def _decode(self, body: bytes) -> np.ndarray[Any, Any]:
        channels, height, width = self.shape
        image = opened(body)
        if image.mode not in READABLE_MODES or channels not in MODES:
            raise ValueError(f"an image of mode {image.mode} does not fit a model with {channels} channels.")
        if image.size != (width, height) and not self.settings["resize"]:
            raise ValueError(f"image must be {width} x {height} pixels, got {image.width} x {image.height}.")
        try:
            pixels = image.convert(MODES[channels])  # decodes
        except MemoryError:
            raise
        except Exception as error:  # decoders let through what they stumble over
            raise ValueError(UNREADABLE) from error
        if pixels.size != (width, height):
            pixels = pixels.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(pixels).reshape(height, width, channels).transpose(2, 0, 1)


def opened(body: bytes) -> Image.Image:
    """Return an image of which only the header is read; PredictionException of status 413 if it is too large."""
    most = min(MAX_PIXELS, Image.MAX_IMAGE_PIXELS or MAX_PIXELS)  # the guard's setting, where that is less
    try:
        image = Image.open(io.BytesIO(body), formats=SERVED_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # before it says its size
        raise PredictionException(f"image must have at most {most} pixels, got more.", 413) from error
    except Exception as error:
        raise ValueError(UNREADABLE) from error
    if image.width * image.height > most:
        raise PredictionException(f"image must have at most {most} pixels, got {image.width} x {image.height}.", 413)
    return image


def parse(body: bytes | bytearray | str) -> Any:
    """Return image bytes, or what the JSON in a body says; base64 in lines, URL-safe, or as a data: URI as well."""
    raw = body.encode() if isinstance(body, str) else bytes(body)
    if begins_as_picture(raw):
        return raw
    if not (raw := raw.removeprefix(b"\xef\xbb\xbf").strip()):
        raise ValueError("the request is empty: send an image.")
    try:
        if raw[:1] in b'[{"':
            value = json.loads(raw, strict=False)  # a text may hold line breaks
            return parse(value) if isinstance(value, str) else value
        if raw[:5].lower() == b"data:":
            raw = unquote_to_bytes(raw.partition(b",")[2])
        text = b"".join(line.strip() for line in raw.splitlines()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the request is no {_LISTED}, no base64 text of one, and no JSON.") from error


def numbers(values: list[Any], shape: tuple[int, int, int]) -> np.ndarray[Any, Any]:
    """Return nested lists as an array of the model's input shape; a single channel may be left out."""
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"pixel values must have shape {list(shape)}, got lists of unequal length.") from error
    if array.shape != shape and (1, *array.shape) != shape:
        raise ValueError(f"pixel values must have shape {list(shape)}, got {list(array.shape)}.")
    if array.dtype.kind not in "iuf" or not (np.abs(array) < LARGEST).all():  # not: NaN compares as false
        raise ValueError("pixel values must be finite numbers.")
    return array.reshape(shape)
