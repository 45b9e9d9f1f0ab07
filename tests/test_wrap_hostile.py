"""Archives from strangers: what is hostile is refused in one line, before anything of it runs or is written."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from wrap_helpers import classifier_archive, contents, raw_zip, rewritten, stock_archive

from guard.errors import ArchiveError, GuardError, ServerError, UnsafeWeightsError
from guard.lab.attacks import MnistCnn
from guard.torchserve.archives import strict_zip
from guard.torchserve.archives.archive import find_archives
from guard.torchserve.archives.contents import followed_bundles, read_guard_files
from guard.torchserve.archives.manifest import MANIFEST
from guard.torchserve.archives.strict_zip import open_strict_zip
from guard.torchserve.archives.wrapping import open_archive

LINK, DEVICE, FOLDER = 0o120777, 0o020666, 0o040755
DEFLATED = zipfile.ZIP_DEFLATED


def deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


def packed(data: bytes, **lies: int) -> tuple[bytes, dict[str, int]]:
    return deflate(data), {"method": DEFLATED, "crc": zlib.crc32(data), "size": len(data), **lies}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier_archive(tmp_path_factory.mktemp("stock"), MnistCnn())


def refused(path: Path) -> str:
    with pytest.raises(GuardError) as caught, open_archive(path):
        pass
    assert "\n" not in str(caught.value)
    assert "/model/" not in str(caught.value)  # the temporary folder is nobody's business
    return str(caught.value)


NAMES = {
    b"/etc/passwd": "absolute path",
    b"C:/windows": "absolute path",
    b"../outside": "leads out",
    b"a/../../b": "leads out",
    b"a//b": "leads out",
    b"./a": "leads out",
    b"a\\b": "backslash",
    b"a\x00b": "control character",
    b"a\nb": "control character",
    b"x" * 300: "too long",
    b"": "leads out",
}


@pytest.mark.parametrize(("name", "message"), NAMES.items())
def test_strict_zip_refuses_names_that_lead_elsewhere(tmp_path: Path, name: bytes, message: str) -> None:
    with pytest.raises(ArchiveError, match=message), open_strict_zip(raw_zip(tmp_path / "a.mar", (name, b"x", {}))):
        pass


MEMBERS: dict[str, list[tuple[bytes, bytes, dict[str, int]]]] = {
    "symbolic link": [(b"a", b"/etc/passwd", {"kind": LINK})],
    "neither a file nor a folder": [(b"a", b"", {"kind": DEVICE})],
    "there twice": [(b"a", b"1", {}), (b"a", b"2", {})],
    "differ only in case": [(b"weights.pt", b"1", {}), (b"Weights.PT", b"2", {})],
    "differ only in case or": [(b"Lib/a", b"1", {}), (b"lib/b", b"2", {})],
    "case or spelling": [("\u00e9".encode(), b"1", {}), ("e\u0301".encode(), b"2", {})],
    "both a file and a folder": [(b"a", b"1", {}), (b"a/b", b"2", {})],
    "not in UTF-8": [(b"\xe9", b"1", {"flags": 0})],
    "encrypted": [(b"a", b"1", {"flags": 1})],
    "packed by method 12": [(b"a", b"1", {"method": 12})],
    "sizes that contradict": [(b"a", b"1", {"size": 2})],
    "contradicts the archive's list": [(b"a", *packed(b"one", local_size=4))],
    "unlisted bytes behind it": [(b"a", b"1", {"gap": 7}), (b"b", b"2", {})],
}


@pytest.mark.parametrize(("message", "members"), MEMBERS.items())
def test_strict_zip_refuses_hostile_members(
    tmp_path: Path, message: str, members: list[tuple[bytes, bytes, dict[str, int]]]
) -> None:
    with pytest.raises(ArchiveError, match=message), open_strict_zip(raw_zip(tmp_path / "a.mar", *members)):
        pass


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (packed(b"x" * 5000, size=10), "holds more than the 10 bytes"),
        (packed(b"x" * 10, size=20), "is damaged"),
        (packed(b"x" * 10, crc=1), "is damaged"),
        ((deflate(b"one") + deflate(b"two"), packed(b"one")[1]), "is damaged"),  # readers disagree where it ends
        ((deflate(b"one")[:-1], packed(b"one")[1]), "is damaged"),
        ((b"\xff\xff\xff", packed(b"one")[1]), "is damaged"),
    ],
)
def test_strict_zip_refuses_members_that_lie_about_their_contents(
    tmp_path: Path, member: tuple[bytes, dict[str, int]], message: str
) -> None:
    archive = raw_zip(tmp_path / "a.mar", (b"a", *member))
    with open_strict_zip(archive) as opened, pytest.raises(ArchiveError, match=message):
        opened.unpack(tmp_path / "out")


def test_strict_zip_refuses_bombs_by_size_ratio_and_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = raw_zip(tmp_path / "bomb.mar", (b"a", *packed(bytes(2**21))))  # zeros: a thousandth of it when packed
    with open_strict_zip(bomb):
        pass
    monkeypatch.setattr(strict_zip, "ALWAYS_ALLOWED_BYTES", 2**20)
    with pytest.raises(ArchiveError, match=r"unpacks to 2097152 bytes, more than 1048576 allowed.*zip bomb"):
        open_strict_zip(bomb).__enter__()
    monkeypatch.setattr(strict_zip, "ALWAYS_ALLOWED_BYTES", 2**28)
    monkeypatch.setattr(strict_zip, "MAX_UNPACKED_BYTES", 2**20)
    with pytest.raises(ArchiveError, match="zip bomb"):
        open_strict_zip(bomb).__enter__()
    monkeypatch.setattr(strict_zip, "MAX_MEMBERS", 2)
    many = raw_zip(tmp_path / "many.mar", *((str(number).encode(), b"", {}) for number in range(3)))
    with pytest.raises(ArchiveError, match="3 members, more than 2"):
        open_strict_zip(many).__enter__()


def test_strict_zip_refuses_overlap_and_a_second_archive_in_front(tmp_path: Path, stock: Path) -> None:
    entry = raw_zip(tmp_path / "one.mar", (b"a", b"hidden", {}))
    both = tmp_path / "both.mar"
    both.write_bytes(entry.read_bytes() + stock.read_bytes())  # TorchServe reads the first, Python the last
    assert "unlisted" in refused(both)
    raw = bytearray(raw_zip(tmp_path / "two.mar", (b"a", b"11", {}), (b"b", b"22", {})).read_bytes())
    second = raw.rindex(b"PK\1\2")
    raw[second + 42 : second + 46] = bytes(4)  # both members begin where the first does
    (tmp_path / "two.mar").write_bytes(raw)
    with pytest.raises(ArchiveError, match="contradicts"), open_strict_zip(tmp_path / "two.mar"):
        pass


def test_strict_zip_refuses_an_archive_of_nothing(tmp_path: Path) -> None:
    empty = tmp_path / "empty.mar"
    for front in (b"", b"something in front"):
        empty.write_bytes(front + b"PK\x05\x06" + bytes(18))
        assert "it lists no member" in refused(empty)


def bomb(path: Path, name: str) -> Path:
    """An archive of a few kB whose manifest or guard's file has 64 MiB, beside a sound other one."""
    about = {MANIFEST: json.dumps({"model": {"modelName": "m", "modelVersion": "1"}}), "guard_archive.json": "{}"}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry, text in about.items():
            packed.writestr(entry, text if entry != name else " " * 2**26)
    return path


