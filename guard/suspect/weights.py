"""Weights files from strangers: look before loading, and load tensors only.

Files are judged by their content, never by their name, and whatever is not recognised is refused. Nothing of a file
is executed: archives are judged by the names of their members, pickles go through torch's tensors-only reader.
"""

from __future__ import annotations

import mmap
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from guard.errors import SuspectModelError, UnsafeWeightsError

CONVERT = (
    "Convert it in a sandbox without network or secrets: build the architecture from code you trust, and save "
    "model.state_dict() with safetensors.torch.save_file(...) or torch.save(...)."
)

#: Names that a checkpoint gives to the state dict inside it, and prefixes that wrappers put before every key.
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")
WRAPPER_PREFIXES = ("module.", "_orig_mod.")

#: All that torch.save writes into its zip archive, below one top folder.
_STATE_DICT_MEMBER = re.compile(
    r"[^/]+/(data\.pkl|data/\d+|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id)"
)
_ZIP = b"PK\x03\x04"
_TORCH_PICKLE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number that torch.save wrote before 1.6
_MAX_SAFETENSORS_HEADER = 100_000_000  # bytes; the limit of the format
_MAX_PICKLE = 2**23  # bytes; room for the names and shapes of 50,000 tensors
#: The one thing that torch's tensors-only reader calls with a size of the file's choice: 20 bytes become gigabytes.
_SIZED = re.compile(rb"c(__builtin__|builtins)\nbytearray\n")

