"""`guard audit`: client log, queue and metrics compared, with a real Prometheus that has seen a restart."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
from metrics_helpers import Counters, answering
from queue_helpers import flagged

from guard.cli import run
from guard.errors import ConfigError, DataError, ObservingError
from guard.observing.audit import audit
from guard.observing.client_log import Noted, read_client_log
from guard.processes.prometheus import PrometheusInstance
from guard.relabel.queue import Queue
from guard.relabel.settings import QueueSettings
from guard.review.status.history import SPANS
from guard.review.status.prometheus import PrometheusSource

#: Seconds between two samples, and from the first one to the last.
STEP, LENGTH = 5, 900


class Watched(NamedTuple):
    """A Prometheus, and when its first sample was taken."""

    url: str
    begin: datetime

    def at(self, seconds: float) -> datetime:
        return self.begin + timedelta(seconds=seconds)


def sample_lines(counters: Counters, at: float) -> list[str]:
    return [f"{line} {at:.3f}" for line in counters.text().splitlines() if line.startswith("guard_")]


@pytest.fixture(scope="session")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Counts of a server: 100 old ones, traffic from 100 s to 700 s, and a restart at 400 s."""
    if shutil.which("promtool") is None or shutil.which("prometheus") is None:
        pytest.skip("there is no Prometheus here: install Debian's package prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    begin = (int(time.time()) - LENGTH - 60) // STEP * STEP
    counters, lines = Counters(), []
    counters.answer("clean", 100)
    for seconds in range(0, LENGTH, STEP):
        if seconds == 400:
            counters = Counters()
        if 100 <= seconds < 700:
            counters.answer("clean", 2)
            if seconds % 100 == 50:  # 150, 250, ..., 650
                counters.answer("poisoned")
            if seconds == 500:
                counters.answer("rejected", 3, code=422)
                counters.answer("failed", 1, code=500)
        lines += sample_lines(counters, begin + seconds)
    (folder / "samples").write_text("\n".join([*sorted(lines, key=lambda line: line.split(" ")[0]), "# EOF\n"]))
    command = ["promtool", "tsdb", "create-blocks-from", "openmetrics", folder / "samples", folder / "data"]
    subprocess.run(command, check=True, capture_output=True)
    (folder / "targets.json").write_text("[]")
    with PrometheusInstance(folder / "targets.json", data_dir=folder) as instance:
        yield Watched(instance.url, datetime.fromtimestamp(begin, UTC))


#: What a client of that server would have noted: seconds since the first sample, status, verdict.
TRAFFIC = [
    *((seconds, 200, "clean") for seconds in range(100, 700, STEP) for _ in range(2)),
    *((seconds, 200, "poisoned") for seconds in range(150, 700, 100)),
    *((500, status, "") for status in (422, 422, 422, 500)),
]


def write_log(path: Path, watched: Watched, *more: dict[str, object]) -> Path:
    rows = [
        # Counted at the sample at the latest.
        {"time": watched.at(seconds - 1).isoformat(), "request_id": f"r{number}", "status": status, "verdict": verdict}
        for number, (seconds, status, verdict) in enumerate(TRAFFIC)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *more]))
    return path


@pytest.fixture
def queue(tmp_path: Path, sqlite_template: Path, watched: Watched) -> Iterator[Queue]:
    """What that server put into the queue."""
    shutil.copy(sqlite_template, tmp_path / "queue.db")
    with Queue.open(f"sqlite:///{tmp_path / 'queue.db'}") as opened:
        flags = [(number, seconds) for number, (seconds, _, verdict) in enumerate(TRAFFIC) if verdict == "poisoned"]
        opened.enqueue(
            [flagged(number, request_id=f"r{number}", received_at=watched.at(seconds)) for number, seconds in flags]
        )
        yield opened


EXPECTED = {"received": 250, "clean": 240, "poisoned": 6, "bypassed": 0, "rejected": 3, "failed": 1}


