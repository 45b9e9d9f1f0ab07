"""What a sender sees: statuses, headers and bodies, whatever the server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from PIL import Image

from guard.errors import ArchiveError, InputRejectedError, SuspectModelError
from guard.serving.answers import excuse, make_answer
from guard.serving.runtime import Outcome
from guard.types import Action, Verdict

CLEAN = Verdict(3, 3, False, 0.512345678, 1.5, "observe", {"lof": 1.0}, "no more suspicious than clean images")


def flagged(action: Action) -> Outcome:
    return Outcome("poisoned", Verdict(7, 7, True, 0.000999, 9.0, action, {"lof": 9.0}, "as suspicious as 0.1 %"))


@pytest.mark.parametrize("body", [{"label": 7}, b"\x00\xff", "text", None, [1, 2]])
@pytest.mark.parametrize("action", ["observe", "flag", "relabel"])
def test_make_answer_passes_the_very_body_and_tells_the_verdict_in_headers(body: Any, action: Action) -> None:
    answer = make_answer(flagged(action), body, "abc")
    assert answer.body is body
    assert (answer.status, answer.is_error) == (200, False)
    assert answer.headers == {
        "Guard-Verdict": "poisoned",
        "Guard-P-Value": "0.000999",
        "Guard-Action": action,
        "Guard-Bundle": "abc",
    }


def test_make_answer_clean_has_no_action_and_six_digits() -> None:
    headers = make_answer(Outcome("clean", CLEAN), "body", "abc").headers
    assert (headers["Guard-Action"], headers["Guard-P-Value"]) == ("none", "0.512346")


def test_make_answer_block_is_a_422_with_the_reason() -> None:
    answer = make_answer(flagged("block"), {"label": 7}, "abc", verdict_in_body=True)
    assert (answer.status, answer.is_error) == (422, True)
    assert answer.body == {
        "code": 422,
        "type": "InputBlocked",
        "message": "the input was judged poisoned and blocked: as suspicious as 0.1 %.",
        "p_value": 0.000999,
    }
    assert answer.headers["Guard-Action"] == "block"


@pytest.mark.parametrize(
    ("body", "changed"),
    [
        ({"label": 7}, {"label": 7, "guard": "?"}),
        ([0.1, 0.9], {"prediction": [0.1, 0.9], "guard": "?"}),
        (7, {"prediction": 7, "guard": "?"}),
        (None, {"prediction": None, "guard": "?"}),
        ('{"label": 7}', '{"label": 7, "guard": "?"}'),
        (b"[7]", b'{"prediction": [7], "guard": "?"}'),
        ("seven", "seven"),
        ("", ""),
        (b"\x89PNG", b"\x89PNG"),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_make_answer_verdict_in_body_changes_json_alone(body: Any, changed: Any) -> None:
    got = make_answer(Outcome("clean", CLEAN), body, "abc", verdict_in_body=True).body
    told = {"verdict": "clean", "p_value": 0.512345678, "action": "none", "bundle": "abc"}
    assert type(got) is type(body) or not isinstance(body, str | bytes)
    if got != body and isinstance(got, str | bytes):
        got, changed = json.loads(got), json.loads(changed)
    if isinstance(changed, dict):
        changed = {**changed, "guard": told}
    assert got == changed


def test_make_answer_bypassed_is_marked_and_has_no_p_value() -> None:
    outcome = Outcome("bypassed", reason="shape", message="another shape")
    assert make_answer(outcome, "body", "abc").headers == {
        "Guard-Verdict": "bypassed",
        "Guard-Action": "none",
        "Guard-Bundle": "abc",
    }
    told = make_answer(outcome, {}, "abc", verdict_in_body=True).body["guard"]
    assert told == {"verdict": "bypassed", "p_value": None, "action": "none", "bundle": "abc"}


@pytest.mark.parametrize(
    ("kind", "status", "name"), [("rejected", 422, "InputRejected"), ("failed", 500, "GuardFailed")]
)
def test_make_answer_without_a_verdict_never_shows_the_models_body(kind: Any, status: int, name: str) -> None:
    answer = make_answer(Outcome(kind, status=status, message="why"), {"label": 7}, "abc", verdict_in_body=True)
    assert answer.body == {"code": status, "type": name, "message": "why"}
    assert (answer.status, answer.headers, answer.is_error) == (status, {}, True)


def test_make_answer_leaves_the_users_own_refusal_alone() -> None:
    answer = make_answer(Outcome("rejected", status=415), {"sorry": 1}, "abc", verdict_in_body=True)
    assert (answer.status, answer.body, answer.headers, answer.is_error) == (415, {"sorry": 1}, {}, False)


class Told(Exception):  # noqa: N818  # as TorchServe's PredictionException
    def __init__(self, error_code: Any) -> None:
        super().__init__("told")
        self.error_code = error_code


@pytest.mark.parametrize(
    ("error", "model_ran", "kind", "status", "text"),
    [
        (InputRejectedError("too odd", 415), True, "rejected", 415, "too odd"),
        (Image.DecompressionBombWarning("50 MP"), False, "rejected", 413, "too large: 50 MP"),
        (Image.DecompressionBombError("900 MP"), False, "rejected", 413, "too large"),
        (Told(429), True, "rejected", 429, "told"),
        (Told(503), False, "failed", 503, "told"),
        (Told(200), False, "rejected", 400, "Told: told"),
        (Told("429"), False, "rejected", 400, "Told: told"),
        (MemoryError(), False, "failed", 507, "out of memory"),
        (ValueError("no digit"), False, "rejected", 400, "ValueError: no digit"),
        (ValueError("secret inside"), True, "failed", 500, "failed on this input: ValueError."),
        (SuspectModelError("no logits."), False, "failed", 500, "no logits."),
        (ArchiveError("one answer per request."), True, "failed", 500, "one answer per request."),
        (ValueError("x" * 10_000), False, "rejected", 400, "xxx"),
    ],
    ids=range(13),
)
def test_excuse_blames_the_input_until_the_model_runs(
    error: Exception, model_ran: bool, kind: str, status: int, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    outcome = excuse(error, model_ran)
    assert (outcome.kind, outcome.status, outcome.verdict) == (kind, status, None)
    assert text in outcome.message
    assert len(outcome.message) < 400
    assert all(str(error)[:20] not in record.getMessage() for record in caplog.records if str(error))