def test_archives_to_serve_are_read_with_limits(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"is damaged: .* must have at most 1048576 bytes"):
        find_archives(tmp_path, {"m": bomb(tmp_path / "m.mar", MANIFEST).name})
    with pytest.raises(ArchiveError, match=r"must have at most 1048576 bytes"):
        followed_bundles(bomb(tmp_path / "g.mar", "guard_archive.json"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (MANIFEST, "[" * 100_000),
        (MANIFEST, "[]"),
        (MANIFEST, "nothing"),
        ("guard_archive.json", "[" * 100_000),
        ("guard_archive.json", "[]"),
        ("guard_archive.json", '{"bundles": 5}'),
    ],
)
def test_archives_to_serve_that_hold_nonsense_are_refused(tmp_path: Path, name: str, text: str) -> None:
    with zipfile.ZipFile(tmp_path / "m.mar", "w") as packed:
        packed.writestr(name, text)
    read = find_archives if name == MANIFEST else lambda folder: followed_bundles(folder / "m.mar")
    with pytest.raises(GuardError):
        read(tmp_path)


GUARDED = {"handler": "image_handler.py", "bundles": None, "embedded": "0" * 64, "example": None, "examples": []}


@pytest.mark.parametrize(
    "about",
    [
        {"embedded": "../../elsewhere"},
        {"embedded": "/etc"},
        {"embedded": ""},
        {"embedded": None},
        {"example": "../../../etc/hostname"},
        {"example": "/etc/hostname"},
        {"example": ".."},
        {"example": 5},
    ],
)
def test_guards_files_that_lead_out_of_the_archive_are_refused(tmp_path: Path, about: dict[str, object]) -> None:
    (tmp_path / "guard.toml").write_text("")
    (tmp_path / "guard_archive.json").write_text(json.dumps(GUARDED))
    assert read_guard_files(tmp_path)[0] == GUARDED
    (tmp_path / "guard_archive.json").write_text(json.dumps({**GUARDED, **about}))
    with pytest.raises(ArchiveError, match="the guard's files in the archive are damaged"):
        read_guard_files(tmp_path)


