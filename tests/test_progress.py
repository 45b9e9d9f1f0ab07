"""Progress where stderr is no terminal: plain lines, none for what is quick."""

from __future__ import annotations

import threading

import pytest

from guard.cli import output


def wait_for(capfd: pytest.CaptureFixture[str], text: str) -> str:
    """What was printed to stderr, when a line has come."""
    printed = ""
    for _ in range(500):
        printed += capfd.readouterr().err
        if text in printed:
            return printed
        threading.Event().wait(0.01)
    raise AssertionError(f"{text!r} was not printed, but {printed!r}")


def test_progress_bar_redirected_prints_a_line_per_changed_text(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "_SECONDS_BETWEEN_LINES", 0.02)
    with output.progress_bar("reading images") as report:
        assert wait_for(capfd, "reading images") == "reading images\n"
        threading.Event().wait(0.1)
        assert capfd.readouterr().err == ""  # nothing has changed
        report("fold 1 of [5]", 0.25)
        assert wait_for(capfd, "fold") == "fold 1 of [5] (25%)\n"
    assert capfd.readouterr().err == ""
    assert "progress" not in {thread.name for thread in threading.enumerate()}


def test_progress_bar_redirected_is_silent_for_what_is_quick_and_ends_with_an_error(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fails() -> None:
        with output.progress_bar("starting") as report:
            report("done", 1.0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert capfd.readouterr().err == ""
    assert "progress" not in {thread.name for thread in threading.enumerate()}
