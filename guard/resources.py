"""Where the files that travel with the package lie, in an installed wheel and in an editable checkout alike."""

from __future__ import annotations

from pathlib import Path

from guard.errors import DatasetError

_PACKAGE = Path(__file__).resolve().parent

#: Files that a wheel carries under guard/assets and a checkout keeps elsewhere: name -> path from the checkout's root.
_IN_CHECKOUT = {
    "guard_handler.py": "handlers/guard_handler.py",
    "image_handler.py": "handlers/image_handler.py",
    "mlserver_onnx.py": "handlers/mlserver_onnx.py",
    "config.properties": "config.properties",
    "prometheus.yml": "deploy/prometheus/prometheus.yml",
    "prometheus_rules.yml": "deploy/prometheus/rules.yml",
    "prometheus_alerts.yml": "deploy/prometheus/alerts.yml",
}


def checkout_root() -> Path | None:
    """Return the root of the source checkout that this package runs from, None for an installed wheel."""
    root = _PACKAGE.parent
    return root if (root / "pyproject.toml").is_file() else None


def resource_path(name: str) -> Path:
    """Return the path of a file that is shipped with the package.

    Parameters
    ----------
    name : str
        File name, for example `"guard_handler.py"` or `"mnist_test.npz"`; no folders.

    Raises
    ------
    DatasetError
        If there is no such file.
    """
    if not name or Path(name).name != name:
        raise DatasetError(f"resource name must be a file name without folders, got {name!r}.")
    # The checkout first: there, a stale build in assets must not hide the file that is being edited.
    candidates = [_PACKAGE / "assets" / name]
    root = checkout_root()
    if root is not None and name in _IN_CHECKOUT:
        candidates.insert(0, root / _IN_CHECKOUT[name])
    for path in candidates:
        if path.is_file():
            return path
    searched = ", ".join(str(path) for path in candidates)
    raise DatasetError(f"{name} is not shipped with this package: searched {searched}. Reinstall the package.")
