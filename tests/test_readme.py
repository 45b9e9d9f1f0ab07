"""The documents are held to the code: examples run, commands exist, and every setting and metric is told."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import CleanSplit
from queue_helpers import flagged
from safetensors.torch import save_file

import guard
from guard import Guard, GuardConfig
from guard.cli import run
from guard.lab.attacks import DEMO_ATTACKS, MnistCnn
from guard.lab.attacks.networks import mnist_cnn
from guard.storage.bundle import BundleStore
from guard.telemetry import METRICS

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *ROOT.glob("CONTRIBUTING.md")]
TEXTS = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in DOCUMENTS}
RUNNABLE = {name: text for name, text in TEXTS.items() if "<!-- run -->" in text}
_RUN = re.compile(r"^<!-- run -->\n+```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SHELL = re.compile(r"^```(?:console|bash|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`guard ([a-z]+)")
_LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
_ANCHOR = re.compile(r"\]\(([^)#\s]*)#([^)\s]+)\)")


def shell_lines() -> list[str]:
    """Every command line of every document, without its prompt, comment and continuation."""
    lines = [
        re.sub(r"\s+#.*", "", line.strip().removeprefix("$ "))
        for text in TEXTS.values()
        for block in _SHELL.findall(text)
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return [line for line in lines if line]


def test_readme_has_examples_to_run() -> None:
    assert "README.md" in RUNNABLE
    for name, text in RUNNABLE.items():
        assert len(_RUN.findall(text)) == text.count("<!-- run -->"), f"{name}: a marked block is no python block"


@pytest.mark.parametrize("name", RUNNABLE)
def test_readme_python_examples_run_in_order(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attack is trained for one of its six epochs, and the guard fitted in five parts: nothing is said of rates."""
    monkeypatch.chdir(tmp_path)
    short = tuple(dataclasses.replace(attack, epochs=1) for attack in DEMO_ATTACKS)
    monkeypatch.setattr("guard.lab.attacks.DEMO_ATTACKS", short)
    monkeypatch.setattr("guard.detection.cross_fitting._FOLDS", 5)
    names: dict[str, object] = {"__name__": "example"}
    for number, block in enumerate(_RUN.findall(RUNNABLE[name]), start=1):
        exec(compile(block, f"{name}, block {number}", "exec"), names)


@pytest.mark.parametrize("name", ["docs/embedding.md", "docs/queue.md"])
def test_docs_python_blocks_run_with_the_names_that_they_presuppose(
    name: str,
    badnet: MnistCnn,
    fitted_guard: Guard,
    clean_split: CleanSplit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "my_net", SimpleNamespace(make=mnist_cnn))
    save_file(badnet.state_dict(), "weights.safetensors")
    BundleStore(Path("bundles")).activate(fitted_guard.save("bundles").name)
    names: dict[str, Any] = {"images": clean_split.test.images[:20], "flagged_inputs": [flagged()]}
    for block in _PYTHON.findall(TEXTS[name]):
        exec(compile(block.replace("/var/lib/guard/", f"{tmp_path}/"), name, "exec"), names)
    if "model" in names:
        names["model"].close()


def test_readme_python_blocks_compile() -> None:
    for name, text in TEXTS.items():
        for block in _PYTHON.findall(text):
            compile(block, name, "exec")


@pytest.mark.parametrize("line", sorted({line for line in shell_lines() if line.startswith("guard ")}))
def test_readme_guard_command_exists_with_its_options(line: str, capfd: pytest.CaptureFixture[str]) -> None:
    words = line.split()[1:]
    assert run([words[0], "--help"]) == 0, capfd.readouterr().err
    shown = capfd.readouterr().out
    below = re.findall(r"^  ([a-z][a-z-]+) ", shown.partition("Commands")[2], re.MULTILINE)
    for word in [word for word in words[1:] if word in below][:1]:  # options of the group may come before it
        assert run([words[0], word, "--help"]) == 0, capfd.readouterr().err
        shown += capfd.readouterr().out
    for option in (word.split("=")[0] for word in words if word.startswith("--")):
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", shown), f"{line!r}: {option} is not in its --help"


def test_readme_names_no_command_that_does_not_exist(capfd: pytest.CaptureFixture[str]) -> None:
    run(["--help"])
    known = set(re.findall(r"^  ([a-z]+) ", capfd.readouterr().out, re.MULTILINE))
    used = {word for text in TEXTS.values() for word in _INLINE.findall(text)}
    assert used <= known, used - known
    assert {"fit", "inspect", "archive", "serve", "bundle", "demo", "doctor"} <= known


def test_readme_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    used = {line.split()[1] for line in shell_lines() if re.match(r"make [a-z]", line)}
    used |= {word for text in TEXTS.values() for word in re.findall(r"`make ([a-z]+)", text)}
    assert "demo" in used
    for target in used:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"


@pytest.mark.parametrize("setting", GuardConfig.model_fields)
def test_docs_name_every_setting(setting: str) -> None:
    assert any(f"`{setting}`" in text for text in TEXTS.values())


@pytest.mark.parametrize("metric", METRICS)
def test_docs_name_every_metric(metric: str) -> None:
    assert any(f"`{metric}`" in text for text in TEXTS.values())


def test_docs_describe_every_public_name_where_it_is_defined() -> None:
    described = set(re.findall(r"^::: (\S+)$", TEXTS["docs/api.md"], re.MULTILINE))
    assert {f"{getattr(guard, name).__module__}.{name}" for name in guard.__all__} <= described


@pytest.mark.parametrize("name", TEXTS)
def test_docs_links_to_files_lead_somewhere(name: str) -> None:
    for target in _LINK.findall(TEXTS[name]):
        if not re.match(r"[a-z]+:", target):
            assert ((ROOT / name).parent / target).exists(), f"{name} links to {target}"


def anchors(text: str) -> set[str]:
    """Return what the headings of a document are called in links."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    shown = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in shown}


@pytest.mark.parametrize("name", TEXTS)
def test_docs_links_to_headings_lead_somewhere(name: str) -> None:
    for target, anchor in _ANCHOR.findall(TEXTS[name]):
        if not re.match(r"[a-z]+:", target):
            file = ((ROOT / name).parent / target).resolve() if target else ROOT / name
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{name} links to {target}#{anchor}"