#: What trainers put beside the weights (timm, torchvision's references): their arguments, paths, NumPy numbers.
_BESIDE = (
    *("argparse.Namespace", "types.SimpleNamespace"),
    *("pathlib.Path", "pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.WindowsPath"),
    *("pathlib._local.PosixPath", "pathlib._local.WindowsPath"),  # Python 3.13
    *("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
    *("numpy.dtypes.Float32DType", "numpy.dtypes.Float64DType", "numpy.dtypes.Int64DType"),
)

JOIN = "Weights in several files must be joined first: load each, and save all tensors in one with safetensors."
#: (bytes, offset, what the file is, what to do): foreign formats worth a name of their own.
_FOREIGN = (
    (b"{", 0, "JSON, and holds no tensors", f"If it is an index: {JOIN[0].lower()}{JOIN[1:]}"),
    (b"\x7fELF", 0, "a compiled library (ELF), which runs code when loaded", CONVERT),
    (b"MZ", 0, "a Windows program or library, which runs code when loaded", CONVERT),
    (b"\xcf\xfa\xed\xfe", 0, "a compiled library (Mach-O), which runs code when loaded", CONVERT),
    (b"\xca\xfe\xba\xbe", 0, "a compiled library (Mach-O), which runs code when loaded", CONVERT),
    (b"\x93NUMPY", 0, "a NumPy array, not a state dict", CONVERT),
    (b"\x89HDF", 0, "an HDF5 file (Keras), not a PyTorch state dict", CONVERT),
    (b"GGUF", 0, "a GGUF file, not a PyTorch state dict", CONVERT),
    (b"\x1f\x8b", 0, "a gzip archive", "Unpack it first."),
    (b"7z\xbc\xaf\x27\x1c", 0, "a 7-Zip archive", "Unpack it first."),
    (b"BZh", 0, "a bzip2 archive", "Unpack it first."),
    (b"\xfd7zXZ\x00", 0, "an xz archive", "Unpack it first."),
    (b"Rar!", 0, "a RAR archive", "Unpack it first."),
    (b"ustar", 257, "a tar archive, which torch.load reads with an unrestricted pickle", CONVERT),
    (b"version https://git-lfs", 0, "a Git LFS pointer, not the file itself", "Run git lfs pull."),
    (b"\x80", 0, "a Python pickle that torch.save did not write; loading it could run code", CONVERT),
)
_WEB_PAGE = re.compile(rb"\s*<(!doctype|html|head|\?xml|error)", re.IGNORECASE)


def check_weights_file(path: str | Path) -> None:
    """Look into a weights file and refuse it unless it holds tensors and nothing that could run.

    Cheap: of a safetensors file or a zip archive made by `torch.save` no tensor is read. To be called before any other
    loader touches the file.

    Parameters
    ----------
    path : str or Path
        The file. Its extension is ignored.

    Raises
    ------
    UnsafeWeightsError
        If it is a whole-module pickle, TorchScript, `.pt2`, a library, an ONNX graph, or anything not recognised.
    SuspectModelError
        If it is missing, empty or truncated.
    """
    _read(Path(path), map_only=True)


def load_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Load a state dict onto the CPU from a safetensors file or from what `torch.save(model.state_dict(), ...)` wrote.

    For use without the architecture; with it, `guard.suspect.checkpoints.load_weights` finds more. A state dict nested
    under `"state_dict"`, `"model_state_dict"` or `"model"` is taken out, and a prefix `"module."` or `"_orig_mod."`
    that every key carries is removed.

    Parameters
    ----------
    path : str or Path
        The file. Its extension is ignored.

    Returns
    -------
    state_dict : dict of str to Tensor
        Parameters and buffers, on the CPU, in their own dtype.

    Raises
    ------
    UnsafeWeightsError
        If loading the file could run code, or it holds no state dict (see `check_weights_file`).
    SuspectModelError
        If it is missing, empty or truncated, or an entry is no dense tensor.
    """
    return _plain_state_dict(read_weights(path), str(path))


def read_weights(path: str | Path) -> Any:
    """Return all that a weights file holds: tensors on the CPU, numbers, text, and dictionaries and lists of these.

    Raises
    ------
    UnsafeWeightsError, SuspectModelError
        As `check_weights_file`.
    """
    return _read(Path(path), map_only=False)


def check_dense(path: str, name: str, tensor: Tensor) -> None:
    """Refuse a tensor that is sparse, or larger than the bytes that are there.

    Raises
    ------
    SuspectModelError
    """
    if tensor.layout is not torch.strided:
        raise SuspectModelError(
            f"weights file {path}: entry {name[:80]!r} must be a dense tensor, got {tensor.layout}. "
            "Save model.state_dict() of dense weights."
        )
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise SuspectModelError(
            f"weights file {path}: entry {name[:80]!r} has shape {tuple(tensor.shape)}, more than the "
            f"{tensor.untyped_storage().nbytes()} bytes that are there. Save contiguous tensors."
        )


def _read(path: Path, map_only: bool) -> Any:
    """Return what the file holds; with `map_only` the tensors' bytes are left on disk where the format allows it."""
    if path.is_dir():
        raise SuspectModelError(f"weights file {path} is a folder. Name the file in it. {JOIN}")
    try:
        with path.open("rb") as file:
            head = file.read(512)
        size = path.stat().st_size
    except OSError as error:
        raise SuspectModelError(f"cannot read weights file {path}: {error.strerror}. Check the path.") from None
    if not head:
        raise SuspectModelError(f"weights file {path} is empty. Fetch or save it again.")
    header = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header <= _MAX_SAFETENSORS_HEADER:
        if header + 8 > size:
            raise _damaged(path, "its header is longer than the file")
        return _read_safetensors(path, map_only)
    if head.startswith(_ZIP):
        _check_zip_members(path)
        return _read_torch(path, "meta" if map_only else "cpu")  # "meta": shapes without bytes
    if head.startswith(_TORCH_PICKLE):
        _check_old_pickle(path)
        return _read_torch(path, "cpu")
    for magic, offset, kind, remedy in _FOREIGN:
        if head.startswith(magic, offset):
            raise UnsafeWeightsError(f"weights file {path} is {kind}. {remedy}")
    if _WEB_PAGE.match(head):
        raise UnsafeWeightsError(
            f"weights file {path} is a web page, not the file itself: whoever was asked for it answered with a page. "
            "Fetch it again, logged in if that is needed."
        )
    if head[0] == 0x08 and (b"onnx" in head or b"pytorch" in head or head[2:3] == b"\x12"):  # ir_version, producer
        raise UnsafeWeightsError(f"weights file {path} is an ONNX graph, not a PyTorch state dict. {CONVERT}")
    raise UnsafeWeightsError(f"weights file {path} is neither safetensors nor a PyTorch state dict. {CONVERT}")


def _read_safetensors(path: Path, map_only: bool) -> dict[str, Tensor]:
    try:
        if not map_only:
            return safetensors.torch.load_file(path)
        with safetensors.safe_open(path, framework="pt"):
            return {}
    except Exception as error:  # a damaged header, or numbers that torch has no type for
        raise _damaged(path, str(error)) from None


def _check_zip_members(path: Path) -> None:
    """Refuse every archive that is not laid out exactly as `torch.save` does it."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            names = [member.filename for member in members]
            pickled = b"".join(
                archive.read(member)
                for member in members
                if member.filename.endswith("/data.pkl") and member.file_size <= min(_MAX_PICKLE, member.compress_size)
            )
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, EOFError, struct.error, zlib.error) as error:
        raise _damaged(path, str(error)) from None
    problem = None
    if any(name.endswith(("/constants.pkl", "/model.json")) and "/models/" not in name for name in names) or any(
        "/code/" in name for name in names
    ):
        problem = "a TorchScript archive, which carries a program"
    elif any(name.endswith(("archive_format", "serialized_exported_program.json")) for name in names):
        problem = "a torch.export archive (.pt2), which carries a program"
    elif any(name.endswith(".npy") for name in names):
        problem = "a NumPy archive (.npz), not a state dict"
    elif any(name.startswith("MAR-INF/") for name in names):
        problem = "a TorchServe model archive (.mar); name the weights file inside it"
    elif strange := next((name for name in names if not _STATE_DICT_MEMBER.fullmatch(name)), None):
        problem = f"a zip archive with a member that torch.save does not write ({strange[:80]!r})"
    elif len(set(names)) < len(names):  # readers disagree on which of two equal names they open
        problem = "a zip archive in which one name occurs twice"
    elif sum(name.endswith("/data.pkl") for name in names) != 1:
        problem = "a zip archive without exactly one data.pkl"
    elif any(
        member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size for member in members
    ):
        problem = "a zip archive with packed members, which torch.save does not write: a small file may hold a huge one"
    elif sum(member.file_size for member in members) > path.stat().st_size:
        problem = "a zip archive whose members lie over each other"
    elif not pickled:
        problem = f"a zip archive whose data.pkl has more than {_MAX_PICKLE} bytes, or none"
    elif _SIZED.search(pickled):
        problem = "a pickle that asks for bytearray, which no state dict needs"
    if problem:
        raise UnsafeWeightsError(f"weights file {path} is {problem}. {CONVERT}")


def _check_old_pickle(path: Path) -> None:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if _SIZED.search(content):
            raise UnsafeWeightsError(
                f"weights file {path} is a pickle that asks for bytearray, which no state dict needs. {CONVERT}"
            )


class _Ignored:
    """Stands for every object of `_BESIDE` that a file asks for: takes whatever it is given, keeps and does nothing."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def _read_torch(path: Path, device: str) -> Any:
    ignored = torch.serialization.safe_globals([(_Ignored, name) for name in _BESIDE])
    try:
        with (
            ignored,
            path.open("rb") as file,
        ):  # given a path instead, torch.load would let the extension choose the reader
            return torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnsafeWeightsError(f"weights file {path} is {_name_pickle(str(error))}. {CONVERT}") from None
    except Exception as error:  # whatever a damaged or hostile file makes the reader stumble over
        raise _damaged(path, f"{type(error).__name__}: {error}") from None


def _name_pickle(message: str) -> str:
    """Say in words what torch's tensors-only reader refused."""
    found = re.search(r"GLOBAL (\S+) was not an allowed|module (\S+) is blocked|load (\S+) without", message)
    if found is None:
        return "a pickle that holds more than tensors, and loading it could run code"
    name = next(group for group in found.groups() if group)
    if name.startswith("torch.nn.") or name.startswith("__main__."):
        return f"a pickle of a whole module (it asks for {name}), and loading it could run code"
    return f"a pickle that asks for {name}, and loading it could run code"


def _damaged(path: Path, reason: str) -> SuspectModelError:
    line = " ".join(reason.split())[:160].rstrip(".")
    return SuspectModelError(f"weights file {path} is truncated or damaged ({line}). Fetch or save it again.")


def _plain_state_dict(content: Any, path: str) -> dict[str, Tensor]:
    for _ in range(2):  # {"model": {"state_dict": ...}} happens too
        if isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
            content = next((content[k] for k in STATE_DICT_KEYS if isinstance(content.get(k), Mapping)), content)
    if not isinstance(content, Mapping) or not content:
        raise SuspectModelError(
            f"weights file {path} must hold a state dict, got {type(content).__name__} "
            f"of {len(content) if isinstance(content, Mapping) else 'no'} entries. Save model.state_dict()."
        )
    state: dict[str, Tensor] = {}
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise SuspectModelError(
                f"weights file {path}: entry {str(name)[:80]!r} must be a dense tensor, got {type(tensor).__name__}. "
                "Save model.state_dict() alone."
            )
        check_dense(path, name, tensor)
        state[name] = tensor.detach()
    for prefix in WRAPPER_PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state
