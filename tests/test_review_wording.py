"""Plain words, pictures, keys and maps of the review page, each worked out by hand."""

from __future__ import annotations

import io
import math
import re
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import torch
from PIL import Image
from queue_helpers import flagged
from torch import nn

from guard import SuspectModel
from guard.errors import DataError
from guard.review import wording
from guard.review.occlusion import Occlusion, occlusion_map
from guard.review.pictures import MAX_SIDE, heat_picture, picture_of_body, picture_of_tensor
from guard.review.workspace import label_of


@pytest.mark.parametrize(
    ("p_value", "text"),
    [
        (1.0, "most clean images"),
        (0.5, "most clean images"),
        (0.1, "1 in 10 clean images"),
        (0.0006662, "1 in 1,500 clean images"),
        (1e-4, "1 in 10,000 clean images"),
        (1e-7, "fewer than 1 in a million clean images"),
    ],
)
def test_one_in_says_a_p_value_in_words(p_value, text):
    assert wording.one_in(p_value) == text


def test_label_keys_are_digits_for_digits():
    assert wording.label_keys([str(label) for label in range(10)]) == list("0123456789")


def test_label_keys_leave_out_the_keys_of_the_page():
    keys = wording.label_keys([f"class {label}" for label in range(28)])
    assert keys[:10] == [*"123456789", "a"]
    assert not set(keys) & set(wording.RESERVED_KEYS)
    assert len(set(keys)) == 28


def test_label_keys_of_many_classes_are_numbers_of_one_width():
    assert wording.label_keys(["x"] * 43)[::14] == ["00", "14", "28", "42"]
    assert wording.label_keys(["x"] * 29)[0] == "00"
    assert wording.label_keys(["x"] * 101)[100] == "100"


def test_label_names_fall_back_to_numbers():
    assert wording.label_names(None, 2) == ["0", "1"]
    assert wording.label_names(("cat", "dog", "cow"), 2) == ["0", "1"]
    assert wording.label_names(("cat", ""), 2) == ["cat", "1"]


@pytest.mark.parametrize(
    ("text", "label"),
    [("", None), ("  ", None), ("1", 1), ("01", 1), ("1 Stop", 1), ("stop", 1), (" Give  way ", 0), ("30", 2)],
)
def test_label_of_takes_number_and_name(text, label):
    assert label_of(text, ["Give way", "Stop", "30"]) == label


@pytest.mark.parametrize("text", ["3", "-1", "1.0", "Sto", "٣", "9" * 30])
def test_label_of_refuses_what_is_no_class(text):
    with pytest.raises(DataError, match="none of the 3 classes"):
        label_of(text, ["Give way", "Stop", "30"])


def test_signs_say_which_kinds_fired_and_where():
    item = flagged(surprise={"lof:features": 1.0, "lof:conv": 3.0, "disagreement:features": math.log(1500)})
    head, lof = wording.signs(item, "Stop", "calibrated", 0.01)
    assert head.text == "A second head, trained on clean images only, does not say Stop"
    assert head.fired
    assert head.places == [("the last layer", "1 in 1,500 clean images", True)]
    assert lof.text == "Looks like clean images of Stop"
    assert not lof.fired
    assert [place for place, _, _ in lof.places] == ["layer conv", "the last layer"]


@pytest.mark.parametrize(("rate", "fires"), [(0.05, True), (0.04, False)])
def test_sign_fires_where_the_detector_alone_would_flag_at_the_requested_rate(rate, fires):
    [sign] = wording.signs(flagged(surprise={"lof:features": -math.log(0.045)}), "Stop", "calibrated", rate)
    assert (sign.fired, sign.places[0][2]) == (fires, fires)


def test_signs_in_paper_mode_go_by_the_thresholds():
    item = flagged(surprise={"lof:norms": 0.1, "disagreement:features": -5.0})
    lof, head = wording.signs(item, "Stop", "paper", 0.01)
    assert (lof.fired, lof.places[0][1]) == (True, "above its threshold")
    assert (head.fired, head.places[0][1]) == (False, "below its threshold")


