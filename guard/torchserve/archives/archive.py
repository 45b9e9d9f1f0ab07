"""Make TorchServe model archives (.mar) and find them: every file once, folders kept, the same bytes each time."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from guard.errors import ArchiveError, ServerError
from guard.extras import require
from guard.files import PRIVATE_FILE, READABLE_FILE, READABLE_FOLDER, whole_file
from guard.torchserve.archives.manifest import MANIFEST
from guard.torchserve.archives.strict_zip import read_member

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
#: In a worker the archive's folder comes first on sys.path: such a file would replace what everybody imports.
_RESERVED_MODULES = sys.stdlib_module_names | {
    "guard", "model_archiver", "numpy", "PIL", "psutil", "safetensors", "scipy", "sklearn", "torch", "ts", "yaml"
}  # fmt: skip
#: Of a model whose manifest names no version, as TorchServe has it.
UNNAMED_VERSION = "1.0"
#: Numbers and pictures go in as they are: deflating takes a second per 30 MB, and saves a quarter at most.
_STORED = (".safetensors", ".pt", ".pth", ".pkl", ".bin", ".npz", ".png", ".jpg", ".jpeg", ".webp")
_NEVER_PACKED = {"__pycache__", "__MACOSX", ".git", ".DS_Store"}
_MOST_MANIFEST_BYTES = 2**20
_EARLIEST_ZIP_TIME = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Archive:
    """One archive in a model store: its file's name, and the model and version that its manifest names."""

    file: str
    name: str
    version: str


def make_archive(
    name: str,
    *,
    model_store: Path,
    handler: Path,
    weights: Path,
    model_file: Path | None = None,
    extra_files: Sequence[Path] = (),
    version: str = "1.0",
    config_yaml: Path | None = None,
    force: bool = False,
    private: bool = False,
) -> Path:
    """Write `<model_store>/<name>.mar`.

    The manifest comes from torch-model-archiver; the packing is our own. The stock packer lets one extra file replace
    another of the same name, strips the name of a folder and mixes its contents with the rest, drops hidden folders,
    reads commas and `*` in paths as lists and patterns, deletes `<temporary folder>/<name>`, and leaves half an
    archive when it fails.

    Parameters
    ----------
    name : str
        Name under which the model is served: letters, digits, `_`, `-`, `.`.
    model_store : Path
        Folder for the archive; made if it is missing.
    handler : Path
        Python file with exactly one class, a TorchServe handler.
    weights : Path
        The weights file, packed under its own name.
    model_file : Path, optional
        Python file of the network.
    extra_files : sequence of Path
        Files go to the top of the archive; a folder goes there whole, under its own name.
    version : str
        Version of the model.
    config_yaml : Path, optional
        TorchServe's model configuration.
    force : bool
        Replace an archive of this name; a server that runs keeps the old one.
    private : bool
        Let nobody but the owner read it, whatever the umask: for one that holds settings. Else everybody may.

    Returns
    -------
    archive : Path
        The file, complete: it is written under another name first, then renamed.

    Raises
    ------
    ArchiveError
        If the name has odd characters, a file is missing or comes twice, a name would hide a Python module, a link
        leads somewhere else, or the archive is there and `force` is not set.
    """
    if not _NAME.fullmatch(name):
        raise ArchiveError(f"archive name must match {_NAME.pattern}, got {name!r}. Rename the model.")
    if not _NAME.fullmatch(version):
        raise ArchiveError(f"archive version must match {_NAME.pattern}, got {version!r}. Write it like 1.0.")
    archive = Path(model_store) / f"{name}.mar"
    check_free(archive, force)
    singles = [file for file in (handler, weights, model_file, config_yaml) if file is not None]
    members = _collect([Path(path) for path in singles], [Path(path) for path in extra_files])
    manifest = _manifest(name, version, handler, weights, model_file, config_yaml)
    try:
        archive.parent.mkdir(mode=READABLE_FOLDER, parents=True, exist_ok=True)  # an archive is code
        _write(archive, members, manifest, PRIVATE_FILE if private else READABLE_FILE)
    except OSError as error:
        raise ArchiveError(
            f"{archive} cannot be written: {error.strerror or error}. Check the folder and the disk."
        ) from error
    return archive


def check_free(archive: Path, force: bool) -> None:
    """Refuse to replace an archive without `force`, with ArchiveError."""
    if archive.exists() and not force:
        raise ArchiveError(f"{archive} exists already. Name another model, or replace it with --force.")


def find_archives(model_store: Path, models: Mapping[str, str] | Literal["all"] = "all") -> dict[str, Archive]:
    """Return the archives to serve by the name that each is served under.

    Parameters
    ----------
    model_store : Path
        Folder of the archives.
    models : mapping of str to str, or "all"
        File for every name; `"all"` takes every archive of the folder, under the name in its manifest.

    Raises
    ------
    ServerError
        If there is none, one is missing or damaged, two have the same name, or a name has odd characters.
    """
    if not model_store.is_dir():
        raise ServerError(f"model store {model_store} is not a folder. Make it, and put .mar archives there.")
    if isinstance(models, str):
        archives = [_read_manifest(file) for file in sorted(model_store.glob("*.mar"))]
        served = {archive.name: archive for archive in archives}
        if twice := [archive for archive in archives if served[archive.name] is not archive]:
            name, other = twice[0].name, served[twice[0].name].file
            raise ServerError(
                f"two archives of the model store, {twice[0].file} and {other}, hold the same model name, {name}. "
                f"Name the models to serve, such as {name}={other}."
            )
    else:
        served = {name: _read_manifest(model_store / file) for name, file in models.items()}
    if not served:
        raise ServerError(f"there is no model to serve in {model_store}. Make one with `guard archive`.")
    for name, archive in served.items():
        if not _NAME.fullmatch(name) or not _NAME.fullmatch(archive.file):
            raise ServerError(f"names must match {_NAME.pattern}, got {name!r} in {archive.file!r}. Rename the model.")
    return served


