"""From an archive that already runs to a guarded one that keeps its every file, and back to the same bytes."""

from __future__ import annotations

import sys
import tempfile
import unicodedata
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from guard.errors import ArchiveError, GuardError, SuspectModelError, UnsafeWeightsError
from guard.files import READABLE_FILE, read_plain, whole_file
from guard.resources import resource_path
from guard.storage.bundle import read_bundle
from guard.storage.places import BundlePlace
from guard.suspect.weights import check_weights_file
from guard.torchserve.archives.archive import add_files, check_module_names, plain_entry
from guard.torchserve.archives.contents import EXAMPLES, read_guard_files, write_guard_files
from guard.torchserve.archives.manifest import MANIFEST, Manifest, parse_manifest
from guard.torchserve.archives.original import RECIPE, make_recipe, original_bytes, original_digest
from guard.torchserve.archives.strict_zip import StrictZip, open_strict_zip
from guard.torchserve.user_handler import UserHandler, open_unpacked_handler
from guard.torchserve.worker import Remedy

#: Weights under any of these names are looked into, wherever a handler may find them.
WEIGHTS_SUFFIXES = (".pt", ".pth", ".pts", ".pt2", ".ckpt", ".pkl", ".pickle", ".safetensors")
#: Names that a guarded archive needs for itself.
_OURS = ("guard_handler.py", "guard_archive.json", "guard.toml", EXAMPLES, RECIPE)
_APPLE_DOUBLE = b"\x00\x05\x16\x07"
_MOST_YAML_BYTES = 2**18  # its reader takes a second for so much
_REMEDY = Remedy(
    "Install here what the server has installed for it, such as the archive's requirements, then try again.",
    "Does this archive run in TorchServe as it is?",
)


@dataclass(frozen=True, slots=True)
class OpenedArchive:
    """An archive that was checked, unpacked, and its weights looked into; none of its code has run.

    Attributes
    ----------
    original : StrictZip
    manifest : Manifest
    folder : Path
        Where its files are, until it is closed.
    model_settings : dict
        What its YAML file says.
    """

    original: StrictZip
    manifest: Manifest
    folder: Path
    model_settings: dict[str, Any]

    @property
    def handler(self) -> str:
        """The handler as this package names it: a file's name, or the name of one that TorchServe ships."""
        return self.manifest.handler_file or self.manifest.handler

    @contextmanager
    def running(self, model_attribute: str = "model", gpu: int | None = None) -> Iterator[UserHandler]:
        """Import and initialise the archive's own handler, as TorchServe would.

        Raises
        ------
        ArchiveError, SuspectModelError
            If it does not start, is a function, or leaves no network in that attribute.
        """
        with ExitStack() as stack:
            try:
                user = stack.enter_context(
                    open_unpacked_handler(
                        self.folder,
                        self.handler,
                        model_attribute=model_attribute,
                        gpu=gpu,
                        model_settings=self.model_settings,
                        remedy=_REMEDY,
                    )
                )
                self._check_function()
            except GuardError as error:
                raise _without_folder(error, self.folder, self.original.path.name) from error
            yield user

    def _check_function(self) -> None:
        """Refuse a file with a function `handle` beside its class: TorchServe calls that, and never the class."""
        module = sys.modules.get(Path(self.handler).stem) if self.manifest.handler_file else None
        if callable(getattr(module, "handle", None)):
            raise ArchiveError(
                f"handler {self.handler} has a function `handle`, which TorchServe calls instead of the class, and the "
                "guard wraps a class. Remove the function, and make the archive again."
            )


@contextmanager
def open_archive(path: Path) -> Iterator[OpenedArchive]:
    """Check an archive, unpack it into a temporary folder, and look into its weights.

    Raises
    ------
    ArchiveError
        If it is no archive, is hostile, is guarded already, or its manifest does not fit.
    UnsafeWeightsError, SuspectModelError
        If loading its weights could run code, or they are damaged.
    """
    if path.is_dir() or path.name.endswith((".tar.gz", ".tgz")):
        raise ArchiveError(
            f"{path} is not a .mar file. Make the archive with torch-model-archiver's default --archive-format."
        )
    with open_strict_zip(path) as original, tempfile.TemporaryDirectory(prefix="guard-wrap-") as scratch:
        if "guard_archive.json" in original.members:
            raise ArchiveError(f"{path.name} is guarded already. Take the guard out first with `guard unwrap`.")
        if MANIFEST not in original.members:
            deeper = next((name for name in original.members if name.endswith(f"/{MANIFEST}")), None)
            raise ArchiveError(
                f"{path.name} holds no {MANIFEST}. "
                + (
                    f"It has {deeper}: pack what is in that folder, not the folder."
                    if deeper
                    else "Name an archive that torch-model-archiver made."
                )
            )
        try:
            manifest = parse_manifest(original.read(MANIFEST), original.members)
            _check_names(original)
        except ArchiveError as error:
            raise ArchiveError(f"{path.name}: {error}") from error
        folder = Path(scratch).resolve() / "model"
        original.unpack(folder)
        _check_weights(folder, manifest, path.name)
        yield OpenedArchive(original, manifest, folder, _model_settings(folder, manifest, path.name))


