"""A process that has loaded what the process of every check and of every worker loads: they then are forks of it.

What a check or a worker does is the same, in a process of its own without anything of the test's; its seconds of
imports are spent once. Tests about how that process starts and ends, or what it has not, do without.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from guard.torchserve.launch import java_command

_PREPARED = """
import array, json, os, runpy, select, socket, sys, threading, traceback
from pathlib import Path
import torch, yaml, guard.serving.runtime
from guard.torchserve import trial
import ts.context, ts.torch_handler.base_handler, ts.utils.util


def become(asked, outputs):
    for number, output in outputs:
        os.dup2(output, number)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])


def end(status):
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def try_out(asked):
    child = os.fork()
    if child == 0:
        become(asked, [(number, os.open(asked[name], os.O_WRONLY)) for number, name in ((1, "stdout"), (2, "stderr"))])
        status = 1
        try:
            status = trial.main(Path(asked["folder"]))
        except BaseException:
            traceback.print_exc()
        finally:
            end(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def work(connection):
    text, controls, _, _ = connection.recvmsg(1 << 20, socket.CMSG_SPACE(12))
    outputs = array.array("i")
    outputs.frombytes(controls[0][2])
    while not text.endswith(b"\\n"):
        text += connection.recv(1 << 20)
    child = os.fork()
    if child == 0:
        asked = json.loads(text)
        become(asked, enumerate(outputs))
        sys.stdout.reconfigure(line_buffering=True)
        sys.argv = asked["argv"]
        sys.path[:0] = [str(Path(sys.argv[0]).parent), *filter(None, os.environ.get("PYTHONPATH", "").split(":"))]
        # it ends with the process that stands for it
        threading.Thread(target=lambda: (connection.recv(1), os._exit(1)), daemon=True).start()
        status = 1
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            status = 0
        except SystemExit as asked_for:
            status = asked_for.code if isinstance(asked_for.code, int) else int(asked_for.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            connection.send(bytes([status % 256]))
            end(status)
    for output in outputs:
        os.close(output)
    return child


listening = socket.socket(socket.AF_UNIX)
listening.bind(sys.argv[1])
listening.listen(100)
workers = set()
print("ready", flush=True)
while True:
    asking, _, _ = select.select([0, listening], [], [], 1.0)
    workers = {child for child in workers if os.waitpid(child, os.WNOHANG)[0] == 0}
    if listening in asking:
        connection, _ = listening.accept()
        with connection:
            workers.add(work(connection))
    if 0 in asking:
        line = sys.stdin.readline()
        if not line:
            break
        try_out(json.loads(line))
"""

#: Stands for a worker towards Java: it lives as long as the fork, which has its streams, and the other way round.
_STANDS_FOR_A_WORKER = """#!{python} -IS
import array, json, os, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
asked = {{"argv": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)}}
text, streams = json.dumps(asked).encode() + b"\\n", array.array("i", [0, 1, 2])
sent = connection.sendmsg([text], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
connection.sendall(text[sent:])
status = connection.recv(1)
sys.exit(status[0] if status else 1)
"""


class PreparedProcess:
    """Stands in for the module `subprocess` in `guard.torchserve.check`, and for Python in a TorchServe."""

    TimeoutExpired = subprocess.TimeoutExpired

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="guard-prepared-")
        address = str(Path(self._folder.name) / "socket")
        self._python = Path(self._folder.name) / "python"
        self._python.write_text(_STANDS_FOR_A_WORKER.format(python=sys.executable, address=address))
        self._python.chmod(0o700)
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _PREPARED, address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
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

    def java_command(self, options: Sequence[str], arguments: Sequence[str]) -> list[str]:
        """Return the command of a server whose workers are forks: stands in for that of `guard.torchserve.server`."""
        command = java_command(options, arguments)
        command[command.index("--python") + 1] = str(self._python)
        return command

    def close(self) -> None:
        """End it."""
        self._process.communicate()
        self._folder.cleanup()
