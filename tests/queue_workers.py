"""Scenes with several processes, run by test_queue_processes.py in a process of their own; prints JSON."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from queue_helpers import flagged

from guard.errors import QueueUnavailable
from guard.relabel.queue import Queue
from guard.relabel.settings import QueueSettings, QueueWaits

PROCESSES = 4


def fork(work: Callable[[], None]) -> int:
    """Run `work` in a child process, and return its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def wait_for(children: list[int]) -> None:
    for child in children:
        _, status = os.waitpid(child, 0)
        if status:
            raise SystemExit(f"a child failed with status {status}")


def claim(url: str) -> dict[str, object]:
    """Four processes claim until nothing is left."""
    ends = [os.pipe() for _ in range(PROCESSES)]

    def work(place: int) -> None:
        claimed: list[int] = []
        with Queue.open(url, QueueSettings(max_held=1000)) as queue:
            while found := queue.claim(f"reviewer {place}", 1 + place):
                claimed += [item.id for item in found]
        os.write(ends[place][1], json.dumps(claimed).encode())

    children = [fork(lambda place=place: work(place)) for place in range(PROCESSES)]
    wait_for(children)
    return {"claimed": [json.loads(os.read(read, 1 << 20)) for read, _ in ends]}


def fork_open_queue(url: str) -> dict[str, int]:
    """A queue that is open is used on both sides of a fork."""
    with Queue.open(url) as queue:
        queue.counts()
        read, write = os.pipe()

        def work() -> None:
            queue.enqueue([flagged(1)])
            os.write(write, bytes([queue.counts().held_items]))

        wait_for([fork(work)])
        queue.enqueue([flagged(2)])
        return {"child": os.read(read, 1)[0], "parent": queue.counts().held_items}


def kill(url: str, folder: str, kills: int) -> dict[str, object]:
    """Writers, reviewers and a sweeper work; one after the other is killed and started again.

    What was acknowledged is appended to a file, after the queue said so.
    """
    inputs = [flagged(number, received_at=datetime.now(UTC)) for number in range(8)]
    queue = Queue.open(url, QueueSettings(lease_s=1.0), waits=QueueWaits(wait_s=20, enqueue_timeout_s=20))
    for item_id in queue.enqueue(inputs).ids[:1]:  # every statement once: children inherit what was compiled
        queue.claim_items("first", [item_id])
        queue.claim("first", 1)
        queue.decide("first", item_id, is_poisoned=True, true_label=5)
    queue.sweep()

    def acknowledge(name: str, *lines: object) -> None:
        with (Path(folder) / name).open("ab", buffering=0) as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())

    def write() -> None:
        while True:
            acknowledge("enqueued", *queue.enqueue(random.sample(inputs, 3)).ids)
            time.sleep(0.002)

    def review() -> None:
        name = f"reviewer {os.getpid()}"
        while True:
            for item in queue.claim(name, 2):
                decision = queue.decide(name, item.id, is_poisoned=True, true_label=5)
                acknowledge("decided", [decision.id, decision.item_id])

    def sweep() -> None:
        while True:
            queue.sweep()
            time.sleep(0.005)

    def patiently(work: Callable[[], None]) -> Callable[[], None]:
        def keep_on() -> None:
            while True:
                try:
                    work()
                except QueueUnavailable:
                    time.sleep(0.01)
                except Exception as error:
                    acknowledge("errors", f"{type(error).__name__}: {error}")

        return keep_on

    def wait_for_a_decision(after: int) -> int:
        """Return the size of what is acknowledged once it is more than `after`; a slow machine gets its time."""
        file, deadline = Path(folder) / "decided", time.monotonic() + 20
        while (size := file.stat().st_size if file.exists() else 0) <= after and time.monotonic() < deadline:
            time.sleep(0.001)
        return size

    roles = [write, review, review, sweep]
    running = {fork(patiently(role)): role for role in roles}
    size = 0
    for _ in range(kills):
        size = wait_for_a_decision(after=size)
        time.sleep(random.uniform(0.01, 0.1))
        victim = random.choice(list(running))
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
        role = running.pop(victim)
        running[fork(patiently(role))] = role
    for child in running:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

    def acknowledged(name: str) -> list[object]:
        file = Path(folder) / name
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    return {"kills": kills, **{name: acknowledged(name) for name in ("decided", "enqueued", "errors")}}


if __name__ == "__main__":
    scene, *arguments = sys.argv[1:]
    if scene == "claim":
        answer: dict[str, object] = claim(*arguments)
    elif scene == "fork":
        answer = dict(fork_open_queue(*arguments))
    else:
        answer = kill(arguments[0], arguments[1], int(arguments[2]))
    print(json.dumps(answer))