@contextmanager
def open_guarded(path: Path) -> Iterator[UserHandler]:
    """Run the handler inside a guarded archive, without its guard, as a server would.

    Raises
    ------
    ArchiveError
        If it is no guarded archive, hostile or damaged.
    UnsafeWeightsError, SuspectModelError
        If loading its weights could run code, or its handler does not start.
    """
    with open_strict_zip(path) as packed, tempfile.TemporaryDirectory(prefix="guard-served-") as scratch:
        folder = Path(scratch).resolve() / "model"
        packed.unpack(folder)
        about, settings = read_guard_files(folder)
        manifest = parse_manifest(packed.read(MANIFEST), packed.members)
        _check_weights(folder, manifest, path.name)
        bundle = read_bundle(folder / about["embedded"])
        attribute = {**bundle.document["settings"], **settings}.get("model_attribute", "model")
        opened = open_unpacked_handler(
            folder,
            about["handler"],
            model_attribute=attribute,
            model_settings=_model_settings(folder, manifest, path.name),
            remedy=_REMEDY,
        )
        with opened as user:
            yield user


def write_guarded(
    opened: OpenedArchive,
    bundle: Path,
    output: Path,
    *,
    bundles: BundlePlace | None = None,
    settings: Mapping[str, Any] | None = None,
    examples: Sequence[bytes] = (),
    force: bool = False,
) -> None:
    """Write the archive with a guard around its handler; the file appears when it is whole, and was read back.

    Parameters
    ----------
    opened : OpenedArchive
    bundle : Path
        Folder of the bundle to serve; a copy goes into the archive.
    output : Path
        The new file.
    bundles : path-like, optional
        Folder or URL whose ACTIVE the server follows.
    settings : mapping, optional
        Serving settings that override those of the bundle.
    examples : sequence of bytes, optional
        Bodies of requests, which a worker tries its handler with.
    force : bool
        Replace a file of that name; never the archive itself.

    Raises
    ------
    ArchiveError
        If the file is there and `force` is not set, it is the archive itself, or it cannot be written.
    BundleError
        If the bundle is damaged.
    """
    read_bundle(bundle)
    original = opened.original
    check_output(output, original.path, force)
    kept = [name for name in original.members if name != MANIFEST]
    with tempfile.TemporaryDirectory(prefix="guard-wrap-") as scratch:
        bodies = [Path(scratch) / f"body-{number}" for number in range(len(examples))]
        for path, body in zip(bodies, examples, strict=True):
            path.write_bytes(body)
        added = write_guard_files(opened.handler, bundle, bundles, settings or {}, None, bodies, Path(scratch))
        files = {"guard_handler.py": resource_path("guard_handler.py")}
        for path in added:
            below = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
            files |= {file.relative_to(path.parent).as_posix(): file for file in below}
        try:
            with whole_file(output) as file:
                with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
                    for name in kept:
                        _copy_packed(original, name, packed)
                    packed.writestr(plain_entry(MANIFEST), opened.manifest.with_handler("guard_handler.py"))
                    packed.writestr(plain_entry(RECIPE), make_recipe(original, kept))
                    add_files(packed, dict(sorted(files.items())))
                file.flush()
                with open_strict_zip(Path(file.name)) as written:  # read back before it gets its name
                    for _ in original_bytes(written):
                        pass
        except OSError as error:
            raise ArchiveError(
                f"{output} cannot be written: {error.strerror or error}. Check the folder and the disk."
            ) from error


