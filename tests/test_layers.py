"""Who may import whom (the design's order), read from the source; and what an import really loads."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import guard

PACKAGE = Path(guard.__file__).parent
PROJECT = PACKAGE.parent

#: Rooms of the package, lowest first. A room imports rooms of earlier lines only; a new one gets a place here.
ORDER: tuple[frozenset[str], ...] = tuple(
    frozenset(line.split())
    for line in (
        "errors files",
        "types resources users_code extras",
        "arrays config telemetry relabel data suspect processes",
        "statistics storage",
        "backups observing",
        "detection",
        "lab retrainer serving review export",
        "torchserve v2",
        "local",
        "ray proxy",
        "demo",
        "cli",
    )
)
#: What people start.
EDGE = ("cli", "demo")
#: These know nothing of the guard but its nouns.
NOUNS_ONLY = ("telemetry", "relabel")
#: Rooms that may import a web framework, a database driver or a client of one.
OPEN = ("relabel", "review", "observing", "serving", "torchserve", "v2", "local", "ray", "proxy", "processes", *EDGE)

SERVERS = {
    "ts",
    "starlette",
    "fastapi",
    "uvicorn",
    "sqlalchemy",
    "alembic",
    "prometheus_client",
    "httpx",
    "psutil",
    "aiohttp",
    "ray",
}
PEOPLE = {"typer", "rich", "matplotlib"}


def rank(room: str) -> int:
    for level, rooms in enumerate(ORDER):
        if room in rooms:
            return level
    pytest.fail(f"guard.{room} has no place in ORDER of tests/test_layers.py. Give it one, as low as it can be.")


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def sources() -> list[Path]:
    return sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")


@cache
def imports_of(file: Path) -> list[ast.Import | ast.ImportFrom]:
    """The statements of a file that import something; read once for all tests."""
    return [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]


def imported_modules(file: Path, *, names: bool = False) -> Iterator[str]:
    """Every module that a file imports, wherever it does: at the top, in a function, for type checking.

    With `names`, whatever is imported from a module is taken for a module of its own, too.
    """
    for node in imports_of(file):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            assert node.level == 0, f"{file}: relative import"
            assert node.module is not None
            yield node.module
            if names or node.module == "guard":
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_rooms(file: Path) -> set[str]:
    return {name.split(".")[1] for name in imported_modules(file) if name.startswith("guard.")}


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_module_imports_lower_rooms_only(file):
    room = room_of(file)
    for other in imported_rooms(file) - {room}:
        assert rank(other) < rank(room), f"{room} must not import {other}"


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("folder", ["guard", "handlers", "benchmarks", "tests"])
def test_no_file_imports_itself_by_way_of_others(folder):
    files = {module_name(file): file for file in sorted((PROJECT / folder).rglob("*.py"))}
    graph: dict[str, set[str]] = {}
    for name, file in files.items():
        found = set(imported_modules(file, names=True))
        if folder in ("benchmarks", "tests"):  # scripts import their neighbours by bare names
            found |= {f"{name.rpartition('.')[0]}.{other}" for other in found}
        graph[name] = (found & files.keys()) - {name}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the files


def test_telemetry_and_relabel_import_nouns_only():
    for file in sources():
        if room_of(file) in NOUNS_ONLY:
            assert imported_rooms(file) - {room_of(file)} <= {"errors", "types", "files", "extras"}, file


#: Loaded together, none of these loads a server or a screen: then none of them does alone.
LIGHT = ("guard.detection.detectors", "guard.detection.pipeline", "guard.statistics.evaluation", "guard.telemetry")
#: After those, none of these loads TorchServe.
HANDLING = ("guard.torchserve.user_handler", "guard.cli.reading", "guard.cli.doctor", "guard.demo.run")
#: Does a worker's part for a user's handler outside a server, so it needs TorchServe itself; only when called.
RUNS_HANDLERS = PACKAGE / "torchserve" / "worker.py"


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """What one fresh interpreter has loaded after the modules of LIGHT, and then of HANDLING, packages by name."""
    code = "import sys\n"
    for modules in (LIGHT, HANDLING):
        code += f"import {', '.join(modules)}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    light, handling = done.stdout.splitlines()
    return {"light": set(light.split()), "handling": set(handling.split())}


def test_torchserve_is_imported_by_one_module_and_only_when_called(loaded):
    for file in sources():
        imports_ts = "ts" in {name.split(".")[0] for name in imported_modules(file)}
        assert not imports_ts or file == RUNS_HANDLERS, file
    assert "guard" in loaded["handling"]
    assert "ts" not in loaded["handling"]


def test_the_client_of_object_stores_is_imported_by_one_module():
    for file in sources():
        imports_it = "obstore" in {name.split(".")[0] for name in imported_modules(file)}
        assert imports_it == (file == PACKAGE / "storage" / "objects.py"), file


def test_serving_knows_no_server_by_name_or_by_its_words():
    words = re.compile(
        r"torchserve|\bts\.|get_request_id|get_all_request_header|(get|set)_response_|\bcontext\.\w+\(", re.I
    )
    for file in sorted((PACKAGE / "serving").glob("*.py")):
        assert not words.search(file.read_text()), file


def test_servers_and_screens_are_imported_by_the_edge_only():
    for file in sources():
        names = {name.split(".")[0] for name in imported_modules(file)}
        if room_of(file) not in OPEN:
            assert not names & SERVERS, file
        if room_of(file) not in EDGE:
            assert not names & PEOPLE, file


def test_import_in_a_fresh_interpreter_leaves_servers_and_screens_unloaded(loaded):
    assert "guard" in loaded["light"]
    assert not loaded["light"] & (SERVERS | PEOPLE)


@pytest.mark.parametrize("module", ["guard", "guard.cli", "guard.relabel.items", "guard.relabel.settings"])
def test_database_library_is_loaded_by_a_queue_only(module):
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"sqlalchemy", "alembic", "psycopg", "cryptography"}


def test_import_guard_alone_loads_no_room():
    code = "import sys, guard; print(*(name for name in sys.modules if name.startswith('guard.') or name == 'torch'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_public_names_are_all_there_and_an_unknown_one_is_not():
    for name in guard.__all__:
        assert getattr(guard, name).__name__ == name
    with pytest.raises(AttributeError, match=r"^module 'guard' has no attribute 'Gard'$"):
        guard.Gard  # noqa: B018


def test_every_room_and_path_of_the_architecture_page_is_there():
    page = (PROJECT / "docs" / "architecture.md").read_text()
    paths = set(re.findall(r"\b((?:guard|handlers|benchmarks|deploy|tests)/[\w/]*(?:\.py)?)", page))
    assert len(paths) > 30
    assert not [path for path in sorted(paths) if not (PROJECT / path).exists()]
    rooms = {f"guard/{room.name}/" for room in PACKAGE.iterdir() if (room / "__init__.py").exists()}
    assert rooms <= paths
    listed = [frozenset(re.findall(r"`(\w+)`", line)) for line in re.findall(r"^\d+\. (.+)$", page, re.MULTILINE)]
    assert tuple(listed) == ORDER


def test_every_statement_of_the_queue_stands_in_a_file_of_statements() -> None:
    outside = [
        f"{file.name}:{node.lineno}"
        for file in sorted((PACKAGE / "relabel").glob("*.py"))
        if file.name not in ("statements.py", "audit_statements.py", "schema.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("select", "insert", "update", "delete", "text", "func")
        if isinstance(node.value, ast.Name) and node.value.id == "sa"
    ]
    assert not outside
