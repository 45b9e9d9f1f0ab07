"""The user's own code: where in it an error came from, and why a module of it cannot be imported."""

from __future__ import annotations

import importlib.util
import sysconfig
import traceback
from pathlib import Path

from guard.errors import GuardError

#: The folder of this package: in an editable install not in site-packages.
_PACKAGE = Path(__file__).resolve().parent

#: What to do about a module that is missing, where it may be a file of the user's or a package.
INSTALL_OR_PATH = "Install the package that has it, or put its folder on PYTHONPATH if it is yours."


def users_place(error: BaseException) -> str:
    """Return file, line and function of the user's own code that an error came through last; empty if none."""
    users_frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    return (
        f"{Path(users_frames[-1].filename).name}, line {users_frames[-1].lineno}, in {users_frames[-1].name}"
        if users_frames
        else ""
    )


def why_it_failed(error: Exception, remedy: str, missing: str = INSTALL_OR_PATH, module: str = "") -> str:
    """Return what is wrong with code that was imported or called, in which file and line, and what to do.

    Parameters
    ----------
    error : Exception
        What came of it, as caught where it was imported or called.
    remedy : str
        What to do where the error itself does not say what kind of fault it is.
    missing : str
        What to do where a module that the code imports is not there.
    module : str
        Name of the module that was to be imported; "" if none was.

    Returns
    -------
    text : str
        One line that ends with a full stop.
    """
    if isinstance(error, GuardError):
        return str(error)
    what = f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}".rstrip(": ")
    place = users_place(error).removesuffix(", in <module>")
    if isinstance(error, SyntaxError):
        return _about_syntax(error, place, module)
    at = f" ({place})" if place else ""
    if isinstance(error, ModuleNotFoundError) and error.name:
        if f"{module}.".startswith(f"{error.name}.") and not place:
            return f"{what}. {_where_it_belongs(error.name)}"
        return f"{what}{at}. {missing}"
    if isinstance(error, ImportError) and "relative import" in str(error):
        return f"{what}{at}. Name the module together with its package, and put the folder above that on PYTHONPATH."
    if isinstance(error, ImportError) and "cannot import name" in str(error) and "circular" not in str(error):
        return f"{what}{at}. Check the name, and which version of {error.name or 'it'} this code was written for."
    return f"{what}. {remedy}{f' It comes from {place}.' if place else ''}"


def _about_syntax(error: SyntaxError, place: str, module: str) -> str:
    """Say which file is no Python, as Python reads it."""
    where = f"{Path(error.filename).name}, line {error.lineno}" if error.filename and error.lineno else ""
    if not where:  # it was not read as text at all
        origin = None if place else _origin(module)
        where = f"{Path(origin).name}" if origin else f"imported by {place}" if place else ""
    at = f" ({where})" if where else ""
    is_text = not any(sign in str(error.msg) for sign in ("null byte", "UTF-8", "utf-8", "unicode", "encoding"))
    cure = "Mend that line." if is_text else "Save that file as UTF-8 text."
    return f"{type(error).__name__}: {error.msg}{at}. {cure}"


def _origin(module: str) -> str | None:
    """Return the file of a module that may not have been imported; None if it is not found."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None
    return spec.origin if spec is not None else None


def _where_it_belongs(name: str) -> str:
    """Say where Python looks for a module that it does not find."""
    package, _, last = name.rpartition(".")
    if package:
        try:
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError, AttributeError):
            spec = None
        folders = list(spec.submodule_search_locations or ()) if spec is not None else []
        if not folders:
            return f"{package} is one file, and no package with a module {last}. Check the name."
        return f"{folders[0]} has neither {last}.py nor a folder {last}. Check the name."
    return f"Start the command in the folder that has {last}.py or the folder {last}, or put that folder on PYTHONPATH."


def _is_users(filename: str) -> bool:
    path = Path(filename).resolve()
    places = (_PACKAGE, *map(Path, {sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")}))
    is_ours = any(path.is_relative_to(place) for place in places) or {"site-packages", "dist-packages"} & {*path.parts}
    return not is_ours and not filename.startswith("<") and path.name != "guard"