def test_books_balance_across_a_restart(watched, queue, tmp_path):
    report = audit(
        watched.at(60),
        watched.at(800),
        client_log=write_log(tmp_path / "log.jsonl", watched),
        queue=queue,
        prometheus=watched.url,
        model="digits",
    )
    assert report.problems == []
    assert report.balances
    assert report.sources == {"client log": EXPECTED, "metrics": EXPECTED, "queue": {"poisoned": 6}}
    assert report.allowed == 0  # it was quiet at both ends
    assert set(report.differences["metrics - client log"].values()) == {0}
    lines = report.lines()
    assert lines[-1] == "The counts agree."
    rows = [line.split() for line in lines]
    assert ["client", "log", "250", "240", "6", "0", "3", "1"] in rows
    assert ["metrics", "-", "client", "log", *"000000"] in rows
    assert ["queue", "-", "-", "6", "-", "-", "-"] in rows


def test_audits_are_a_part_of_the_clean_requests(watched, queue, tmp_path):
    clean = [number for number, (_, _, verdict) in enumerate(TRAFFIC) if verdict == "clean"]

    def audited(*numbers: int) -> None:
        at = watched.at(300)
        drawn = {"audit_probability": 0.01, "received_at": at}
        queue.enqueue([flagged(number, request_id=f"r{number}", **drawn) for number in numbers])

    def compared(**more):
        log = write_log(tmp_path / "log.jsonl", watched)
        return audit(watched.at(60), watched.at(800), client_log=log, queue=queue, model="digits", **more)

    audited(*clean[:3])
    report = compared()
    assert report.problems == []
    assert report.sources["queue"] == {"poisoned": 6}
    assert "3 clean requests are in the queue as well: they are the audit sample" in report.notes
    (problem,) = compared(prometheus=watched.url).problems
    assert problem == "audits: queue 3 rows, metrics 0 audited"
    rejected = next(number for number, (_, status, _) in enumerate(TRAFFIC) if status == 422)
    audited(rejected, 9999)
    assert [problem.split(": ", 1)[1] for problem in compared().problems] == [
        "an audit in the queue, and not clean in the client log",
        "an audit in the queue, and not in the client log",
    ]


def test_window_cuts_metrics_exactly_and_tells_what_is_near_its_ends(watched):
    report = audit(watched.at(200), watched.at(300), prometheus=watched.url)
    # 205, 210, ..., 300; the clean ones come two at a time, the flagged one at 250.
    assert report.sources == {"metrics": {**dict.fromkeys(EXPECTED, 0), "received": 41, "clean": 40, "poisoned": 1}}
    assert report.allowed > 0
    assert any("within 6 s of an end" in note for note in report.notes)


def test_what_is_missing_anywhere_is_found(watched, queue, tmp_path):
    log = write_log(tmp_path / "log.jsonl", watched)
    lines = log.read_text().splitlines()
    whole = [json.loads(line) for line in lines]
    flags = [row for row in whole if row["verdict"] == "poisoned"]
    at = watched.at(300).isoformat()

    def judge(rows: list[dict[str, object]], **more: object) -> list[str]:
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))
        window = watched.at(60), watched.at(800)
        return audit(*window, client_log=log, queue=queue, prometheus=watched.url, **more).problems  # type: ignore[arg-type]

    fewer = judge([row for row in whole if row is not flags[0]])
    assert fewer == [
        "received: metrics 250, client log 249",
        "poisoned: metrics 6, client log 5",
        f"1 request ({flags[0]['request_id']}): in the queue, and not in the client log",
    ]
    assert judge([row for row in whole if row is not whole[0]], slack=1) == []
    extra = {"time": at, "request_id": "lost", "status": 200, "verdict": "poisoned"}
    assert judge([*whole, extra]) == [
        "received: metrics 250, client log 251",
        "poisoned: metrics 6, client log 7",
        "1 request (lost): flagged, and not in the queue; it turned away 0 at most",
    ]
    assert judge([*whole, {**extra, "review": "queued"}])[-1] == (
        "1 request (lost): the answer says queued, the queue has no such request"
    )
    assert len(judge([*whole, {**extra, "review": "dropped"}])) == 2
    calm = [{**row, "verdict": "clean"} if row is flags[1] else row for row in whole]
    assert judge(calm)[-1] == f"1 request ({flags[1]['request_id']}): in the queue, and not flagged in the client log"
    bare = {"time": at, "request_id": "bare", "status": 200}
    assert judge([*whole, bare]) == [
        "1 answers of the client log have a status below 400 and no Guard-Verdict: the guard was not in front of the "
        "model"
    ]