def test_sign_of_an_unknown_detector_is_told_by_its_name():
    [sign] = wording.signs(flagged(surprise={"shadow:x": 9.0}), "Stop", None, None)
    assert sign.text == "shadow fired"


def test_rival_is_the_backup_else_the_second_choice():
    assert wording.rival_label(flagged(backup_label=5), "backup") == (5, "what the backup says")
    assert wording.rival_label(flagged(backup_label=5), "replacement head")[1] == "what the replacement head says"
    agreeing = flagged(backup_label=3)
    logits = agreeing.activations.logits[0].copy()
    logits[3] = -np.inf
    assert wording.rival_label(agreeing, "backup") == (int(logits.argmax()), "the model's second choice")


@pytest.mark.parametrize(
    ("share", "text"),
    [(None, ""), (0.5, "50 %"), (0.987, "99 %"), (0.9912, "99.1 %"), (0.9996, "over 99.9 %"), (1.0, "over 99.9 %")],
)
def test_percent_is_never_quite_sure(share, text):
    assert wording.percent(share) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "just now"), (60, "1 min ago"), (7200, "2 h ago"), (200_000, "2 days ago")]
)
def test_ago(seconds, text):
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert wording.ago(now - timedelta(seconds=seconds), now) == text


def test_before_and_after_of_a_report_with_parts():
    report = {
        "before": {"a_b": 0.5, "only": 1, "in": {"x": 0.25}},
        "after": {"a_b": 0.25, "in": {"x": 0.25}, "new": True},
    }
    assert wording.before_and_after(report) == [
        ("a b", "0.5", "0.25", "−0.25"),
        ("only", "1", "-", ""),
        ("in / x", "0.25", "0.25", "same"),
        ("new", "-", "yes", ""),
    ]
    assert wording.before_and_after({}) == []


def test_figures_of_a_retraining_are_told_in_words_and_what_nothing_was_held_back_of_is_left_out():
    def measured(hits: int) -> dict[str, object]:
        nothing = {"hits": 0, "of": 0, "rate": None}
        return {
            "other_groups_flagged": nothing,
            "recovered": {"hits": hits, "of": 17, "rate": hits / 17},
            "clean_right": {"hits": 470, "of": 496, "rate": 470 / 496},
        }

    assert wording.before_and_after({"before": measured(12), "after": measured(16)}) == [
        ("clean images answered rightly", "470 of 496 (94.8 %)", "470 of 496 (94.8 %)", "same"),
        ("poisoned inputs whose true label the guard finds", "12 of 17 (70.6 %)", "16 of 17 (94.1 %)", "+23.5 points"),
    ]
    assert wording.before_and_after({"before": measured(16), "after": measured(12)})[1][3] == "−23.5 points"


def test_report_is_told_without_a_word_of_python():
    report = {
        "checks": [
            {"name": "clean accuracy", "passed": True, "text": "clean accuracy is kept.", "before": 0.9, "after": None},
            {"name": "canary", "passed": None, "text": "nothing to measure by.", "before": None, "after": None},
        ],
        "reviewers": {"ada": {"decided": 3, "used": 2}},
        "rows": [{"a_name": [1, 2]}, None],
        "left_out": {},
        "nothing": [],
    }
    told = dict(wording.other_facts(report))
    assert told == {
        "checks": "passed: clean accuracy is kept.; not measured: nothing to measure by.",
        "reviewers / ada / decided": "3",
        "reviewers / ada / used": "2",
        "rows": "a name: 1, 2; -",
        "nothing": "none",
    }
    assert not re.search(r"[{}\[\]']|None|True|False", "".join(told.values()))


@pytest.mark.parametrize(
    ("label", "confidence", "is_poisoned", "said"),
    [
        (5, 0.7, True, ""),
        (5, 0.69, True, "is only 69 % sure"),
        (5, 0.36, False, "is only 36 % sure"),
        (3, 0.99, True, "says what the suspect says"),
        (3, 0.99, False, ""),
        (None, None, False, "has no answer"),
    ],
)
def test_doubt_says_why_a_second_opinion_is_not_taken_unseen(label, confidence, is_poisoned, said):
    assert wording.doubt(flagged(backup_label=label, backup_confidence=confidence), is_poisoned) == said


