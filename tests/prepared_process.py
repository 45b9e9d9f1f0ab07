"""A process that has loaded what the process of every check loads: each check then runs in a fork of it.

What a check does is the same, in a process of its own without anything of the test's; its seconds of imports are spent
once. Tests about how that process starts and ends, or what it has not, do without.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_PREPARED = """
import json, os, sys, traceback
from pathlib import Path
import torch, yaml, guard.serving.runtime
from guard.torchserve import trial
import ts.context, ts.torch_handler.base_handler, ts.utils.util

print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(asked[name], os.O_WRONLY), number)
        os.chdir(asked["cwd"])
        os.environ.clear()
        os.environ.update(asked["env"])
        status = 1
        try:
            status = trial.main(Path(asked["folder"]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class PreparedProcess:
    """Stands in for the module `subprocess` in `guard.torchserve.check`."""

    TimeoutExpired = subprocess.TimeoutExpired

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _PREPARED],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def run(self, command: list[str], *, cwd: Path, env: dict[str, str], **_: Any) -> SimpleNamespace:
        """Run a trial in a fork; return what `subprocess.run` would."""
        python, *module, folder = command
        assert (python, module) == (sys.executable, ["-m", "guard.torchserve.trial"])
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
            asked = {"folder": folder, "cwd": str(cwd), "env": env, "stdout": out.name, "stderr": err.name}
            self._process.stdin.write(f"{json.dumps(asked)}\n")
            self._process.stdin.flush()
            status = int(self._process.stdout.readline())
            return SimpleNamespace(returncode=status, stdout=out.read(), stderr=err.read())

    def close(self) -> None:
        """End it."""
        self._process.communicate()