def test_answers_of_the_server_itself_and_none_at_all_are_no_difference(watched, queue, tmp_path):
    at = watched.at(300).isoformat()
    more = [{"time": at, "request_id": f"x{status}", "status": status} for status in (503, 413, 413, 0)]
    log = write_log(tmp_path / "log.jsonl", watched, *more)
    report = audit(watched.at(60), watched.at(800), client_log=log, queue=queue, prometheus=watched.url)
    assert report.problems == []
    assert report.sources["client log"] == EXPECTED
    assert [note for note in report.notes if "itself" in note or "no answer" in note] == [
        "1 answers with status 503 came from the server itself: the guard has not seen these requests",
        "2 answers with status 413 came from the server itself: the guard has not seen these requests",
        "1 requests of the client log have no answer; the guard may know",
    ]


def test_full_queue_is_counted_by_metrics_or_by_the_queue_itself(tmp_path, watched):
    start = watched.at(0.5)
    with Queue.open(f"sqlite:///{tmp_path / 'small.db'}", QueueSettings(max_items=4)) as queue:
        inputs = [flagged(number, request_id=f"r{number}", received_at=watched.at(number)) for number in range(1, 10)]
        ids = [item_id for item in inputs for item_id in queue.enqueue([item]).ids]
        rows = [{"time": item.received_at.isoformat(), "request_id": item.request_id, "status": 200} for item in inputs]
        log = tmp_path / "log.jsonl"
        log.write_text("".join(json.dumps({**row, "verdict": "poisoned"}) + "\n" for row in rows))
        alone = audit(start, watched.at(60), client_log=log, queue=queue)
        assert alone.problems == []
        admitted = sum(item_id is not None for item_id in ids)
        assert alone.sources["queue"] == {"poisoned": admitted}  # also those that gave way later
        counters = Counters()
        counters.answer("poisoned", 9)
        counters.add("guard_queued_total", admitted - 9)
        counters.add("guard_shed_total", 9 - admitted, reason="full")
        with answering(lambda path: (200, counters.text())) as url:
            known = audit(start, watched.at(60), client_log=log, queue=queue, metrics_urls=[url])
            assert known.problems == []
            assert known.allowed == 0  # totals since the start have no begin that cuts
            text = f"{9 - admitted} flagged requests are not in the queue: full {9 - admitted}"
            assert (text in known.notes) == (admitted < 9)  # who is dropped is drawn
            assert any("totals since the server's start" in note for note in known.notes)
            counters.add("guard_shed_total", -1, reason="full")
            short = audit(start, watched.at(60), client_log=log, queue=queue, metrics_urls=[url])
    assert short.problems[0] == f"metrics: 9 poisoned, but {admitted} queued and {8 - admitted} shed"


def test_metrics_that_do_not_add_up_are_found():
    counters = Counters()
    counters.answer("clean", 5)
    counters.add("guard_requests_total", 1, code="200")
    with answering(lambda path: (200, counters.text())) as url:
        report = audit(datetime(2026, 3, 1, tzinfo=UTC), datetime(2026, 3, 2, tzinfo=UTC), metrics_urls=[url])
    assert report.problems == ["metrics: received is +1 off the sum of the verdicts"]
    assert report.lines()[-1] == "The counts do not agree."
    assert "there is one source only: its sums were checked, with nothing to compare them with" in report.notes