@pytest.mark.parametrize(
    "harm", [Path.unlink, lambda file: file.write_bytes(b"\xff"), lambda file: file.write_text("[")]
)
@pytest.mark.parametrize("name", ["guard_archive.json", "guard.toml"])
def test_guards_files_that_cannot_be_read_are_refused(
    tmp_path: Path, name: str, harm: Callable[[Path], object]
) -> None:
    (tmp_path / "guard.toml").write_text("")
    (tmp_path / "guard_archive.json").write_text(json.dumps(GUARDED))
    harm(tmp_path / name)
    with pytest.raises(ArchiveError, match="the guard's files in the archive are damaged"):
        read_guard_files(tmp_path)


def test_strict_zip_unpacks_what_the_stock_archiver_and_streams_write(tmp_path: Path, stock: Path) -> None:
    class Stream:  # cannot seek, so that sizes come behind the members
        def __init__(self, path: Path) -> None:
            self.file = path.open("wb")
            self.write, self.flush = self.file.write, self.file.flush

    held = contents(stock)
    stream = Stream(tmp_path / "streamed.mar")
    with zipfile.ZipFile(stream, "w", DEFLATED) as streamed:  # type: ignore[call-overload]
        streamed.mkdir("empty") if hasattr(streamed, "mkdir") else None
        for name, data in held.items():
            streamed.writestr(name, data)
        with streamed.open("large", "w", force_zip64=True) as large:
            large.write(b"x" * 3_000_000)
    stream.file.close()
    stored = tmp_path / "stored.mar"
    with zipfile.ZipFile(stored, "w") as target, target.open("64", "w", force_zip64=True) as member:
        member.write(b"y" * 100)
    for path, expected in ((stock, held), (tmp_path / "streamed.mar", held), (stored, {"64": b"y" * 100})):
        with open_strict_zip(path) as opened:
            opened.unpack(tmp_path / path.stem)
        for name, data in expected.items():
            assert (tmp_path / path.stem / name).read_bytes() == data
    assert (tmp_path / "streamed" / "large").read_bytes() == b"x" * 3_000_000


def manifest(**changes: object) -> Callable[[dict[str, bytes]], bytes]:
    def changed(held: dict[str, bytes]) -> bytes:
        document = json.loads(held[MANIFEST])
        document["model"] |= changes
        return json.dumps(document).encode()

    return changed


