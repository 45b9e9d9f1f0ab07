"""What is known of an exported model: its outputs, whose guard may judge them, and how it answers to two inputs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from guard.errors import DataError, ExportError
from guard.suspect.split_points import SplitPoints
from guard.types import Activations, Float32Array

RECORD = "guard_export.json"
INPUT, LOGITS, FEATURES = "input", "logits", "guard_features_"
_FORMAT = 1
_PROBES = 2
_MOST_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class ExportRecord:
    """One exported model.

    Attributes
    ----------
    model : str
        Name under which it was exported.
    bundle, suspect : str
        Digests of the bundle whose layers are its outputs, and of the suspect model.
    split_points : SplitPoints
        These layers.
    input_shape : tuple of int
        Of one row.
    input_range : tuple of (float, float)
        Between which the probe inputs lie, per channel.
    widths : tuple of int
        Columns of every output, in order: logits, features, those of the depths.
    probe : tuple of lists
        Rows of every output for `probe_inputs`, as the suspect model gave them.
    """

    model: str
    bundle: str
    suspect: str
    split_points: SplitPoints
    input_shape: tuple[int, ...]
    input_range: tuple[tuple[float, float], ...]
    widths: tuple[int, ...]
    probe: tuple[Sequence[Sequence[float]], ...] = ()

    @property
    def outputs(self) -> dict[str, int]:
        """Columns of every output by its name."""
        return dict(zip(output_names(len(self.widths) - 1), self.widths, strict=True))

    @property
    def features(self) -> list[str]:
        """Names of the outputs that the guard looks at, and nobody else."""
        return [*self.outputs][1:]

    def probe_inputs(self) -> Float32Array:
        """Return inputs that are the same on every machine, shape (2, ...)."""
        return inputs_between(self.input_shape, self.input_range, _PROBES)

    def activations(self, arrays: Sequence[Float32Array]) -> Activations:
        """Return all outputs, in order, as activations; DataError if their rows differ."""
        logits, features, *depths = arrays
        return Activations(logits, features, dict(zip(self.split_points.depths, depths, strict=True)))

    def probed(self) -> Activations:
        """Return what the suspect model answered to `probe_inputs`."""
        return self.activations([np.asarray(rows, np.float32) for rows in self.probe])

    def text(self) -> str:
        """Return it as JSON."""
        outputs = [{"name": name, "datatype": "FP32", "shape": [-1, n]} for name, n in self.outputs.items()]
        told = {"input": {"name": INPUT, "datatype": "FP32", "shape": [-1, *self.input_shape]}, "outputs": outputs}
        own = asdict(self) | {"split_points": self.split_points.as_dict()}
        return json.dumps({"format": _FORMAT, **told, **own}, indent=None) + "\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the record in a file, or in a folder that `guard export` wrote.

        Raises
        ------
        ExportError
            If there is none, or it is not whole.
        """
        file = path / RECORD if path.is_dir() else path
        try:
            if file.stat().st_size > _MOST_BYTES:
                raise ValueError("it is too large")
            document = json.loads(file.read_text(encoding="utf-8"))
            if document["format"] != _FORMAT:
                raise ValueError(f"format {document['format']!r} is another version's")
            record = cls(
                str(document["model"]),
                str(document["bundle"]),
                str(document["suspect"]),
                SplitPoints.from_dict(document["split_points"]),
                _lengths(document["input_shape"]),
                tuple((float(low), float(high)) for low, high in document["input_range"]),
                _lengths(document["widths"]),
                tuple(document["probe"]),
            )
            if len(record.input_range) != record.input_shape[0] or not np.isfinite(record.input_range).all():
                raise ValueError("its input_range is none of every channel")
            probed = record.probed()
            widths = tuple(array.shape[1] for _, array in probed.items())
            if widths != record.widths or len(probed) != _PROBES or not probed.is_finite:
                raise ValueError("its probe does not fit its outputs")
        except OSError as error:
            raise ExportError(f"{file}: {error.strerror}. Name the {RECORD} that `guard export` wrote.") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ExportError(f"{file} is no record of an exported model ({error}). Export the model again.") from error
        return record


def output_names(n_features: int) -> list[str]:
    """Return the names of the outputs of a model with so many watched layers."""
    return [LOGITS, *(f"{FEATURES}{place}" for place in range(n_features))]


def inputs_between(shape: Sequence[int], ranges: Sequence[tuple[float, float]], n_rows: int) -> Float32Array:
    """Return inputs drawn evenly between the least and greatest value of each channel, the same every time."""
    drawn = np.random.Generator(np.random.PCG64(0)).random((n_rows, *shape), np.float32)
    low, high = (np.array(side, np.float32).reshape(-1, *[1] * (len(shape) - 1)) for side in zip(*ranges, strict=True))
    return (low + drawn * (high - low)).astype(np.float32)


def difference(found: Activations, expected: Activations) -> tuple[str, float]:
    """Return where two answers differ most, and by how much, as a share of the greatest value there."""
    worst = ("logits", 0.0)
    others: Mapping[str, Any] = dict(expected.items())
    for name, array in found.items():
        scale = max(float(np.abs(others[name]).max()), 1e-6)
        with np.errstate(all="ignore"):
            share = float(np.abs(array - others[name]).max()) / scale
        share = share if math.isfinite(share) else math.inf
        if share > worst[1]:
            worst = (name, share)
    return worst


def _lengths(values: Sequence[Any]) -> tuple[int, ...]:
    if not values or not all(type(value) is int and 0 < value < 2**31 for value in values):
        raise DataError("a length must be a number above 0")
    return tuple(values)
