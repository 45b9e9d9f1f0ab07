"""A suspect model written as ONNX or as a program of `torch.export`, and asked whether it still answers the same."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from guard.detection.pipeline import Guard
from guard.errors import ExportError, SuspectModelError
from guard.export.feature_module import FeatureModule, feature_module
from guard.export.record import INPUT, ExportRecord, difference, inputs_between
from guard.suspect.model import SuspectModel
from guard.suspect.split_points import model_input
from guard.types import BACKUP, Activations, Float32Array

Format = Literal["onnx", "torch-export"]
#: File of every format.
FILES: dict[Format, str] = {"onnx": "model.onnx", "torch-export": "model.pt2"}
#: Largest difference between the written model and the suspect model, as a share of the greatest value of an output:
#: ten times what another order of additions makes of float32.
TOLERANCE = 1e-4
_ROWS = 5  # of inputs that are drawn; more than one batch size is tried
_PROTOBUF_LIMIT = 2**31 - 2**20  # bytes of one message
_Answers = Callable[[Float32Array], list[Float32Array]]


def new_record(guard: Guard, suspect: SuspectModel, name: str) -> ExportRecord:
    """Return the record of a model that is to be exported, with what the suspect model answers to its probe.

    Raises
    ------
    ExportError
        If the bundle does not know what the model takes, or an answer depends on the others of its batch.
    """
    points, shape = suspect.split_points, guard.input_shape
    if points is None or shape is None:
        raise ExportError("this bundle was fitted without images, and does not know what the model takes. Fit again.")
    if guard.batch_dependence:
        raise ExportError(f"{guard.batch_dependence}; another server puts requests together as it likes. Mend that.")
    layers = [guard.reference.features, *(a for depth, a in guard.reference.depths.items() if depth != BACKUP)]
    ranges = guard.input_range or ((0.0, 1.0),) * shape[0]
    widths = (guard.reference.logits.shape[1], *(array.shape[1] for array in layers))
    known = ExportRecord(name, str(guard.digest), suspect.digest, points, shape, ranges, widths)
    answers = suspect.activations(known.probe_inputs())
    probe = tuple(array.tolist() for _, array in answers.items())
    return ExportRecord(name, str(guard.digest), suspect.digest, points, shape, ranges, widths, probe)


def write_models(
    record: ExportRecord,
    suspect: SuspectModel,
    files: Mapping[Format, Path],
    *,
    opset: int | None = None,
    images: Float32Array | None = None,
    tolerance: float = TOLERANCE,
) -> dict[Format, tuple[str, float]]:
    """Write the suspect model with its features, ask every file, and return where it differs most and by how much.

    Parameters
    ----------
    record : ExportRecord
    suspect : SuspectModel
        On the CPU, with its split points.
    files : mapping of {"onnx", "torch-export"} to Path
        None is written that does not answer as the suspect model does.
    opset : int, optional
        Of ONNX; None = the one that PyTorch writes best.
    images : ndarray of shape (n, channels, height, width), float32, optional
        To ask them with; None = inputs that are drawn.
    tolerance : float
        Largest difference that is taken, as a share of the greatest value of an output.

    Raises
    ------
    ExportError
        If the model cannot be written so, or answers otherwise.
    """
    if images is None:
        images = inputs_between(record.input_shape, record.input_range, _ROWS)
    unchecked = {kind: file.with_name(f".unchecked-{file.name}") for kind, file in files.items()}
    found = {}
    try:
        with feature_module(suspect) as module, _one_line():
            program = _program(module, suspect, record)
            answers = {
                kind: _write_onnx(program, record, file, opset) if kind == "onnx" else _write_program(program, file)
                for kind, file in unchecked.items()
            }
        for kind, answer in answers.items():
            where, most = found[kind] = _largest_difference(answer, suspect, record, images)
            if not most <= tolerance:
                raise ExportError(
                    f"the exported model ({kind}) answers otherwise than the suspect model: {where} differs by "
                    f"{most:.3g} of its greatest value, and {tolerance:g} is allowed. Try another --opset or --format."
                )
        for kind, file in unchecked.items():
            file.replace(files[kind])
    finally:
        for file in unchecked.values():
            file.unlink(missing_ok=True)
    return found


def _program(module: FeatureModule, suspect: SuspectModel, record: ExportRecord) -> Any:
    example = model_input(suspect.module, record.probe_inputs()).float()
    batch = {0: torch.export.Dim("batch")}
    try:
        return torch.export.export(module, (example,), dynamic_shapes=(batch,), strict=False)
    except Exception:  # `len(images)` is a number there, and a symbol only where bytecode is read, which is slower
        return torch.export.export(module, (example,), dynamic_shapes=(batch,), strict=True)


def _write_onnx(program: Any, record: ExportRecord, file: Path, opset: int | None) -> _Answers:
    import onnxruntime

    names = [*record.outputs]
    written = torch.onnx.export(
        program, input_names=[INPUT], output_names=names, opset_version=opset, dynamo=True, verbose=False
    )
    assert written is not None
    graph = written.model
    graph.graph.inputs[0].shape = _named_batch(graph.graph.inputs[0].shape)
    graph.metadata_props.update(
        {"guard.bundle": record.bundle, "guard.suspect": record.suspect, "guard.layers": ",".join(names[1:])}
    )
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    if n_bytes > _PROTOBUF_LIMIT:
        raise ExportError(
            f"ONNX files have at most 2 GiB, these weights have {n_bytes} bytes. Try --format torch-export."
        )
    written.save(file, external_data=False)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda rows: list(session.run(names, {INPUT: rows}))


def _named_batch(shape: Any) -> Any:
    return type(shape)(["batch", *list(shape)[1:]])


def _write_program(program: Any, file: Path) -> _Answers:
    torch.export.save(program, file)
    module = torch.export.load(file).module()

    def answers(rows: Float32Array) -> list[Float32Array]:
        with torch.no_grad():
            return [tensor.numpy() for tensor in module(torch.from_numpy(rows))]

    return answers


def _largest_difference(
    answers: _Answers, suspect: SuspectModel, record: ExportRecord, images: Float32Array
) -> tuple[str, float]:
    expected = suspect.activations(images)
    sizes = [1, *[256] * -(-(len(images) - 1) // 256)]  # batches of several sizes
    parts: list[Activations] = []
    start = 0
    try:
        for size in sizes:
            rows = np.ascontiguousarray(images[start : start + size])
            parts.append(record.activations(answers(rows)))
            start += size
        found = Activations.concatenate(parts)
        if [array.shape for _, array in found.items()] != [array.shape for _, array in expected.items()]:
            raise ValueError(f"outputs of shapes {[array.shape for _, array in found.items()]}")
    except Exception as error:  # of whatever runs the file
        raise ExportError(f"the exported model cannot be run: {_first_line(error)}. Try another --format.") from error
    return difference(found, expected)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Let nothing out of a long export but one line of why it failed."""
    logged = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            Path(os.devnull).open("w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    except (ExportError, SuspectModelError):
        raise
    except Exception as error:  # tracing runs the user's network
        raise ExportError(
            f"the suspect model cannot be exported: {_first_line(error)}. Does its forward branch on values "
            "of its inputs, or on the size of the batch? Such a network cannot be a graph."
        ) from error
    finally:
        logging.disable(logged)


def _first_line(error: BaseException) -> str:
    """Return the innermost reason, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = next((line for line in lines if not line.startswith(("#", "Traceback"))), "")
    return f"{type(error).__name__}: {text}"[:300].rstrip(" .:")