def _read_manifest(file: Path) -> Archive:
    if not file.is_file():
        raise ServerError(f"archive {file} does not exist. Make it with `guard archive`, or name another.")
    try:
        text = read_member(file, MANIFEST, _MOST_MANIFEST_BYTES)
        model = json.loads(text or b"{}")["model"]
        return Archive(file.name, str(model["modelName"]), str(model.get("modelVersion") or UNNAMED_VERSION))
    except ArchiveError as error:
        raise ServerError(f"archive {file} is damaged: {error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ServerError(f"archive {file} is damaged: {reason}. Make it again with `guard archive`.") from error


def _collect(singles: list[Path], extra_files: list[Path]) -> dict[str, Path]:
    """Return the files by the name that each has inside the archive, sorted."""
    members: dict[str, Path] = {}
    for path in singles:
        if not path.is_file():
            raise ArchiveError(f"{path} does not exist, or is no file. Check the path.")
        _add(members, path.name, path)
    for path in extra_files:
        if path.is_dir():
            root = path.absolute()
            for file in _files_below(root):
                _add(members, f"{root.name}/{file.relative_to(root).as_posix()}", file)
        elif path.is_file():
            _add(members, path.name, path)
        else:
            raise ArchiveError(f"extra file {path} does not exist. Check the path.")
    check_module_names(members)
    return dict(sorted(members.items()))


def check_module_names(members: Iterable[str]) -> None:
    """Refuse names that would hide a Python module which everybody imports, with ArchiveError."""
    for name in members:
        top, _, rest = name.partition("/")
        is_module = rest == "__init__.py" if rest else top.endswith(".py")
        if is_module and top.removesuffix(".py") in _RESERVED_MODULES:
            raise ArchiveError(f"{name!r} in an archive would hide the Python module of that name. Rename it.")


def _files_below(folder: Path) -> list[Path]:
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(set(folders) - _NEVER_PACKED)
        for entry in [*folders, *sorted(names)]:
            path = Path(parent, entry)
            if path.is_symlink():
                raise ArchiveError(f"{path} is a symbolic link: a folder is packed without links. Copy the file there.")
            if entry in names and entry not in _NEVER_PACKED:
                files.append(path)
    return files


def _add(members: dict[str, Path], name: str, path: Path) -> None:
    if name.casefold() in (known.casefold() for known in members):
        raise ArchiveError(f"two files would be {name!r} in the archive: names must differ. Rename {path}.")
    if name.split("/")[0].casefold() == "mar-inf":
        raise ArchiveError("MAR-INF is where the archive keeps its manifest. Rename that file or folder.")
    members[name] = path


def _manifest(
    name: str, version: str, handler: Path, weights: Path, model_file: Path | None, config_yaml: Path | None
) -> str:
    require("torchserve")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its version file open
        from model_archiver.model_archiver_config import ModelArchiverConfig
        from model_archiver.model_packaging_utils import ModelExportUtils
    config = ModelArchiverConfig(
        model_name=name,
        version=version,
        handler=str(handler),
        serialized_file=str(weights),
        model_file=None if model_file is None else str(model_file),
        config_file=None if config_yaml is None else str(config_yaml),
    )
    manifest = json.loads(ModelExportUtils.generate_manifest_json(config))
    manifest["createdOn"] = "01/01/1980 00:00:00"  # not the clock; the server warns if it is missing, and ignores it
    return json.dumps(manifest, indent=2)


def _write(archive: Path, members: dict[str, Path], manifest: str, mode: int) -> None:
    with whole_file(archive, mode) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
        packed.writestr(plain_entry(MANIFEST), manifest)
        add_files(packed, members)


def add_files(packed: zipfile.ZipFile, members: Mapping[str, Path]) -> None:
    """Write files into an archive, by the name that each has there."""
    for name, path in members.items():
        entry = plain_entry(name)
        with path.open("rb") as source, packed.open(entry, "w", force_zip64=_is_huge(path)) as target:
            while part := source.read(2**20):
                target.write(part)


def plain_entry(name: str) -> zipfile.ZipInfo:
    """Return an archive's entry for a file, the same whenever and by whomever it is made."""
    entry = zipfile.ZipInfo(name, _EARLIEST_ZIP_TIME)
    entry.compress_type = zipfile.ZIP_STORED if name.lower().endswith(_STORED) else zipfile.ZIP_DEFLATED
    entry._compresslevel = 1  # type: ignore[attr-defined]  # an entry of its own does not take the archive's level
    entry.external_attr = (stat.S_IFREG | 0o644) << 16
    return entry


def _is_huge(path: Path) -> bool:
    return path.stat().st_size >= 2**31 - 2**20
