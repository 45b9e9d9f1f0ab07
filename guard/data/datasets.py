"""Real image sets by name: where they are, what is in them, and how to get one that is missing."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from PIL import Image

from guard.errors import DataError, DatasetError
from guard.resources import checkout_root, resource_path
from guard.types import AnyArray, Float32Array, IntArray

UInt8Array = npt.NDArray[np.uint8]

#: Environment variable that names the folder of the image sets.
DATA_DIR_VARIABLE = "GUARD_DATA_DIR"

_GTSRB = (
    "Speed limit (20km/h)|Speed limit (30km/h)|Speed limit (50km/h)|Speed limit (60km/h)|Speed limit (70km/h)|"
    "Speed limit (80km/h)|End of speed limit (80km/h)|Speed limit (100km/h)|Speed limit (120km/h)|No passing|"
    "No passing for vehicles over 3.5 t|Right-of-way at the next intersection|Priority road|Yield|Stop|No vehicles|"
    "Vehicles over 3.5 t prohibited|No entry|General caution|Dangerous curve to the left|Dangerous curve to the right|"
    "Double curve|Bumpy road|Slippery road|Road narrows on the right|Road work|Traffic signals|Pedestrians|"
    "Children crossing|Bicycles crossing|Beware of ice/snow|Wild animals crossing|"
    "End of all speed and passing limits|Turn right ahead|Turn left ahead|Ahead only|Go straight or right|"
    "Go straight or left|Keep right|Keep left|Roundabout mandatory|End of no passing|"
    "End of no passing by vehicles over 3.5 t"
)
_CIFAR10 = "airplane|automobile|bird|cat|deer|dog|frog|horse|ship|truck"
_CIFAR100 = (
    "apple|aquarium_fish|baby|bear|beaver|bed|bee|beetle|bicycle|bottle|bowl|boy|bridge|bus|butterfly|camel|can|"
    "castle|caterpillar|cattle|chair|chimpanzee|clock|cloud|cockroach|couch|crab|crocodile|cup|dinosaur|dolphin|"
    "elephant|flatfish|forest|fox|girl|hamster|house|kangaroo|computer_keyboard|lamp|lawn_mower|leopard|lion|lizard|"
    "lobster|man|maple_tree|motorcycle|mountain|mouse|mushroom|oak_tree|orange|orchid|otter|palm_tree|pear|"
    "pickup_truck|pine_tree|plain|plate|poppy|porcupine|possum|rabbit|raccoon|ray|road|rocket|rose|sea|seal|shark|"
    "shrew|skunk|skyscraper|snail|snake|spider|squirrel|streetcar|sunflower|sweet_pepper|table|tank|telephone|"
    "television|tiger|tractor|train|trout|tulip|turtle|wardrobe|whale|willow_tree|wolf|woman|worm"
)


@dataclass(frozen=True, slots=True)
class _Spec:
    shape: tuple[int, ...]  # of one image
    class_names: tuple[str, ...]


_SETS: dict[str, _Spec] = {
    "mnist": _Spec((28, 28), tuple("0123456789")),
    "gtsrb": _Spec((32, 32, 3), tuple(_GTSRB.split("|"))),
    "cifar10": _Spec((32, 32, 3), tuple(_CIFAR10.split("|"))),
    "cifar100": _Spec((32, 32, 3), tuple(_CIFAR100.split("|"))),
    # Extended Yale B has no subject 14.
    "yaleb": _Spec((64, 56), tuple(f"yaleB{number:02d}" for number in range(1, 40) if number != 14)),
}

#: Names of the sets that `load_dataset` knows.
DATASET_NAMES: tuple[str, ...] = tuple(_SETS)


@dataclass(frozen=True, slots=True, eq=False)
class ImageSet:
    """One split of a labelled image set, as stored.

    Attributes
    ----------
    images : ndarray of shape (n, height, width) or (n, height, width, 3), uint8
        Grey or RGB.
    labels : ndarray of shape (n,), int64
        Index into `class_names`.
    class_names : tuple of str
    extra : mapping of str to ndarray of shape (n, ...)
        What else the set says of every image: `track` and `size` (GTSRB), `exact` (CIFAR-10), `light` (Yale B).
    """

    images: UInt8Array
    labels: IntArray
    class_names: tuple[str, ...]
    extra: Mapping[str, AnyArray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        grey_or_rgb = self.images.ndim == 3 or (self.images.ndim == 4 and self.images.shape[3] == 3)
        if self.images.dtype != np.uint8 or not grey_or_rgb:
            raise DataError(
                f"images must be uint8 (n, height, width) or (n, height, width, 3), "
                f"got {self.images.dtype} {self.images.shape}."
            )
        if self.labels.dtype != np.int64 or self.labels.shape != (len(self.images),):
            raise DataError(
                f"labels must be int64 of shape ({len(self.images)},), got {self.labels.dtype} {self.labels.shape}."
            )
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.class_names):
            raise DataError(
                f"labels must be 0 to {len(self.class_names) - 1}, got {self.labels.min()} to {self.labels.max()}."
            )
        for name, array in self.extra.items():
            if array.ndim == 0 or len(array) != len(self.images):
                raise DataError(f"extra array {name!r} must have {len(self.images)} rows, got shape {array.shape}.")
        object.__setattr__(self, "extra", MappingProxyType(dict(self.extra)))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice | AnyArray) -> ImageSet:
        """Return the chosen rows (a slice, an index array or a boolean mask) as a new set."""
        extra = {name: array[rows] for name, array in self.extra.items()}
        return ImageSet(self.images[rows], self.labels[rows], self.class_names, extra)


def default_data_dir() -> Path | None:
    """Return the folder of the image sets: `GUARD_DATA_DIR`, else shared/data beside a checkout, else None."""
    named = os.environ.get(DATA_DIR_VARIABLE)
    if named:
        return Path(named).expanduser()
    root = checkout_root()
    if root is not None and (root.parent / "shared" / "data").is_dir():
        return root.parent / "shared" / "data"
    return None


def load_dataset(name: str, split: str, data_dir: str | Path | None = None) -> ImageSet:
    """Read one split of a real image set.

    Parameters
    ----------
    name : {"mnist", "gtsrb", "cifar10", "cifar100", "yaleb"}
    split : {"train", "test"}
    data_dir : path, optional
        Folder that holds `<name>_<split>.npz`; by default `default_data_dir()`. MNIST's test split needs no folder:
        where there is none, the copy in the package is read.

    Returns
    -------
    images : ImageSet
        In the stored order; GTSRB's training split is sorted by class and track.

    Raises
    ------
    DatasetError
        If the name or split is unknown, or the file is missing, damaged, or holds something else.
    """
    if name not in _SETS:
        raise DatasetError(f"there is no image set {name!r}: known are {', '.join(_SETS)}.")
    if split not in ("train", "test"):
        raise DatasetError(f'split must be "train" or "test", got {split!r}.')
    folder = Path(data_dir) if data_dir is not None else default_data_dir()
    path = _find(name, split, folder)
    try:
        arrays = read_npz(path)
        images = arrays.pop("x") if "x" in arrays else _decode_strips(arrays.pop("webp"), arrays.pop("ends"))
        labels = arrays.pop("y")
        if images.shape[1:] != _SETS[name].shape:
            raise DataError(f"one image must have shape {_SETS[name].shape}, got {images.shape[1:]}")
        if not np.issubdtype(labels.dtype, np.integer):
            raise DataError(f"labels must be integers, got {labels.dtype}")
        return ImageSet(images, labels.astype(np.int64), _SETS[name].class_names, arrays)
    except KeyError as error:
        raise DatasetError(
            f"{path} holds no array {error}: it is not the file for {name} {split}. Copy it anew."
        ) from error
    except DataError as error:
        raise DatasetError(
            f"{path} is damaged or not {name} {split}: {str(error).rstrip('.')}. Copy it anew."
        ) from error


def to_tensor_images(images: UInt8Array) -> Float32Array:
    """Return images as a network takes them.

    Parameters
    ----------
    images : ndarray of shape (n, height, width) or (n, height, width, channels), uint8

    Returns
    -------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        Contiguous; grey images have one channel.

    Raises
    ------
    DataError
        If the type or shape is another.
    """
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError(f"images must be uint8 with 3 or 4 dimensions, got {images.dtype} {images.shape}.")
    channels_first = images[:, np.newaxis] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    scaled = np.ascontiguousarray(channels_first).astype(np.float32)
    scaled /= np.float32(255.0)
    return scaled


def split_rows(n: int, sizes: Sequence[int], rng: np.random.Generator) -> list[IntArray]:
    """Deal rows into disjoint random groups.

    Parameters
    ----------
    n : int
        Number of rows there are.
    sizes : sequence of int
        Size of each group; together at most n.
    rng : numpy.random.Generator

    Returns
    -------
    groups : list of ndarray of int64
        Row numbers, shuffled.

    Raises
    ------
    DataError
        If a size is negative or there are too few rows.
    """
    if min(sizes, default=0) < 0 or sum(sizes) > n:
        raise DataError(f"sizes must be >= 0 and sum to at most {n}, got {list(sizes)}.")
    order = rng.permutation(n).astype(np.int64, copy=False)
    return np.split(order[: sum(sizes)], np.cumsum(sizes)[:-1]) if len(sizes) else []


def _find(name: str, split: str, folder: Path | None) -> Path:
    file_name = f"{name}_{split}.npz"
    if folder is not None and (folder / file_name).is_file():
        return folder / file_name
    if (name, split) == ("mnist", "test"):
        return resource_path(file_name)
    searched = f"searched {folder}" if folder is not None else f"{DATA_DIR_VARIABLE} is not set"
    hint = " Or use its test split, which ships in the package." if name == "mnist" else ""
    raise DatasetError(
        f"{file_name} is missing: {searched}. "
        f"Set {DATA_DIR_VARIABLE} to the folder that holds {file_name}, or pass data_dir.{hint}"
    )


def read_npz(path: Path, max_values: int | None = None) -> dict[str, AnyArray]:
    """Read all arrays of a .npz; DataError if it is damaged, holds objects, or unpacks to more numbers than allowed."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked_bytes = sum(member.file_size for member in archive.infolist())
        # Before anything is unpacked: a small file may hold a huge array. Four bytes a number, and room for labels.
        if max_values is not None and unpacked_bytes > 4 * max_values + 2**24:
            raise DataError(f"it unpacks to {unpacked_bytes} bytes, more than {4 * max_values} allowed. Split the file")
        with np.load(path, allow_pickle=False) as arrays:
            return {key: np.asarray(arrays[key]) for key in arrays.files}
    except DataError:
        raise
    except Exception as error:  # NumPy lets through what its parsers of a hostile header stumble over
        if "allow_pickle" in str(error):
            raise DataError(
                "it holds Python objects, which could run code when they are read. Save numbers, and images of one size"
            ) from error
        raise DataError(
            f"it cannot be read as .npz ({' '.join(str(error).split())[:160]}). "
            "Fetch it again, or save it with numpy.savez"
        ) from error


def _decode_strips(webp: AnyArray, ends: AnyArray) -> UInt8Array:
    """Decode lossless WebP strips, 32 pixels wide, images stacked downwards."""
    if webp.dtype != np.uint8 or webp.ndim != 1 or ends.ndim != 1 or not len(ends) or ends[-1] != len(webp):
        raise DataError("the WebP strips and their ends do not fit together")
    starts = np.concatenate([[0], ends[:-1]])
    parts: list[UInt8Array] = []
    for begin, end in zip(starts, ends, strict=True):
        try:
            with Image.open(io.BytesIO(webp[begin:end].tobytes()), formats=("WEBP",)) as strip:
                pixels = np.asarray(strip.convert("RGB"))
        except (OSError, ValueError) as error:
            raise DataError(f"a WebP strip cannot be decoded ({error})") from error
        if pixels.shape[1] != 32 or pixels.shape[0] % 32:
            raise DataError(f"a WebP strip must be 32 pixels wide and a multiple of 32 high, got {pixels.shape[:2]}")
        parts.append(pixels.reshape(-1, 32, 32, 3))
    return np.concatenate(parts)
