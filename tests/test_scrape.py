"""Metrics read from addresses: what is understood, what is refused, and counters that began anew."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
from metrics_helpers import Counters, answering

from guard.errors import ConfigError, ObservingError
from guard.observing.scrape import Prometheus, Series, check_url, increase, metrics_address, parse, read_endpoint
from guard.review.status.history import WANTED


def test_parse_keeps_the_guards_series_and_their_labels():
    text = (
        "# HELP Requests2XX Torchserve prometheus counter metric with unit: Count\n"
        '# TYPE Requests2XX counter\nRequests2XX{Level="Host",} 3.0\n'
        "# HELP guard_verdicts_total x\n# TYPE guard_verdicts_total counter\n"
        'guard_verdicts_total{model="a",verdict="clean",Hostname="h",} 41.0\n'
    )
    found = parse(text)
    assert found == {Series.of("guard_verdicts_total", {"model": "a", "verdict": "clean", "Hostname": "h"}): 41.0}
    (series,) = found
    assert (series.label("verdict"), series.label("nothing")) == ("clean", "")


def test_parse_of_a_running_torchserve_keeps_every_name_as_it_stands():
    text = (Path(__file__).parent / "torchserve_metrics.txt").read_text()  # of version 0.12, 885 requests
    found = parse(text)
    assert {series.name for series in found} == set(re.findall(r"^(guard_\w+)", text, re.MULTILINE))
    assert set(WANTED) <= {series.name for series in found} | {"guard_bundle_swaps_total"}
    timed = {"model": "digits", "stage": "guard", "Hostname": "server"}
    assert found[Series.of("guard_stage_duration_seconds_bucket", {**timed, "le": "0.01"})] == 835
    assert found[Series.of("guard_stage_duration_seconds_count", timed)] == 885


def test_parse_of_something_else_is_refused():
    with pytest.raises(ObservingError, match="the metrics cannot be read"):
        parse("guard_verdicts_total{model= 3\n")


def test_endpoint_is_read_and_its_troubles_are_told():
    answers = {"/metrics": (200, Counters().text()), "/gone": (404, "no"), "/away": (302, "file:///etc/passwd")}
    with answering(lambda path: answers.get(path, (200, '{"data": {"result": "none"}}'))) as url:
        assert read_endpoint(f"{url}/metrics") == Counters().series()
        with pytest.raises(ObservingError, match=r"/gone answered 404"):
            read_endpoint(f"{url}/gone")
        with pytest.raises(ObservingError, match=r"/away answered 302"):
            read_endpoint(f"{url}/away")
        with pytest.raises(ObservingError, match="does not answer as Prometheus does"):
            Prometheus(url).at("up", 0)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection, and says nothing
        with pytest.raises(ObservingError, match="does not answer"):
            read_endpoint(f"http://127.0.0.1:{silent.getsockname()[1]}/metrics", 0.05)
        port = silent.getsockname()[1]
    with pytest.raises(ObservingError, match=rf"127.0.0.1:{port}/metrics does not answer: Connection refused"):
        read_endpoint(f"http://127.0.0.1:{port}/metrics")


def test_increase_handles_resets_late_series_and_the_window():
    samples = [(10.0, 5.0), (20.0, 8.0), (30.0, 2.0), (40.0, 3.0)]
    assert increase(samples, 10, 40) == 3 + 2 + 1  # fell to 2: began anew at 0
    assert increase(samples, 0, 40) == 5 + 3 + 2 + 1  # was not there before
    assert increase(samples, 15, 25) == 3
    assert increase(samples, 40, 90) == 0
    assert increase([], 0, 90) == 0


@pytest.mark.parametrize("url", ["file:///etc/passwd", "127.0.0.1:8082", "http://", "ftp://host/x", "http://h:99999"])
def test_address_that_is_none_is_refused(url):
    with pytest.raises(ConfigError, match="--metrics-url must be an http or https address"):
        metrics_address(url)


def test_metrics_path_is_added_where_there_is_none():
    assert metrics_address("http://127.0.0.1:8082/") == "http://127.0.0.1:8082/metrics"
    assert metrics_address("https://host/guard/metrics") == "https://host/guard/metrics"
    assert check_url("http://127.0.0.1:9090/", "--prometheus") == "http://127.0.0.1:9090"
