"""Errors as the command line shows them: the catalogue holds every one, and each says whose fault it was."""

from __future__ import annotations

import ast
import builtins
import os
import subprocess
import sys
from pathlib import Path

import pytest
from error_catalogue import PAGE, ROOMS, ROOT, messages, page, sources
from image_helpers import png_that_says

from guard.cli.images import NamedImages, find_images
from guard.cli.model import tell_passed_over, tell_unserved
from guard.cli.output import one_line, users_place, what_failed
from guard.cli.reading import read_all
from guard.config import load_config
from guard.data.image_files import read_picture
from guard.errors import DataError
from guard.types import Float32Array

FILES = [file for room in ROOMS for file in sources(room)]


def test_catalogue_of_errors_is_what_the_code_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "`python tests/error_catalogue.py` writes docs/errors.md anew"


def test_catalogue_shows_every_message_once() -> None:
    shown = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line]
    made = {text for file in FILES for _, text in messages(file)}
    assert {text: shown.count(text) for text in made} == dict.fromkeys(made, 1)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_no_error_of_python_itself_leaves_a_room(file: Path) -> None:
    """What is raised is one of our kinds, or is caught where it is raised."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    caught = {
        id(inner)
        for tried in ast.walk(tree)
        if isinstance(tried, ast.Try)
        for statement in tried.body
        for inner in ast.walk(statement)
    }
    hooks = {
        id(inner)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name == "_without_repetition"  # json.loads calls it
        for inner in ast.walk(function)
    }
    for raised in (node for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None):
        name = ast.unparse(raised.exc.func if isinstance(raised.exc, ast.Call) else raised.exc)
        assert not hasattr(builtins, name) or id(raised) in caught | hooks, f"line {raised.lineno}: {name}"


@pytest.mark.parametrize("side", [4097, 9500, 13_400, 40_000, 2**31 - 1])
def test_picture_that_is_too_large_says_so_whatever_its_size(tmp_path: Path, side: int) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(png_that_says(side, side))
    with pytest.raises(DataError, match=r"a\.png has .*pixels.* Make it smaller\.$"):
        read_picture(file, 1)


def raised(code: str, filename: str) -> Exception:
    """What a function of a file raises."""
    names: dict[str, object] = {}
    exec(compile(f"def work(inner=None):\n    {code}\n", filename, "exec"), names)
    try:
        names["work"]()  # type: ignore[operator]
    except Exception as error:
        return error
    raise AssertionError("it raises nothing")


@pytest.mark.parametrize("room", ["cli", "torchserve", "lab/attacks", "suspect"])
def test_fault_of_our_own_files_is_never_called_the_users_code(room: str) -> None:
    error = raised("raise RuntimeError('no such thing')", str(ROOT / "guard" / room / "anything.py"))
    error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next  # without this test's own frame
    assert users_place(error) == ""
    assert one_line(error) == (
        "backdoor-guard itself failed: RuntimeError: no such thing (anything.py, line 2). "
        "Report it, with what `guard --traceback ...` shows."
    )


def test_fault_of_the_users_file_names_its_line_also_where_it_calls_ours(tmp_path: Path) -> None:
    error = raised("from guard.files import decoded; decoded(None)", str(tmp_path / "my_handler.py"))
    error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next
    assert what_failed(error).startswith("your code failed with AttributeError: ")
    assert "(my_handler.py, line 2, in work)" in one_line(error)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            FileNotFoundError(2, "No such file or directory", "a.toml"),
            "a.toml: No such file or directory. Check the path",
        ),
        (OSError(28, "No space left on device"), "the system refused: No space left on device. Check the disk"),
        (MemoryError(), "out of memory. Give fewer or smaller images."),
        (DataError("two\nlines"), "two lines"),
    ],
)
def test_error_of_the_machine_is_a_sentence_with_a_remedy(error: Exception, expected: str) -> None:
    assert one_line(error).startswith(expected)


def test_command_line_keeps_warnings_of_libraries_to_itself(tmp_path: Path) -> None:
    (tmp_path / "noisy.py").write_text(
        "import warnings\nimport numpy as np\nwarnings.warn('look out')\nnp.zeros(1) / np.zeros(1)\n"
        "def make():\n    return None\n"
    )
    (tmp_path / "0").mkdir()
    (tmp_path / "w.pt").touch()
    command = [sys.executable, "-m", "guard.cli", "fit", "--weights", "w.pt", "--architecture", "noisy:make"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONWARNINGS", None)
    arguments = ["--images", ".", "--false-positive-rate", "0.1"]
    done = subprocess.run(
        [*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04torn"])
def test_npz_that_cannot_be_read_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "clean.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"clean\.npz: it cannot be read as \.npz \("):
        find_images(tmp_path / "clean.npz")


def test_failure_of_a_library_is_named_with_the_image_and_what_to_look_at() -> None:
    def convert(images: list[object]) -> Float32Array:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    found = NamedImages(["0/a.png"], lambda row: b"")
    with pytest.raises(DataError, match=r"^image 0/a\.png cannot be prepared for the network: .* Is it of the size"):
        read_all(found, convert, lambda text, share: None)  # type: ignore[arg-type]


def test_passed_over_files_are_told_apart(capfd: pytest.CaptureFixture[str]) -> None:
    tell_passed_over(["preview.png", "0/notes.txt", "README"])
    lines = capfd.readouterr().err.splitlines()
    assert "1 file(s) passed over: these images lie beside the folders of the classes" in lines[0]
    assert lines[0].endswith(": preview.png")
    assert "2 file(s) passed over: these files are no images by their names" in lines[1]
    assert lines[1].endswith(": 0/notes.txt, README")


def test_images_that_the_image_handler_would_refuse_are_told(capfd: pytest.CaptureFixture[str]) -> None:
    tell_unserved([Path("0/a.png"), Path("0/b.JPG"), Path("0/c.webp"), Path("1/d.bmp"), Path("1/e.gif")])
    assert capfd.readouterr().err == ""
    tell_unserved([Path("0/a.png"), Path("0/b.TIF"), Path("1/c.tiff"), Path("1/d.avif")])
    (line,) = capfd.readouterr().err.splitlines()
    assert "3 of 4 images are in formats that the image handler takes from no client (.avif, .tif, .tiff)" in line


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_settings_are_read_in_the_encoding_that_they_were_saved_in(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "s.toml").write_text("seed = 7  # größer\n", encoding=encoding)
    assert load_config(tmp_path / "s.toml").seed == 7
