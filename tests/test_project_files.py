"""What strangers and services read of the repository: held to the schemas of their readers, and to the code."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import licence_list
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FORMS = [path for path in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")) if path.name != "config.yml"]


def read(*names: str) -> dict[Any, Any]:
    return yaml.safe_load((ROOT / Path(*names)).read_text(encoding="utf-8"))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("citation-file-format", [ROOT / "CITATION.cff"]),
        ("github-workflows", [ROOT / ".github" / "workflows" / "ci.yml"]),
        ("github-issue-config", [ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml"]),
        ("github-issue-forms", FORMS),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_project_files_are_what_their_readers_take(schema: str, files: list[Path]) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_workflow_runs_the_steps_of_ci_run_in_order() -> None:
    ours = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    steps = [step.get("run", "") for step in read(".github", "workflows", "ci.yml")["jobs"]["test"]["steps"]]
    targets = re.findall(r"(?m)^make (.*)$", ours)
    assert "test" in targets
    assert re.findall(r"(?m)^make (.*)$", "\n".join(steps)) == targets
    packages = re.compile(r"--no-install-recommends (\w[\w ]*\w)")
    assert packages.findall("\n".join(steps)) == [" ".join(packages.findall(ours.replace(" || true", "")))]


def test_pre_commit_runs_what_make_lint_and_types_run() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for hook in read(".pre-commit-config.yaml")["repos"][0]["hooks"]:
        command = hook["entry"].removeprefix(".venv/bin/").removesuffix(" --force-exclude")
        assert f"$(BIN)/{command}" in makefile, hook["entry"]


def test_citation_names_the_version_and_licence_of_the_package() -> None:
    citation = read("CITATION.cff")
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])


@pytest.mark.parametrize("name", ["SECURITY.md", "CHANGELOG.md"])
def test_pages_beside_docs_link_to_files_that_exist(name: str) -> None:
    for target in re.findall(r"\]\(([^)#\s:]+)[^):]*\)", (ROOT / name).read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target


def test_licences_page_names_every_package_that_pyproject_asks_for() -> None:
    listed = set(re.findall(r"(?m)^\| `([^`]+)` \|", licence_list.PAGE.read_text(encoding="utf-8")))
    missing = licence_list.direct(licence_list.PARTS) - listed
    assert not missing, "`python tests/licence_list.py` writes docs/licences.md anew"


def test_every_package_is_permissive_or_known_to_be_not() -> None:
    found = licence_list.brought(licence_list.PARTS)
    assert {name for name, text in found.items() if not licence_list.is_permissive(text)} <= licence_list.COPYLEFT
    core = licence_list.brought(["core"])
    assert {"torch", "numpy"} <= set(core)
    assert not set(core) & licence_list.COPYLEFT
    page = licence_list.PAGE.read_text(encoding="utf-8").partition("| package |")[0]
    assert all(f"`{name}`" in page for name in licence_list.COPYLEFT)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Apache-2.0 AND MIT", True),
        ("GPL-2.0 OR MIT", True),
        ("MIT AND LGPL-3.0-only", False),
        ("MPL-2.0", False),
        ("unknown", False),
    ],
)
def test_licence_is_permissive_only_where_all_of_it_is(text: str, expected: bool) -> None:
    assert licence_list.is_permissive(text) is expected
