"""The optional parts of this package, what each needs, and the one line that says how to get it."""

from __future__ import annotations

from importlib.util import find_spec

from guard.errors import MissingExtraError

#: Modules that each extra of pyproject.toml brings. Java is not among them: it may come from elsewhere.
EXTRAS: dict[str, tuple[str, ...]] = {
    "torchserve": ("ts", "model_archiver", "packaging", "psutil"),
    "review": ("fastapi", "uvicorn", "jinja2", "python_multipart"),
    "v2": ("fastapi", "uvicorn", "grpc", "google.protobuf", "ts", "model_archiver"),
    "ray": ("ray", "fastapi", "uvicorn", "ts", "model_archiver"),
    "export": ("onnx", "onnxscript", "onnxruntime"),
    "proxy": ("aiohttp", "fastapi", "uvicorn"),
    "postgres": ("psycopg",),
    "object-store": ("obstore",),
}


def require(extra: str) -> None:
    """Check that an extra is installed, before anything is begun that needs it; nothing is imported.

    Raises
    ------
    MissingExtraError
        If one of its modules is not there.
    """
    for module in EXTRAS[extra]:
        if not is_installed(module):
            remedy = f"Install what is missing: pip install 'backdoor-guard[{extra}]'"
            raise MissingExtraError(f"the module {module!r} is not installed. {remedy}")


def is_installed(module: str) -> bool:
    """Return whether a module could be imported."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # its package is missing, or was made impossible to import
        return False