def unwrap(guarded: Path, output: Path, *, force: bool = False) -> str:
    """Write the archive that a guarded one was made from, byte for byte.

    Parameters
    ----------
    guarded : Path
        What `write_guarded` wrote.
    output : Path
        The new file.
    force : bool
        Replace a file of that name.

    Returns
    -------
    digest : str
        Its SHA-256, 64 hexadecimal digits, compared with what it was.

    Raises
    ------
    ArchiveError
        If it holds no original, was changed since, or the file is there and `force` is not set.
    """
    with open_strict_zip(guarded) as opened:
        digest = original_digest(opened)
        check_output(output, guarded, force)
        try:
            with whole_file(output, READABLE_FILE) as file:
                for part in original_bytes(opened):
                    file.write(part)
        except OSError as error:
            raise ArchiveError(
                f"{output} cannot be written: {error.strerror or error}. Check the folder and the disk."
            ) from error
    return digest


def check_output(output: Path, source: Path, force: bool) -> None:
    """Refuse to write over an archive's own file, or without `force` over any other, with ArchiveError."""
    if output.exists() and source.exists() and output.samefile(source):
        raise ArchiveError(f"{output} is the archive itself, which is never written over. Name another --output.")
    if output.is_dir():
        raise ArchiveError(f"--output {output} is a folder. Name a file in it.")
    if not output.parent.is_dir():
        raise ArchiveError(f"--output {output}: there is no folder {output.parent}. Make it first.")
    if output.exists() and not force:
        raise ArchiveError(f"{output} exists already. Name another --output, or replace it with --force.")


def _check_names(original: StrictZip) -> None:
    names = {unicodedata.normalize("NFC", name.split("/")[0].casefold()) for name in original.members}
    for name in _OURS:
        if name in names:
            raise ArchiveError(f"it has a file {name}, a name that the guard needs. Rename it, and make it again.")
    check_module_names(original.members)


def _check_weights(folder: Path, manifest: Manifest, archive: str) -> None:
    """Look into the weights that the manifest names, and into every other file that looks like weights by its name."""
    others = sorted(file for file in folder.rglob("*") if file.suffix.lower() in WEIGHTS_SUFFIXES and file.is_file())
    others = [file for file in others if not _is_apple_double(file)]
    first = [folder / manifest.weights] if manifest.weights is not None else []
    for file in dict.fromkeys([*first, *others]):
        try:
            check_weights_file(file)
        except (UnsafeWeightsError, SuspectModelError) as error:
            raise _without_folder(error, folder, archive) from None


def _is_apple_double(file: Path) -> bool:
    """Whether a file holds what a Mac keeps beside another one: nothing that begins so can be loaded as weights."""
    if not file.name.startswith("._"):
        return False
    with file.open("rb") as opened:
        return opened.read(len(_APPLE_DOUBLE)) == _APPLE_DOUBLE


def _without_folder(error: GuardError, folder: Path, archive: str) -> GuardError:
    """Return the error as seen from the archive: nobody knows the temporary folder that it was unpacked to."""
    text = str(error).replace(f"{folder}/", "").replace(str(folder), archive)
    return type(error)(text if text.startswith(f"{archive}: ") else f"{archive}: {text}")


def _model_settings(folder: Path, manifest: Manifest, archive: str) -> dict[str, Any]:
    if manifest.config_file is None:
        return {}
    try:
        text = read_plain(folder / manifest.config_file, _MOST_YAML_BYTES).decode("utf-8")
        settings = yaml.safe_load(text)
    except (yaml.YAMLError, OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ArchiveError(f"{archive}: {manifest.config_file} is no YAML ({reason}). Mend it.") from error
    if not isinstance(settings, dict | None):
        raise ArchiveError(f"{archive}: {manifest.config_file} must hold keys and values. Mend it.")
    if settings and "pt2" in settings:
        raise ArchiveError(
            f"{archive}: {manifest.config_file} compiles the network (pt2), and a guard cannot watch a compiled one. "
            "Take pt2 out, and make the archive again."
        )
    return settings or {}


def _copy_packed(original: StrictZip, name: str, packed: zipfile.ZipFile) -> None:
    """Add a member with its packed bytes as they are: the original comes from them again, and nothing is packed twice.

    zipfile has no call for it, so its list is written to; `writestr` afterwards goes on from `start_dir`.
    """
    member, entry, file = original.members[name], plain_entry(name), packed.fp
    assert file is not None
    entry.compress_type, entry.CRC = member.method, member.crc
    entry.file_size, entry.compress_size = member.size, member.packed_size
    entry.header_offset = packed.start_dir
    if member.is_folder:
        entry.external_attr = (0o40755 << 16) | 0x10
    file.seek(packed.start_dir)
    file.write(entry.FileHeader())
    for part in original.packed(name):
        file.write(part)
    packed.start_dir = file.tell()
    packed.filelist.append(entry)
    packed.NameToInfo[name] = entry
