"""Run notebooks and keep their outputs in them: `make notebooks`, after a cell has changed.

A digest of all cells' code is kept beside the outputs; a test compares it, so that outputs are those of the code.
"""

import hashlib
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def code_digest(cells: list[dict[str, object]]) -> str:
    """Return the SHA-256 of all code of a notebook, in order."""
    code = "\0".join(str(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return hashlib.sha256(code.encode()).hexdigest()


def run(path: Path) -> None:
    """Run every cell of a notebook in a kernel of its own, and write it back with what came out."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, kernel_name="python3", record_timing=False).execute()
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "code_sha256": code_digest(notebook.cells)}
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        run(Path(name))
