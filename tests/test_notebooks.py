"""The notebooks: every cell runs, and the outputs that they are stored with are those of the code above them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples" / "notebooks"
NOTEBOOKS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.ipynb"))}


def code_cells(name: str) -> list[dict[str, Any]]:
    return [cell for cell in NOTEBOOKS[name]["cells"] if cell["cell_type"] == "code"]


def kinds_of_output(cell: dict[str, Any]) -> set[str]:
    """Return what a cell was stored with: `text`, `picture`, or what should not be there."""
    names = {"stdout": "text", "display_data": "picture"}
    given = {output.get("name", output["output_type"]) for output in cell["outputs"]}
    return {names.get(kind, kind) for kind in given}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """One entry for every picture that is shown."""
    shown: list[int] = []

    def show() -> None:
        shown.append(len(plt.get_fignums()))
        plt.close("all")

    monkeypatch.setattr(plt, "show", show)
    with mpl.rc_context():
        yield shown


def test_there_are_three_notebooks_and_the_docs_lead_to_each() -> None:
    assert set(NOTEBOOKS) == {"guard_a_model", "read_a_verdict", "the_loop"}
    page = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    assert all(f"(../examples/notebooks/{name}.ipynb)" in page for name in NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_outputs_are_of_its_code_in_order_without_errors(name: str) -> None:
    cells = code_cells(name)
    code = "\0".join("".join(cell["source"]) for cell in cells)
    said = "a cell has changed since the notebook was run: `make notebooks`"
    assert NOTEBOOKS[name]["metadata"]["code_sha256"] == hashlib.sha256(code.encode()).hexdigest(), said
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert set().union(*map(kinds_of_output, cells)) == {"text", "picture"}
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 150_000


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_every_cell_runs_and_puts_out_what_it_did(name: str, drawn: list[int]) -> None:
    names: dict[str, object] = {"__name__": "notebook"}
    for number, cell in enumerate(code_cells(name), start=1):
        before, printed = len(drawn), io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"{name}, cell {number}", "exec"), names)
        put_out = {"text": bool(printed.getvalue()), "picture": len(drawn) > before}
        assert {kind for kind, came in put_out.items() if came} == kinds_of_output(cell), number


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_links_lead_somewhere(name: str) -> None:
    for cell in NOTEBOOKS[name]["cells"]:
        if cell["cell_type"] == "markdown":
            for target in re.findall(r"\]\(([^)#\s]+)", "".join(cell["source"])):
                assert (FOLDER / target).exists(), target
