"""The stack of a server and its companions, with a server that is none."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from guard.errors import ServerError
from guard.processes.ports import Ports
from guard.torchserve import stack
from guard.torchserve.stack import Beside, ServingStack

#: Notes its arguments and the queue it was given, and waits to be stopped.
COMPANION = """
import os, pathlib, sys, time
pathlib.Path(sys.argv[1] + f".{os.getpid()}").write_text(repr((sys.argv[1:], os.environ["GUARD_QUEUE_URL"])))
time.sleep(120)
"""


class Server:
    """As much of a TorchServeInstance as a stack asks for."""

    def __init__(self, folder: Path) -> None:
        self.work_dir = folder
        (folder / "logs").mkdir()
        self.ports = Ports(*range(18080, 18085))
        self.metrics_url = "http://127.0.0.1:18082/metrics"
        self.archives_served = {"digits": folder / "digits.mar", "plain": folder / "plain.mar"}
        self.alive = False

    def __enter__(self) -> Server:
        self.alive = True
        return self

    def __exit__(self, *_: object) -> None:
        self.alive = False

    def is_alive(self) -> bool:
        return self.alive


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stack, "followed_bundles", lambda path: tmp_path / "bundles" if path.stem == "digits" else None)
    monkeypatch.setattr(stack, "is_guarded", lambda path: path.stem != "plain")
    (tmp_path / "work").mkdir()

    def make_it(**more: Any) -> Any:
        message: list[str] = []
        beside = Beside(**{"queue_url": "sqlite:///q.db", "command": (sys.executable, "-c", COMPANION), **more})
        server = Server(tmp_path / "work")
        return SimpleNamespace(server=server, said=message, stack=ServingStack(server, beside, message.append))  # type: ignore[arg-type]

    return make_it


def started(folder: Path, name: str) -> list[Path]:
    deadline = time.monotonic() + 30
    while not (found := sorted(folder.glob(f"{name}.*"))):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def test_stack_starts_page_and_retrainers_and_stops_all_of_them(make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(review_port=18099, retrains=True, review_options=["--host", "::1"])
    with made.stack as running:
        running.start_companions()
        (page,), (retrainer,) = started(tmp_path, "review"), started(tmp_path, "retrainer")
        arguments, url = eval(page.read_text())
        assert arguments[1:5] == ["--port", "18099", "--bundles", str(tmp_path / "bundles")]
        assert arguments[5:7] == ["--archive", f"digits={tmp_path / 'work' / 'digits.mar'}"]
        assert arguments[-2:] == ["--host", "::1"]
        assert url == "sqlite:///q.db"
        assert eval(retrainer.read_text())[0][1:5] == ["--model", "digits", "--bundles", str(tmp_path / "bundles")]
        jobs = [target["labels"]["job"] for target in json.loads(running.targets.read_text())]
        assert jobs == ["guard-server", "guard-review", "guard-retrainer"]
        pids = [int(path.suffix[1:]) for path in (page, retrainer)]
        assert all(map(psutil.pid_exists, pids))
        running.keep_alive()
        assert made.said == []
    assert not made.server.alive
    assert not running.targets.exists()
    deadline = time.monotonic() + 30
    while any(map(psutil.pid_exists, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_stack_gives_the_page_the_archive_of_every_guarded_model(make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(review_port=18099, exports_metrics=False)
    made.server.archives_served["signs"] = tmp_path / "work" / "signs.mar"  # pinned: it follows no folder
    with made.stack as running:
        running.start_companions()
        arguments, _ = eval(started(tmp_path, "review")[0].read_text())
    named = [word for option, word in itertools.pairwise(arguments) if option == "--archive"]
    assert named == [f"{name}={tmp_path / 'work' / name}.mar" for name in ("digits", "signs")]


def test_stack_starts_again_what_dies_and_says_so(make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(review_port=18099, exports_metrics=False)
    with made.stack as running:
        running.start_companions()
        (first,) = started(tmp_path, "review")
        assert "--metrics-port" not in first.read_text()
        os.kill(int(first.suffix[1:]), signal.SIGKILL)
        deadline = time.monotonic() + 60
        while len(started(tmp_path, "review")) < 2:
            assert time.monotonic() < deadline
            running.keep_alive()
            time.sleep(0.05)
        assert any("review page" in line for line in made.said)
        made.server.alive = False
        with pytest.raises(ServerError, match=r"^TorchServe has ended by itself\."):
            running.keep_alive()


def test_stack_whose_companion_cannot_start_leaves_nothing_running(make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(review_port=18099, command=(str(tmp_path / "missing"),))
    with pytest.raises(ServerError, match="cannot be started"), made.stack as running:
        running.start_companions()
    assert not made.server.alive
    assert not (tmp_path / "work" / "targets.json").exists()


def words_after(arguments: list[str], option: str) -> list[str]:
    return [word for before, word in itertools.pairwise(arguments) if before == option]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), ["digits={}/of-digits", "signs={}/of-signs"]),
        (("--bundles", "elsewhere"), ["elsewhere"]),
        (("--bundles=elsewhere",), []),
    ],
)
def test_stack_gives_the_page_the_bundles_of_every_model(
    make: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    expected: list[str],
) -> None:
    monkeypatch.setattr(
        stack, "followed_bundles", lambda path: tmp_path / f"of-{path.stem}" if path.stem != "plain" else None
    )
    made = make(review_port=18099, exports_metrics=False, review_options=options)
    made.server.archives_served["signs"] = tmp_path / "work" / "signs.mar"
    with made.stack as running:
        running.start_companions()
        arguments, _ = eval(started(tmp_path, "review")[0].read_text())
    assert words_after(arguments, "--bundles") == [text.format(tmp_path) for text in expected]
    assert made.said == []
