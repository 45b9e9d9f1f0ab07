"""Errors as the command line shows them: the catalogue holds every one, and each says whose fault it was."""

from __future__ import annotations

import ast
import builtins
from pathlib import Path

import pytest
from error_catalogue import PAGE, ROOMS, ROOT, messages, page, sources

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
