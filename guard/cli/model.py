"""The suspect model and its images, as the options of several commands name them."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guard.cli.options import handler_argument
from guard.cli.output import print_warning, what_failed
from guard.data.image_files import SERVED_FORMATS, encode_png, is_picture, is_served
from guard.data.labelled_folders import ClassList
from guard.errors import ConfigError, DataError, GuardError, SuspectModelError
from guard.files import decoded

if TYPE_CHECKING:
    from guard.cli.images import NamedImages, NamedLabelledImages
    from guard.cli.output import Report
    from guard.cli.reading import Convert
    from guard.config import GuardConfig
    from guard.lab.assess.planting import Prepare
    from guard.suspect.model import SuspectModel
    from guard.torchserve.user_handler import UserHandler
    from guard.types import Float32Array

_NAMED = 5  # files that a line names
#: A line of a class list that is numbered.
_NUMBER_FIRST = re.compile(r"""["']?(?P<number>\d{1,6})["']?\s*[\s,;:=|.)]\s*["']?(?P<name>\S.*?)["']?""")
_NUMBER_LAST = re.compile(r"""["']?(?P<name>\S.*?)["']?\s*[\t,;:=|]\s*["']?(?P<number>\d{1,6})["']?""")


@contextmanager
def open_model(
    weights: Path,
    architecture: str | None,
    preprocess: str | None,
    handler: str | None,
    model_file: Path | None,
    extra_file: list[Path] | None,
    device: str,
    config: GuardConfig,
    state_key: str | None,
    logits: str | None = None,
    split: str | None = None,
    depths: list[str] | None = None,
) -> Iterator[tuple[SuspectModel, Convert, UserHandler | None]]:
    """Load the suspect model, and yield it with what turns images into its inputs, and the handler if there is one.

    What the user's code prints goes to stderr.
    """
    from guard.cli.reading import preprocessing
    from guard.suspect.model import SuspectModel
    from guard.torchserve.user_handler import open_user_handler

    if (architecture is None) == (handler is None):
        raise ConfigError("give either --architecture or --handler: one of them says how the network is built.")
    if handler is not None and preprocess is not None:
        raise ConfigError("--preprocess does not go with --handler: the handler preprocesses. Leave one out.")
    if handler is None and (model_file is not None or extra_file):
        raise ConfigError("--model-file and --extra-file go with --handler only. Leave them out, or name the handler.")
    if handler is not None and state_key is not None:
        raise ConfigError("--state-key does not go with --handler: the handler loads the weights. Leave one out.")
    gpu = gpu_number(device)
    places: dict[str, Any] = {"split": split, "depths": depths or None, "output": logits, "device": device}
    with contextlib.redirect_stdout(sys.stderr):
        if handler is None:
            assert architecture is not None
            convert = preprocessing(preprocess)
            yield SuspectModel.load(weights, architecture, state_key=state_key, **places), convert, None
            return
        with open_user_handler(
            handler_argument(handler),
            weights,
            model_file=model_file,
            extra_files=tuple(extra_file or ()),
            model_attribute=config.model_attribute,
            gpu=gpu,
        ) as user:
            yield SuspectModel(user.module, **places), user.model_inputs, user


def gpu_number(device: str) -> int | None:
    """Return the number of the GPU that a handler is told to use; None means the CPU.

    Raises
    ------
    ConfigError
        If the device cannot be used.
    """
    import torch

    try:
        torch.empty(0, device=device)
    except Exception as error:
        raise ConfigError(f"--device {device!r} cannot be used: {error}. Name cpu, cuda or cuda:N.") from error
    return None if device == "cpu" else torch.device(device).index or 0


def class_list(text: str | None) -> ClassList | None:
    """Return the names that --class-names gives: with commas, or in a file of whatever encoding, JSON or one per line.

    Lines may be numbered from 0 or 1 without a gap, in any order, below a heading: `3 cat`, `3,cat`, `cat;3`, `3: cat`.

    Raises
    ------
    ConfigError
        If a file is named that is not there.
    ArchiveError
        If a JSON file is no class list.
    """
    if text is None:
        return None
    if Path(text).is_file() and Path(text).suffix.lower() == ".json":
        from guard.torchserve.archives.class_list import parse_class_list

        classes = parse_class_list(Path(text).read_bytes(), f"--class-names {text}")
        if classes is None:
            raise ConfigError(f"--class-names {text}: its labels must be 0, 1, 2, ... without a gap. Mend it.")
        return classes
    if Path(text).is_file():
        return _listed([line.strip() for line in decoded(Path(text).read_bytes()).splitlines() if line.strip()])
    if "," not in text and (Path(text).is_dir() or Path(text).suffix in (".txt", ".csv", ".names", ".json")):
        raise ConfigError(f"--class-names {text}: there is no such file. Check the path, or give names with commas.")
    return ClassList([name.strip() for name in text.split(",")])