def test_reasons_may_be_a_line_or_several():
    assert wording.reasons({"reasons": "one"}) == ["one"]
    assert wording.reasons({"reasons": ["one", 2]}) == ["one", "2"]
    assert wording.reasons({}) == []


def pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def test_picture_in_0_to_1_is_shown_as_it_is():
    image = np.array([[[0.0, 0.5], [0.2, 0.4]]], dtype=np.float32)
    assert pixels(picture_of_tensor(image)).tolist() == [[0, 128], [51, 102]]


def test_picture_of_a_normalised_input_is_stretched():
    image = np.array([[[-2.0, 2.0], [0.0, np.nan]]], dtype=np.float32)
    assert pixels(picture_of_tensor(image)).tolist() == [[0, 255], [128, 128]]


def test_picture_with_colour_has_three_channels():
    image = np.zeros((3, 2, 4), dtype=np.float32)
    image[1] = 1
    assert pixels(picture_of_tensor(image)).tolist() == [[[0, 255, 0]] * 4] * 2


def test_large_picture_is_made_smaller():
    assert pixels(picture_of_tensor(np.zeros((1, 2048, 512), dtype=np.float32))).shape == (MAX_SIDE, MAX_SIDE // 4)


@pytest.mark.parametrize("shape", [(2, 2), (0, 2, 2), (1, 0, 2)])
def test_picture_needs_a_tensor(shape):
    with pytest.raises(DataError, match="a picture needs shape"):
        picture_of_tensor(np.zeros(shape, dtype=np.float32))


def test_body_with_16_bits_is_refused():
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((2, 2), dtype=np.uint16)).save(buffer, "PNG")
    with pytest.raises(DataError, match="8 bits"):
        picture_of_body(buffer.getvalue())


def test_heat_is_orange_where_it_is_hot():
    heat = pixels(heat_picture(np.array([[0.0, 1.0]]), 1, 2))
    assert heat[0, 0, 3] == 0
    assert heat[0, -1].tolist() == [255, 122, 0, 190]


class CornerNet(nn.Module):
    """Says 1 if the bottom right corner is bright, else 0."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Conv2d(1, 2, 4, stride=4, bias=False)
        with torch.no_grad():
            self.look.weight.zero_()
            self.look.weight[1] = 1.0
        self.head = nn.Linear(8, 2, bias=False)
        with torch.no_grad():
            self.head.weight.zero_()
            self.head.weight[1, 7] = 1.0  # of the second map, the bottom right
        self.bias = nn.Parameter(torch.tensor([2.0, 0.0]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.look(images)  # (batch, 2, 2, 2)
        return self.head(maps.flatten(1)) + self.bias


def test_occlusion_map_finds_where_the_model_looks():
    image = np.zeros((1, 8, 8), dtype=np.float32)
    image[0, 6:, 6:] = 1.0
    found = occlusion_map(SuspectModel(CornerNet()), image)
    assert (found.label, found.other_label, found.place) == (1, 0, "bottom right")
    assert found.heat[:4, :].max() < 0.05
    assert found.heat[-1, -1] == found.heat.max() > 0.5


def test_occlusion_is_made_once_per_item():
    suspect = SuspectModel(CornerNet())
    occlusion = Occlusion(suspect)
    image = np.ones((1, 8, 8), dtype=np.float32)
    assert occlusion.of(1, image) is occlusion.of(1, image)


def test_occlusion_map_of_a_wide_image_has_fewer_rows():
    class Any2(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)
            self.fc = nn.Linear(4, 2)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.fc(self.conv(images).mean((2, 3)))

    found = occlusion_map(SuspectModel(Any2()), np.ones((1, 6, 24), dtype=np.float32))
    assert found.heat.shape == (4, 14)
