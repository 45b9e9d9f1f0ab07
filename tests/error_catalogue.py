"""Every message of the rooms behind the command line, read from their source.

`python tests/error_catalogue.py` writes `docs/errors.md`; `tests/test_errors.py` holds it to the code.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

from guard import errors

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "errors.md"
ROOMS = (
    "guard/cli",
    "guard/data",
    "guard/suspect",
    "guard/torchserve/archives",
    "guard/storage",
    "guard/detection",
    "guard/export",
)
KINDS = {
    name: kind for name, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.GuardError)
}
_HEAD = """# Errors

What the command line says when it cannot go on: one line on stderr, and status 1, or 2 for a `ConfigError`. A name in
braces stands for what was found. A message without an end is the reason within another one, behind the name of the
file. This page is made from the code: `python tests/error_catalogue.py` writes it anew.
"""


def sources(room: str) -> Iterator[Path]:
    """Yield the files of a room, in order."""
    yield from sorted(file for file in (ROOT / room).rglob("*.py") if file.name != "__main__.py")


def page() -> str:
    """Return the catalogue: every message once, by room and kind, in the order of the code."""
    seen: set[str] = set()
    parts = [_HEAD]
    for room in ROOMS:
        by_kind: dict[str, list[str]] = {}
        for kind, text in (found for file in sources(room) for found in messages(file)):
            if text not in seen:
                by_kind.setdefault(kind, []).append(text)
                seen.add(text)
        parts.append(f"## `{room}`\n")
        for kind, texts in sorted(by_kind.items()):
            parts.append(
                f"**{kind}**: {(KINDS[kind].__doc__ or '').splitlines()[0]}\n\n```text\n" + "\n".join(texts) + "\n```\n"
            )
    return "\n".join(parts)


def messages(file: Path) -> Iterator[tuple[str, str]]:
    """Yield kind and text of every error that a file makes; not those whose whole text was made elsewhere."""
    names = vars(importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts)))
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in KINDS and node.args:
            for text in texts(node.args[0], names):
                if not (text.startswith("{") and text.find("}") == len(text) - 1):
                    yield ast.unparse(node.func), " ".join(text.split())


def texts(node: ast.expr, names: dict[str, object]) -> list[str]:
    """Return what an expression of text can be, with a name in braces for every value that only a run knows."""
    of = partial(texts, names=names)
    match node:
        case ast.Constant():
            return [str(node.value)]
        case ast.JoinedStr():
            return ["".join(some) for some in product(*map(of, node.values))]
        case ast.FormattedValue():
            return of(node.value)
        case ast.BinOp(op=ast.Add()):
            return [left + right for left, right in product(of(node.left), of(node.right))]
        case ast.IfExp():
            return [*of(node.body), *of(node.orelse)]
        case ast.Name() if isinstance(names.get(node.id), str | int | float):
            return [str(names[node.id])]
    return [f"{{{_what(node)}}}"]


def _what(node: ast.expr) -> str:
    """Name a value: `len(x)` as the number of x, `type(x)` as its type, else by the first name that is not called."""
    match node:
        case ast.Call(func=ast.Name(id="len"), args=[counted]):
            return f"number of {_what(counted)}"
        case ast.Attribute(value=ast.Call(func=ast.Name(id="type"), args=[value]), attr="__name__"):
            return f"type of {_what(value)}"
        case ast.Attribute(value=ast.Name(id="self")):
            return _words(node.attr)
        case ast.Name() | ast.Attribute(value=ast.Name()):
            return _words(ast.unparse(node))
        case ast.BinOp(left=ast.Constant()):
            return _words(ast.unparse(node))
    called = [each.func for each in ast.walk(node) if isinstance(each, ast.Call)]
    inner = (
        each
        for each in ast.walk(node)
        if each is not node and each not in called and isinstance(each, ast.Name | ast.Attribute)
    )
    first = next((each for each in inner if isinstance(each, ast.Name) or isinstance(each.value, ast.Name)), None)
    return ast.unparse(node) if first is None else _what(first)


def _words(name: str) -> str:
    return name.strip("_").replace("_", " ").lower()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
