"""Input tensor and activations as safetensors bytes, and back. Nothing is ever unpickled."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from guard.errors import QueueError
from guard.types import Activations, Float32Array

_DEPTH = re.compile(r"depth\.(\d+)\.(.+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Blobs:
    """What an item keeps outside its row, as stored."""

    body: bytes
    inputs: bytes
    activations: bytes

    @property
    def size(self) -> int:
        """Bytes in all."""
        return len(self.body) + len(self.inputs) + len(self.activations)


def pack_inputs(inputs: Float32Array) -> bytes:
    """Return the model's input tensor, (channels, height, width), as safetensors."""
    return save_safetensors({"inputs": np.ascontiguousarray(inputs)})


def unpack_inputs(data: bytes) -> Float32Array:
    """Return what `pack_inputs` packed.

    Raises
    ------
    QueueError
        If the bytes are damaged.
    """
    return _load(data)["inputs"]


def pack_activations(activations: Activations) -> bytes:
    """Return activations as safetensors; the order of the depths is kept in their names."""
    depths = {f"depth.{place}.{name}": array for place, (name, array) in enumerate(activations.depths.items())}
    arrays = {"logits": activations.logits, "features": activations.features, **depths}
    return save_safetensors({name: np.ascontiguousarray(array, dtype=np.float32) for name, array in arrays.items()})


def unpack_activations(data: bytes) -> Activations:
    """Return what `pack_activations` packed.

    Raises
    ------
    QueueError
        If the bytes are damaged.
    """
    arrays = _load(data)
    matches = sorted(filter(None, map(_DEPTH.fullmatch, arrays)), key=lambda match: int(match[1]))
    depths = {match[2]: arrays[match[0]] for match in matches}
    return Activations(arrays["logits"], arrays["features"], depths)


def _load(data: bytes) -> dict[str, Float32Array]:
    try:
        return load_safetensors(data)
    except (SafetensorError, ValueError) as error:
        raise QueueError(f"a tensor of the queue is damaged ({error}). Restore the queue from a copy.") from error
