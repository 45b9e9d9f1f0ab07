"""Several processes at the queue at once, and processes that are killed in the middle of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from queue_helpers import flagged

from guard.relabel.items import State
from guard.relabel.queue import Queue

WORKERS = Path(__file__).with_name("queue_workers.py")


def run_workers(*arguments: str) -> dict:
    """Run a scene of `queue_workers.py` in a process that may fork: it has no threads."""
    done = subprocess.run([sys.executable, WORKERS, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_four_processes_claiming_at_once_never_get_the_same_item(queue_url):
    with Queue.open(queue_url) as queue:
        ids = set(queue.enqueue([flagged(number % 20) for number in range(300)]).ids)
    claimed = run_workers("claim", queue_url)["claimed"]
    assert len(claimed) == 4
    together = [item_id for held in claimed for item_id in held]
    assert len(together) == len(set(together)) == 300
    assert set(together) == ids
    assert sum(bool(held) for held in claimed) > 1  # or nothing was tried


def test_connection_of_a_parent_is_not_used_by_its_child(queue_url):
    seen = run_workers("fork", queue_url)
    assert seen == {"child": 1, "parent": 2}


def test_killed_processes_lose_no_acknowledged_decision(queue_url, tmp_path):
    kills = 100 if queue_url.startswith("sqlite") else 20
    seen = run_workers("kill", queue_url, str(tmp_path), str(kills))
    assert seen["kills"] == kills
    assert [error for error in seen["errors"] if not error.startswith("LeaseExpired")] == []
    decided, enqueued = seen["decided"], seen["enqueued"]
    assert len(decided) > kills  # real work was done in between
    with Queue.open(queue_url) as queue:
        kept = {decision.id: decision.item_id for decision in queue.decisions(limit=10**6)}
        assert len(set(kept.values())) == len(kept)  # every item once
        for decision_id, item_id in decided:
            assert kept[decision_id] == item_id
            assert queue.get(item_id).decision.id == decision_id
        assert set(enqueued) <= {item.id for item in queue.items(limit=10**6)}
        assert queue.verify_decisions().problems == ()
        counts = queue.counts()
        assert counts.held_items == sum(counts.by_state[state] for state in State)
        if queue.database.is_sqlite:
            with queue.database.reading() as connection:
                assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
