"""Code of the user's that cannot be imported or called: what is really wrong, in which file and line, what to do."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from guard.cli.reading import preprocessing
from guard.errors import ArchiveError, ConfigError, SuspectModelError
from guard.suspect.model import build_architecture
from guard.torchserve.user_handler import open_user_handler

NET = "import torch\n\n\nclass Net(torch.nn.Linear):\n    def __init__(self):\n        super().__init__(4, 3)\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path of imports, whose modules are forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(
            getattr(sys.modules[name], "__file__", "") or getattr(sys.modules[name], "__path__", "")
        ):
            del sys.modules[name]


def refusal(architecture: str) -> str:
    with pytest.raises(SuspectModelError) as caught:
        build_architecture(architecture)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import torch\n\ndef make(:\n", ["SyntaxError: ", "(mine_1.py, line 3). Mend that line."]),
        ("def make():\nreturn 1\n", ["IndentationError: ", "(mine_1.py, line 2). Mend that line."]),
        ("import torch\nimport no_such_timm\n", ["No module named 'no_such_timm' (mine_1.py, line 2). Install the"]),
        ("from no_such.layers import Block\n", ["No module named 'no_such' (mine_1.py, line 1). Install the package"]),
        (
            "from torch import Tensr\n",
            ["cannot import name 'Tensr' from 'torch'", "Check the name, and which version of torch"],
        ),
        ("from .blocks import Block\n", ["relative import", "(mine_1.py, line 1). Name the module together with its"]),
        ("import torch\nopen('no_such_names.txt')\n", ["no_such_names.txt", "It comes from mine_1.py, line 2."]),
        ("def f():\n    return a_name\nf()\n", ["NameError", "It comes from mine_1.py, line 2, in f."]),
        ("import torch\ntorch.no_such\n", ["cannot be imported: AttributeError", "It comes from mine_1.py, line 2."]),
    ],
)
def test_module_that_cannot_be_imported_says_what_is_wrong_with_it(
    folder: Path, text: str, expected: list[str]
) -> None:
    (folder / "mine_1.py").write_text(text)
    said = refusal("mine_1:make")
    assert said.startswith("architecture 'mine_1:make' cannot be imported: ")
    assert all(part in said for part in expected), said
    assert "PYTHONPATH?" not in said
    assert said.endswith(".")


def test_fault_of_a_module_that_it_imports_names_that_file(folder: Path) -> None:
    (folder / "blocks_1.py").write_text("x = 1\ny = (2\n")
    (folder / "mine_2.py").write_text("from blocks_1 import x\n" + NET)
    assert "SyntaxError: '(' was never closed (blocks_1.py, line 2). Mend that line." in refusal("mine_2:Net")


@pytest.mark.parametrize("content", ["x = 'größer'\n".encode("latin-1"), NET.encode("utf-16"), NET.encode("utf-16-le")])
def test_source_that_is_no_utf8_says_how_to_save_it(folder: Path, content: bytes) -> None:
    (folder / "mine_3.py").write_bytes(content)
    said = refusal("mine_3:Net")
    assert "mine_3.py" in said
    assert said.endswith("Save that file as UTF-8 text.")


def test_module_that_is_not_there_says_where_it_belongs(folder: Path) -> None:
    (folder / "zoo_1" / "deep").mkdir(parents=True)
    (folder / "single_1.py").write_text(NET)
    assert refusal("no_such_net:Net").endswith(
        "ModuleNotFoundError: No module named 'no_such_net'. Start the command in the folder that has no_such_net.py "
        "or the folder no_such_net, or put that folder on PYTHONPATH."
    )
    assert f"{folder / 'zoo_1'} has neither nets.py nor a folder nets. Check the name." in refusal("zoo_1.nets:Net")
    assert "single_1 is one file, and no package with a module net. Check" in refusal("single_1.net:Net")


def test_name_that_a_module_lacks_is_looked_for_among_its_own(folder: Path) -> None:
    (folder / "mine_4.py").write_text(NET)
    (folder / "mine_5.py").write_text("x = 1\n")
    (folder / "mine_6.py").write_text(f"{NET}\nmodel = Net()\n")
    said = refusal("mine_4:Nett")
    assert f"module 'mine_4' ({folder / 'mine_4.py'}) has no 'Nett'. Did you mean 'Net'?" in said
    assert refusal("mine_4:build").endswith("has no 'build'. Known are Net.")
    assert refusal("mine_5:Net").endswith("has no 'Net'. It defines no function and no class.")
    assert "is a network already (Net), and must be what builds one. Name its class" in refusal("mine_6:model")
    assert "('part of Python')" not in refusal("math:Net")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("import no_such_timm", "No module named 'no_such_timm' (mine_7.py, line 3, in make). Install the package"),
        ("return torch.nn.Linear(4)", "fails when it is called: TypeError: "),
        ("open('no_such_config.yaml')", "It comes from mine_7.py, line 3, in make."),
    ],
)
def test_factory_that_fails_within_is_not_blamed_for_its_arguments(folder: Path, line: str, expected: str) -> None:
    (folder / "mine_7.py").write_text(f"import torch\ndef make():\n    {line}\n")
    said = refusal("mine_7:make")
    assert "architecture 'mine_7:make' fails when it is called: " in said
    assert expected in said
    assert "without arguments" not in said


def test_preprocess_that_cannot_be_imported_says_why(folder: Path) -> None:
    (folder / "mine_8.py").write_text("import no_such_cv2\n")
    (folder / "mine_9.py").write_text("scale = 255\n")
    with pytest.raises(ConfigError, match=r"No module named 'no_such_cv2' \(mine_8.py, line 1\). Install the package"):
        preprocessing("mine_8:f")
    with pytest.raises(ConfigError, match=r"module 'mine_9' \(.*mine_9.py\) has no 'f'. Check the name."):
        preprocessing("mine_9:f")
    with pytest.raises(ConfigError, match=r"has 'scale', which is no function. Check the name."):
        preprocessing("mine_9:scale")
    with pytest.raises(ConfigError, match="--preprocess must be module:function, got 'mine_9'"):
        preprocessing("mine_9")


@pytest.mark.parametrize(
    ("handler", "model_file", "expected"),
    [
        (
            "class H(:\n",
            NET,
            r"handler mine.py cannot be imported: SyntaxError: .* \(mine.py, line 1\). Mend that line.",
        ),
        (
            "import no_such_cv2\n",
            NET,
            r"No module named 'no_such_cv2' \(mine.py, line 1\). Add it with --extra-file if",
        ),
        ("{}", "x = (\n", r"failed in initialize: SyntaxError: .* \(network.py, line 1\). Mend that line."),
        (
            "{}",
            "import no_such_timm\n",
            r"initialize: .*'no_such_timm' \(network.py, line 1\). Add it with --extra-file",
        ),
        ("{}", "1 / 0\n", r"initialize: ZeroDivisionError: .*It comes from network.py, line 1."),
    ],
)
def test_handler_and_model_file_that_cannot_be_imported_say_why(
    tmp_path: Path, handler: str, model_file: str, expected: str
) -> None:
    if handler == "{}":
        handler = "from ts.torch_handler.base_handler import BaseHandler\nclass Mine(BaseHandler):\n    pass\n"
    (tmp_path / "mine.py").write_text(handler)
    (tmp_path / "network.py").write_text(model_file)
    torch.save(torch.nn.Linear(4, 3).state_dict(), tmp_path / "weights.pt")
    opened = open_user_handler(tmp_path / "mine.py", tmp_path / "weights.pt", model_file=tmp_path / "network.py")
    with pytest.raises((ArchiveError, SuspectModelError), match=expected) as caught, opened:
        pass
    assert ("--model-file" in str(caught.value)) == ("1 / 0" in model_file)


def test_handler_by_a_name_that_torchserve_does_not_ship_says_so(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(4, 3).state_dict(), tmp_path / "weights.pt")
    opened = open_user_handler("my_handler", tmp_path / "weights.pt")
    with (
        pytest.raises(ArchiveError, match=r"TorchServe ships none of that name\. Name a file of your own with its"),
        opened,
    ):
        pass
