"""The status page's numbers over time: samples into rates, resets, gaps, quantiles, and what is said of them."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from metrics_helpers import Counters

from guard.errors import ObservingError
from guard.observing.scrape import parse
from guard.relabel.items import Counts, State
from guard.review.status.history import SPANS, History, Key
from guard.review.status.numbers import Numbers, QueueNow, charts
from guard.review.status.sampler import RINGS, Sampler
from guard.review.status.verdict import answer

NOW = 1_800_000_000.0
HOUR = SPANS["hour"]


class Server:
    """A server whose metrics are read at chosen times."""

    def __init__(self, n: int = 1) -> None:
        self.counters = [Counters() for _ in range(n)]
        self.away: set[int] = set()
        self.sampler = Sampler([f"http://127.0.0.1:{9000 + place}" for place in range(n)], read=self._read)

    def _read(self, url: str):
        place = int(url.split(":")[2].split("/")[0]) - 9000
        if place in self.away:
            raise ObservingError(f"{url} does not answer: Connection refused.")
        return self.counters[place].series()

    def run(self, begin: float, end: float, per_look: int = 5, verdict: str = "clean") -> None:
        """Let requests come and be counted, with a look every 5 s."""
        at = begin
        while at < end:
            for place, counters in enumerate(self.counters):
                counters.answer(verdict, per_look * (place + 1))
            self.sampler.look(at)
            at += 5

    def history(self, now: float = NOW, span: str = "hour", model: str | None = None) -> History:
        return self.sampler.history(SPANS[span], model, now)


def test_edges_are_whole_steps_and_end_now():
    edges = HOUR.edges(NOW + 50)
    assert len(edges) == HOUR.points + 1
    assert edges[-1] == NOW + 50
    assert {edge % 60 for edge in edges[:-1]} == {0}
    assert 15 <= edges[-1] - edges[-2] < 75


def test_rates_and_totals_of_a_steady_server():
    server = Server()
    server.run(NOW - 600, NOW)
    history = server.history()
    rates = history.rate("guard_verdicts_total", "clean")
    assert rates[-9:] == pytest.approx([1.0] * 9)
    assert rates[:-11] == [None] * (HOUR.points - 11)  # nobody looked: not zero
    assert history.total("guard_verdicts_total", "clean") == 5 * 119  # the first look is where counting begins
    assert history.since == NOW - 600
    assert history.in_use == ("ab" * 32,)
    assert history.rate("guard_verdicts_total", "no such") == [None] * HOUR.points
    day = server.history(span="day")
    assert day.rate("guard_verdicts_total", "clean")[-1] == pytest.approx(1.0)
    assert day.total("guard_verdicts_total", "clean") == 5 * 119
    assert server.history(model="other").totals == {}


def test_reset_counts_from_zero_and_never_down():
    server = Server()
    server.run(NOW - 600, NOW - 300)
    server.counters = [Counters()]  # restarted
    server.run(NOW - 300, NOW)
    history = server.history()
    assert history.total("guard_verdicts_total", "clean") == 5 * 119
    assert min(rate for rate in history.rate("guard_verdicts_total", "clean") if rate is not None) > 0.8


def test_address_away_is_a_gap_and_its_counts_are_in_the_total():
    server = Server()
    server.run(NOW - 1200, NOW - 900)
    server.away = {0}
    server.run(NOW - 900, NOW - 300)
    away = server.history(NOW - 300)
    assert away.is_away
    assert away.away == (
        f"http://127.0.0.1:9000/metrics does not answer: Connection refused, "
        f"since {datetime.fromtimestamp(NOW - 900, UTC):%H:%M} UTC",
    )
    assert away.rate("guard_verdicts_total", "clean")[-1] is None
    server.away = set()
    server.run(NOW - 300, NOW)
    history = server.history()
    rates = history.rate("guard_verdicts_total", "clean")
    assert rates[-14:-6].count(None) == 8
    assert rates[-4:] == pytest.approx([1.0] * 4)  # what came meanwhile is no peak
    assert history.total("guard_verdicts_total", "clean") == 5 * 239
    assert not history.is_away
    assert history.away == ()


def test_several_addresses_add_up_and_one_away_is_told():
    server = Server(2)
    server.run(NOW - 600, NOW - 60)
    assert server.history(NOW - 60).rate("guard_verdicts_total", "clean")[-3] == pytest.approx(3.0)
    server.away = {1}
    server.run(NOW - 60, NOW)
    history = server.history()
    assert not history.is_away
    assert [line.split()[0] for line in history.away] == ["http://127.0.0.1:9001/metrics"]
    assert history.rate("guard_verdicts_total", "clean")[-1] == pytest.approx(1.0)


def test_memory_is_bounded_and_hostile_series_do_not_fill_it(monkeypatch):
    monkeypatch.setattr("guard.review.status.sampler._MOST_SERIES", 20)
    server = Server()
    for number in range(50):
        server.counters[0].add("guard_detector_fired_total", 1, detector=f"d{number}")
    for step in range(0, 8 * 3600, 60):
        server.sampler.look(NOW + step)
    endpoint = server.sampler.endpoints[0]
    assert len(endpoint.columns) == 20
    sizes = [len(ring.times) for ring in endpoint.rings]
    assert sizes == [480, 480, 48]
    assert [ring.times.maxlen for ring in endpoint.rings] == [round(seconds / step) + 2 for step, seconds in RINGS]


def test_broken_metrics_do_not_stop_the_sampler():
    server = Server()
    server.counters[0].add("guard_stage_duration_seconds_bucket", 1, stage="guard", le="much")
    server.sampler.look(NOW)
    assert server.history().is_away
    server.counters = [Counters()]
    server.sampler.look(NOW + 5)
    assert not server.history(NOW + 5).is_away


def test_quantiles_worked_out_by_hand():
    server = Server()
    server.sampler.look(NOW - 65)
    server.counters[0].time("guard", {"0.001": 50, "0.002": 90, "0.004": 100, "+Inf": 100})
    server.counters[0].time("handler", {"0.001": 0, "0.002": 0, "+Inf": 4})
    server.sampler.look(NOW - 1)
    history = server.history()
    assert history.quantile("guard", 0.5) == pytest.approx(0.001)
    assert history.quantile("guard", 0.75) == pytest.approx(0.001 + 0.001 * 25 / 40)
    assert history.quantile("guard", 0.99) == pytest.approx(0.002 + 0.002 * 9 / 10)
    assert history.quantile("handler", 0.5) == 0.002  # beyond the last bound, as Prometheus says it
    assert history.quantile("nothing", 0.5) is None
    assert history.quantiles("guard", 0.5)[-1] == pytest.approx(0.001)
    assert history.quantiles("nothing", 0.5) == [None] * HOUR.points


def test_every_number_of_a_running_torchserve_is_on_the_page():
    found = parse((Path(__file__).parent / "torchserve_metrics.txt").read_text())
    looks = [dict.fromkeys(found, 0.0), found]
    sampler = Sampler(["http://127.0.0.1:8082"], read=lambda _: looks.pop(0))
    sampler.look(NOW - 60)
    sampler.look(NOW - 1)
    known = numbers(sampler.history(HOUR, "digits", NOW))
    assert known.verdicts == {"clean": 383, "poisoned": 502, "bypassed": 0, "rejected": 0, "failed": 0}
    assert known.drift.factor == pytest.approx(38 / 38.3)
    # 442.5 of 885 batches: the bounds around them have 7 and 690 for the guard, 0 and 498 for the handler.
    assert known.milliseconds("guard", 0.5) == pytest.approx(1 + 1.5 * (442.5 - 7) / (690 - 7))
    assert known.milliseconds("handler", 0.5) == pytest.approx(1 + 1.5 * 442.5 / 498)
    assert known.milliseconds("guard", 0.99) == pytest.approx(10 + 15 * (0.99 * 885 - 835) / (882 - 835))
    drawn = {chart.id: chart for chart in charts(known)}
    assert drawn["latency"].summary == "Guard 1.96 ms (p50), 23.1 ms (p99); handler 2.33 ms (p50), 21.3 ms (p99)."
    for chart in drawn.values():
        assert chart.id == "queue" or chart.lines[0].values[-1] is not None, chart.id
    assert known.history.parts("guard_detector_fired_total")["lof/relu1"] == 474
    assert known.history.in_use == ("a58020360409be92e9e69010f6597125ed6e4af70e99fa671c8897a45c6c3ddb",)


def numbers(history: History, *, oldest: float | None = None, waiting: int = 0, **more) -> Numbers:
    by_state = dict.fromkeys(State, 0) | {State.PENDING: waiting}
    moment = None if oldest is None else datetime.fromtimestamp(NOW, UTC) - timedelta(minutes=oldest)
    counts = Counts(by_state=by_state, oldest_pending_at=moment, dropped={}, decisions={})
    return Numbers(history, QueueNow(counts, [0] * HOUR.points, [0] * HOUR.points, []), **more)


def shown(known: Numbers) -> tuple[str, str, list[str]]:
    found = answer(known, datetime.fromtimestamp(NOW, UTC))
    return found.level, f"{found.opening}: {found.sentence}.", [finding.text for finding in found.findings]


def history_of(**verdicts: int) -> History:
    totals = {Key("guard_verdicts_total", (verdict,)): float(count) for verdict, count in verdicts.items()}
    return History(span=HOUR, edges=HOUR.edges(NOW), totals=totals, since=NOW - 3600)


def test_all_well_is_said_in_one_sentence():
    calm = numbers(history_of(clean=1201, poisoned=3), oldest=4, waiting=1, expected_rate=0.01)
    assert shown(calm) == (
        "well",
        "All well: 3 of 1,204 requests flagged in the last hour, no bypass, oldest waiting item 4 min.",
        [],
    )
    assert shown(numbers(history_of(clean=0)))[1] == "All well: no request in the last hour, nothing waits."


def test_what_is_wrong_comes_first_and_the_worst_of_it_first():
    totals = dict(history_of(clean=900, poisoned=300, bypassed=12, failed=30).totals)
    totals[Key("guard_bypassed_total", ("guard_error",))] = 12.0
    totals[Key("guard_shed_total", ("full",))] = 7.0
    history = replace(history_of(), totals=totals, in_use=("cd" * 32,))
    level, sentence, findings = shown(numbers(history, oldest=300, expected_rate=0.01, active=("ab" * 32,)))
    assert level == "bad"
    assert sentence == (
        "Not well: 300 of 1,242 requests flagged in the last hour, 12 bypassed, oldest waiting item 5 h."
    )
    assert findings == [
        "12 answered without being judged in the last hour (guard error 12)",
        "30 of 1,242 requests failed in the last hour",
        "300 flagged in the last hour, about 12 are expected of clean traffic: an attack, or drift",
        "7 flagged inputs did not get into the queue: the queue was full",
        "an input has waited for a person for 5 h",
        f"bundle {'ab' * 6} is active, but the server uses {'cd' * 6}",
    ]


def test_server_away_or_unknown_is_never_well():
    away = replace(history_of(clean=100), away=("http://x does not answer, since 02:13 UTC",), is_away=True)
    assert shown(numbers(away))[0] == "bad"
    nothing = History(span=HOUR, edges=HOUR.edges(NOW))
    level, sentence, _ = shown(numbers(nothing, has_metrics=False))
    assert (level, sentence) == ("look", "Look at this: no numbers of the server, nothing waits.")


def test_drift_is_measured_and_told_once_it_is_no_chance():
    server = Server()
    server.run(NOW - 3600, NOW - 600)
    calm = server.history(NOW - 600)
    assert numbers(calm).drift is not None
    for at in range(0, 600, 5):
        server.counters[0].answer("clean", 5)
        server.counters[0].add("guard_unflagged_low_total", 2)
        server.sampler.look(NOW - 600 + at)
    known = numbers(server.history())
    assert known.drift_lately.factor == pytest.approx(4.0, rel=0.01)
    assert known.drift.factor == pytest.approx(240 / 0.1 / (5 * 719), rel=0.01)
    assert shown(known)[2] == ["clean traffic drifts: lately, low p-values are 4.0 times as frequent as calibrated"]
    drawn = {chart.id: chart for chart in charts(known)}["drift"]
    assert drawn.lines[0].values[-1] == pytest.approx(known.drift_lately.factor, rel=0.01)  # over ten minutes
    assert drawn.lines[0].values[20] == pytest.approx(0.0)
    few = numbers(history_of(clean=99))
    assert few.drift is None


def test_charts_draw_gaps_not_zeros_where_nothing_is_known():
    for chart in charts(numbers(History(span=HOUR, edges=HOUR.edges(NOW)))):
        drawn = [line for line in chart.lines if not (line.is_dashed and line.name == "as calibrated")]
        if chart.id != "queue":
            assert all(value is None for line in drawn for value in line.values), chart.id