def test_client_log_as_csv_and_with_every_kind_of_line(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(
        "status,time,request_id,verdict,review\r\n200,2026-03-01T12:00:00Z,a,clean,\r\n"
        "422,2026-03-01T13:00:01+01:00,b,poisoned,queued\r\n422,2026-03-01T12:00:02,c,,\r\n,2026-03-01T12:00:03,,,\r\n"
    )
    noted = read_client_log(path)
    assert noted[0] == Noted(datetime(2026, 3, 1, 12, tzinfo=UTC), "a", 200, "clean")
    assert [entry.kind for entry in noted] == ["clean", "poisoned", "rejected", "unanswered"]
    assert [(entry.time - noted[0].time).total_seconds() for entry in noted] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time,status\n", "it lacks request_id"),
        ('{"time": "2026-03-01T12:00:00Z", "status": 200}\n', "line 1 lacks request_id"),
        ('{"time": 1\n', "line 1 is no JSON"),
        ("time,request_id,status,verdict\n2026-03-01,a,200,good\n", "line 2: the verdict must be one of clean"),
        ("time,request_id,status\nyesterday,a,200\n", "line 2: a time must be ISO 8601"),
        ("time,request_id,status\n2026-03-01,a,-1\n", "line 2: the status must be a number of HTTP"),
    ],
)
def test_bad_client_log_is_refused_with_the_line(tmp_path, text, message):
    path = tmp_path / "log"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_client_log(path)


def test_windows_and_sources_that_cannot_be_are_refused(watched):
    start = watched.at(0)
    with pytest.raises(ConfigError, match="must end after it begins"):
        audit(start, start, prometheus=watched.url)
    with pytest.raises(ConfigError, match="nothing to compare"):
        audit(start, watched.at(1))
    with pytest.raises(ConfigError, match="Give one of them"):
        audit(start, watched.at(1), prometheus=watched.url, metrics_urls=["http://127.0.0.1:1"])
    with pytest.raises(ObservingError, match="has no counts of the guard in that window"):
        audit(start - timedelta(days=300), start - timedelta(days=299), prometheus=watched.url)


def test_command_says_by_its_status_whether_the_books_balance(watched, queue, tmp_path, capsys):
    log = write_log(tmp_path / "log.jsonl", watched)
    window = ["audit", "--from", watched.at(60).isoformat(), "--to", watched.at(800).isoformat()]
    known = ["--client-log", str(log), "--prometheus", watched.url]
    assert run([*window, *known, "--queue", str(tmp_path / "queue.db")]) == 0
    assert "The counts agree." in capsys.readouterr().out
    log.write_text(log.read_text().partition("\n")[2])
    assert run([*window, *known, "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert (answer["balances"], answer["differences"]["metrics - client log"]["clean"]) == (False, 1)
    for wrong, message in (
        (["audit", "--from", "yesterday", *known], "a time must be ISO 8601"),
        ([*window, "--client-log", str(tmp_path / "none")], "cannot be read"),
        ([*window, "--queue", str(tmp_path / "none.db")], "there is no queue"),
        ([*window, "--prometheus", "http://127.0.0.1:9"], "does not answer"),
        ([*window, "--prometheus", "nowhere"], "must be an http or https address"),
        ([*window], "nothing to compare"),
        (["audit"], "nothing to compare"),
    ):
        assert run(wrong) == 2, wrong
        errors = capsys.readouterr().err
        assert message in errors
        assert errors.count("\n") == 1
    assert not (tmp_path / "none.db").exists()


def test_status_page_draws_the_same_history_from_prometheus(watched):
    source = PrometheusSource(watched.url)
    end = watched.at(LENGTH - STEP).timestamp()
    history = source.history(SPANS["hour"], "digits", end)
    assert round(history.total("guard_verdicts_total", "poisoned")) in (6, 7)  # increase() extrapolates
    assert 235 <= history.total("guard_verdicts_total", "clean") <= 260
    rates = history.rate("guard_verdicts_total", "clean")
    assert max(rate for rate in rates if rate is not None) == pytest.approx(0.4, rel=0.1)
    assert rates[:30] == [None] * 30  # before the first sample: nothing, not zero
    assert history.since is not None
    assert abs(history.since - watched.begin.timestamp()) < 240
    assert history.models == ("digits",)
    assert history.in_use == ("ab" * 32,)
    assert not history.is_away
    assert source.history(SPANS["hour"], "digits", end + 1) is history  # asked once for all who look
    later = source.history(SPANS["day"], None, end + 3600)
    assert later.is_away
    assert "has nothing new of the guard" in later.away[0]
    away = PrometheusSource("http://127.0.0.1:9").history(SPANS["hour"], None, end)
    assert away.is_away
    assert re.fullmatch(r"http://127.0.0.1:9/api/v1/query_range does not answer: .*, since \d\d:\d\d UTC", away.away[0])