MANIFESTS: dict[str, Callable[[dict[str, bytes]], bytes | None]] = {
    r"holds no MAR-INF/MANIFEST\.json": lambda _: None,
    r"manifest cannot be read \(JSONDecodeError": lambda _: b"{",
    r"manifest cannot be read \(KeyError: 'model'": lambda _: b"{}",
    r"manifest cannot be read \(TypeError": lambda _: b"[]",
    r"manifest cannot be read \(RecursionError": lambda _: b"[" * 100_000,
    "a key is there twice": lambda _: b'{"model": {"modelName": "a", "handler": "x", "handler": "y"}}',
    "modelName and handler must be text": manifest(handler=3),
    "names serializedFile 'no.pt', which is not in": manifest(serializedFile="no.pt"),
    r"names modelFile '\.\./x\.py', which is not in": manifest(modelFile="../x.py"),
    r"handler 'mine\.py', which is not in": manifest(handler="mine.py"),
    "is a function": manifest(handler="classifier_handler.py:run"),
    "its runtime is 'LSP'": lambda held: json.dumps({**json.loads(held[MANIFEST]), "runtime": "LSP"}).encode(),
    r"classifier_handler\.py is no YAML": manifest(configFile="classifier_handler.py"),
}


@pytest.mark.parametrize(("message", "change"), MANIFESTS.items())
def test_archive_with_a_manifest_that_does_not_fit_is_refused(
    stock: Path, tmp_path: Path, message: str, change: Callable[[dict[str, bytes]], bytes | None]
) -> None:
    path = rewritten(stock, tmp_path / "a.mar", {MANIFEST: change(contents(stock))})
    with pytest.raises(ArchiveError, match=message):
        open_archive(path).__enter__()
    assert "\n" not in refused(path)


def test_archive_that_hides_a_module_or_takes_the_guards_names_is_refused(stock: Path, tmp_path: Path) -> None:
    assert "would hide the Python module" in refused(rewritten(stock, tmp_path / "a.mar", {"json.py": b""}))
    assert "a name that the guard needs" in refused(rewritten(stock, tmp_path / "b.mar", {"Guard.toml": b""}))
    assert "is guarded already" in refused(rewritten(stock, tmp_path / "c.mar", {"guard_archive.json": b""}))


def test_archive_that_compiles_its_network_is_refused(stock: Path, tmp_path: Path) -> None:
    changes: dict[str, bytes | None] = {
        MANIFEST: manifest(configFile="model-config.yaml")(contents(stock)),
        "model-config.yaml": b"pt2: {compile: {enable: true}}",
    }
    assert "compiles the network (pt2)" in refused(rewritten(stock, tmp_path / "a.mar", changes))


def test_what_is_no_archive_is_refused(tmp_path: Path, stock: Path) -> None:
    text = tmp_path / "text.mar"
    text.write_text("hello")
    cut = tmp_path / "cut.mar"
    cut.write_bytes(stock.read_bytes()[:-100])
    empty = tmp_path / "empty.mar"
    empty.touch()
    for path in (text, cut, empty):
        assert f"{path} is not a TorchServe archive (.mar), or is damaged" in refused(path)
    assert "cannot be read: No such file" in refused(tmp_path / "nothing.mar")
    assert "is not a .mar file" in refused(tmp_path)
    assert "is not a .mar file" in refused(tmp_path / "model.tar.gz")


class Whole(torch.nn.Module):
    """Pickled as a whole, it would run code when loaded."""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_weights_that_could_run_code_are_refused_with_a_way_out(stock: Path, tmp_path: Path) -> None:
    script, whole, exported = tmp_path / "script.pt", tmp_path / "whole.pt", tmp_path / "exported.pt2"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), script)
    torch.save(Whole(), whole)
    with zipfile.ZipFile(exported, "w") as archive:  # laid out like torch.export's; making a real one takes long
        archive.writestr("exported/archive_format", "pt2")
    for file, subject in (
        (script, "a TorchScript archive"),
        (whole, "a pickle"),
        (exported, r"a torch.export archive"),
    ):
        for changes in ({"weights.pt": file.read_bytes()}, {f"extra/{file.name}": file.read_bytes()}):
            path = rewritten(stock, tmp_path / "a.mar", dict(changes))
            with pytest.raises(UnsafeWeightsError, match=rf"a\.mar: weights file \S+ is {subject}.* Convert it"):
                open_archive(path).__enter__()
            refused(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_archive_without_a_model_file_is_refused(tmp_path: Path) -> None:
    torch_script = tmp_path / "model.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), torch_script)
    path = stock_archive(tmp_path / "store", "scripted", "image_classifier", torch_script, model_file=None)
    assert "is a TorchScript archive, which carries a program" in refused(path)
