"""What a sender sees: statuses, headers and bodies, whatever the server."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from PIL import Image

from guard import GuardConfig
from guard.errors import ArchiveError, InputRejectedError, SuspectModelError
from guard.serving.answers import Response, make_response
from guard.serving.outcomes import Outcome
from guard.torchserve.answers import error_body, excuse, set_answer
from guard.types import Action, Verdict

FULL = GuardConfig(verdict_detail="full")
IN_BODY = GuardConfig(verdict_detail="full", verdict_in_body=True)
CLEAN = Verdict(
    label=3,
    final_label=3,
    is_poisoned=False,
    p_value=0.512345678,
    score=1.5,
    action="observe",
    detector_scores={"lof": 1.0},
    reason="no more suspicious than clean images",
)


def flagged(action: Action) -> Outcome:
    return Outcome(
        "poisoned",
        Verdict(
            label=7,
            final_label=7,
            is_poisoned=True,
            p_value=0.000999,
            score=9.0,
            action=action,
            detector_scores={"lof": 9.0},
            reason="as suspicious as 0.1 %",
        ),
    )


@pytest.mark.parametrize("body", [{"label": 7}, b"\x00\xff", "text", None, [1, 2]])
@pytest.mark.parametrize("action", ["observe", "flag", "relabel"])
def test_make_response_passes_the_very_body_and_tells_the_verdict_in_headers(body: Any, action: Action) -> None:
    answer = make_response(flagged(action), body, "abc", FULL)
    assert answer.body is body
    assert (answer.status, answer.error) == (200, None)
    assert answer.headers == {
        "Guard-Verdict": "poisoned",
        "Guard-P-Value": "0.000999",
        "Guard-Action": action,
        "Guard-Bundle": "abc",
    }


def test_make_response_clean_has_no_action_and_six_digits() -> None:
    headers = make_response(Outcome("clean", CLEAN), "body", "abc", FULL).headers
    assert (headers["Guard-Action"], headers["Guard-P-Value"]) == ("none", "0.512346")


def test_make_response_block_is_a_422_with_the_reason() -> None:
    answer = make_response(flagged("block"), {"label": 7}, "abc", IN_BODY)
    assert (answer.status, answer.body) == (422, None)
    assert error_body(422, **answer.error) == {  # type: ignore[arg-type]
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
def test_make_response_verdict_in_body_changes_json_alone(body: Any, changed: Any) -> None:
    got = make_response(Outcome("clean", CLEAN), body, "abc", IN_BODY).body
    answer = {"verdict": "clean", "p_value": 0.512345678, "action": "none", "bundle": "abc"}
    assert type(got) is type(body) or not isinstance(body, str | bytes)
    if got != body and isinstance(got, str | bytes):
        got, changed = json.loads(got), json.loads(changed)
    if isinstance(changed, dict):
        changed = {**changed, "guard": answer}
    assert got == changed


def test_make_response_bypassed_is_marked_and_has_no_p_value() -> None:
    outcome = Outcome("bypassed", reason="shape", message="another shape")
    assert make_response(outcome, "body", "abc", FULL).headers == {
        "Guard-Verdict": "bypassed",
        "Guard-Action": "none",
        "Guard-Bundle": "abc",
    }
    answer = make_response(outcome, {}, "abc", IN_BODY).body["guard"]
    assert answer == {"verdict": "bypassed", "p_value": None, "action": "none", "bundle": "abc"}


@pytest.mark.parametrize(
    ("kind", "status", "name"), [("rejected", 422, "InputRejected"), ("failed", 500, "GuardFailed")]
)
def test_make_response_without_a_verdict_never_shows_the_models_body(kind: Any, status: int, name: str) -> None:
    answer = make_response(Outcome(kind, status=status, message="why"), {"label": 7}, "abc", IN_BODY)
    assert answer == Response(status, None, {}, {"type": name, "message": "why"})
    assert set_answer(Said(), 0, answer) == {"code": status, "type": name, "message": "why"}


def test_make_response_leaves_the_users_own_refusal_alone() -> None:
    answer = make_response(Outcome("rejected", status=415), {"sorry": 1}, "abc", IN_BODY)
    assert answer == Response(415, {"sorry": 1}, {}, None)


# --- what the sender may know


def flagged_as(p_value: float, depth: str, action: Action = "flag") -> Outcome:
    return Outcome(
        "poisoned",
        Verdict(
            label=7,
            final_label=7,
            is_poisoned=True,
            p_value=p_value,
            score=9 / p_value,
            action=action,
            detector_scores={"lof": 9.0},
            reason=f"as {p_value}",
            depth=depth,
        ),
    )


@pytest.mark.parametrize("in_body", [False, True])
@pytest.mark.parametrize("action", ["observe", "flag", "relabel", "block"])
def test_flag_alone_makes_the_answers_to_two_flagged_inputs_the_same(action: Action, in_body: bool) -> None:
    config = GuardConfig(verdict_in_body=in_body)
    assert config.verdict_detail == "flag"
    entry = make_response(flagged_as(0.001, "", action), {"label": 7}, "abc", config, "queued")
    for other in (flagged_as(0.009, "", action), flagged_as(0.001, "relu1", action)):
        for receipt in ("queued", "dropped", "unavailable", None):
            assert make_response(other, {"label": 7}, "abc", config, receipt) == entry  # type: ignore[arg-type]
    assert entry.headers == {"Guard-Verdict": "poisoned", "Guard-Action": action, "Guard-Bundle": "abc"}
    text = json.dumps(entry.body)
    assert "0.001" not in text
    assert "p_value" not in text


def test_flag_alone_makes_the_answers_to_two_clean_inputs_the_same() -> None:
    config = GuardConfig(verdict_in_body=True)
    nearly = dataclasses.replace(CLEAN, p_value=0.0101, depth="relu1")
    answers = [make_response(Outcome("clean", entry), {"label": 3}, "abc", config) for entry in (CLEAN, nearly)]
    assert answers[0] == answers[1]
    assert answers[0].body["guard"] == {"verdict": "clean", "action": "none", "bundle": "abc"}


def test_full_tells_depth_and_receipt() -> None:
    headers = make_response(flagged_as(0.001, "relu1"), None, "abc", FULL, "dropped").headers
    assert (headers["Guard-Depth"], headers["Guard-Review"]) == ("relu1", "dropped")


class Said:
    """The answers of a batch of one, as a server keeps them."""

    def __init__(self, **headers: str) -> None:
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.status = 200

    def get_response_headers(self, idx: int) -> dict[str, str]:
        return self.headers

    def set_response_status(self, code: int, phrase: str, idx: int) -> None:
        self.status = code


def test_set_answer_takes_away_what_others_said_in_the_guards_name() -> None:
    message = Said(guard_verdict="clean", GUARD_P_VALUE="1", Guard_Anything="x", X_Label="7", Guardian="kept")
    set_answer(message, 0, make_response(flagged_as(0.001, ""), {"label": 7}, "abc", GuardConfig()))
    assert message.headers.pop("X-Label") == "7"
    assert message.headers.pop("Guardian") == "kept"
    assert message.headers == {"Guard-Verdict": "poisoned", "Guard-Action": "flag", "Guard-Bundle": "abc"}
    assert message.status == 200


@pytest.mark.parametrize("outcome", [None, Outcome("rejected", status=415)])
def test_set_answer_without_a_verdict_leaves_no_verdict_of_the_handlers_own(outcome: Outcome | None) -> None:
    message = Said(guard_verdict="clean", X_Own="1")
    answer = make_response(outcome, "body", "abc", GuardConfig(verdict_in_body=True))
    assert set_answer(message, 0, answer) == "body"
    assert message.headers == {"X-Own": "1"}


def test_set_answer_of_an_error_sets_the_status_and_leaves_nothing_of_the_handlers() -> None:
    message = Said(X_Label="7", content_type="image/png")
    response = Response(422, None, {"Guard-Verdict": "poisoned"}, {"type": "InputBlocked", "message": "no."})
    assert set_answer(message, 0, response) == {"code": 422, "type": "InputBlocked", "message": "no."}
    assert (message.status, message.headers) == (422, {"content-type": "application/json", "Guard-Verdict": "poisoned"})


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