def _listed(lines: list[str]) -> ClassList:
    """Return the classes of the lines of a file; where all are numbered, by their numbers."""
    for some in (lines, lines[1:]):
        parts = [_NUMBER_FIRST.fullmatch(line) or _NUMBER_LAST.fullmatch(line) for line in some]
        entries = {int(part["number"]): (line, part["name"]) for part, line in zip(parts, some, strict=True) if part}
        first = min(entries, default=-1)
        names = {name for _, name in entries.values()}
        if first in (0, 1) and len(names) == len(some) > 1 and set(entries) == set(range(first, first + len(some))):
            return ClassList([entries[number] for number in sorted(entries)])  # the whole line may be a name as well
    return ClassList(lines)


def try_once(suspect: SuspectModel, inputs: Any, labels: Any = None) -> None:
    """Locate the network's layers and logits first, so that what does not fit is said in the user's words."""
    try:
        suspect.locate(inputs, labels)
        suspect.check_given_mode(inputs)
    except GuardError:
        raise
    except Exception as error:
        raise SuspectModelError(
            f"the suspect model fails on images of shape {inputs.shape[1:]}: {what_failed(error)} "
            "Are they what it takes? See --preprocess and --handler."
        ) from error


def read_labelled(
    suspect: SuspectModel,
    path: Path,
    convert: Convert,
    handler: str | None,
    class_names: ClassList | None,
    report: Report,
) -> tuple[NamedLabelledImages, Float32Array]:
    """Find and read labelled images; return them and what the network takes of them, on which it was tried once."""
    from guard.cli.images import find_labelled
    from guard.cli.reading import in_channels_taken, read_all

    found = find_labelled(path, as_bytes=handler is not None, class_names=class_names)
    found = in_channels_taken(found, lambda some: suspect.activations(convert(some)), at_once=2)
    inputs = read_all(found, convert, report)
    try_once(suspect, inputs, found.labels)
    return found, inputs


def tell_passed_over(names: Sequence[str]) -> None:
    """Warn of files that were not read: images beside the folders of the classes, and files that are no images."""
    beside = [name for name in names if is_picture(Path(name))]
    others = [name for name in names if name not in beside]
    for group, why in (
        (beside, "images lie beside the folders of the classes, so that no class is known. Move them into one"),
        (others, "files are no images by their names. Rename them if they are"),
    ):
        if group:
            shown = ", ".join(group[:_NAMED]) + (", ..." if len(group) > _NAMED else "")
            print_warning(f"{len(group)} file(s) passed over: these {why}: {shown}")


def tell_unserved(files: Sequence[Path]) -> None:
    """Warn of images in formats that the image handler would refuse."""
    suffixes = [file.suffix.lower() for file in files if not is_served(file)]
    if suffixes:
        print_warning(
            f"{len(suffixes)} of {len(files)} images are in formats that the image handler takes from no client "
            f"({', '.join(sorted(set(suffixes)))}): it reads {', '.join(SERVED_FORMATS)}. Convert what clients send, "
            "or serve a --handler of your own."
        )


def read_pixels(
    path: Path, found: NamedImages, convert: Convert, handler: str | None, report: Report
) -> tuple[Float32Array, Prepare]:
    """Read images as pixels, where triggers go on; return them and what makes the network's inputs of them."""
    from guard.cli.reading import preprocessing, read_all

    same_size = "A trigger goes on before the preprocessing, so resize them first."
    pixels = read_all(found, preprocessing(None), report, remedy=same_size)
    _check_pixels(path, pixels)
    if handler is None:
        return pixels, lambda images: convert(list(images))
    return pixels, lambda images: convert([encode_png(image) for image in images])  # what a client would send


def _check_pixels(path: Path, pixels: Float32Array) -> None:
    """Refuse images outside [0, 1], on which no trigger can be put."""
    if not (pixels.min() >= 0.0 and pixels.max() <= 1.0):  # so written, NaN is refused too
        raise DataError(
            f"{path}: images must lie in [0, 1], got {pixels.min():g} to {pixels.max():g}. A trigger goes on pixels: "
            "give them as uint8, and name what normalises them with --preprocess."
        )
