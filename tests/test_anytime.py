"""Verdicts at several depths: heads trained together, each depth with its own calibration, as deep as time allows."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from serving_helpers import Workshop, png

from guard import Guard, GuardConfig, SuspectModel
from guard.detection.heads.anytime import AnytimeHeads
from guard.errors import ConfigError, DataError, NotFittedError
from guard.serving.time_budget import TimeBudget, allowed_milliseconds
from guard.statistics.class_ranks import ClassRanks

N = 240


@pytest.fixture(scope="module")
def features():
    """Features at three depths, each telling the classes a little better; labels (n,) of three classes."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, N)
    centres = rng.normal(size=(3, 6))
    return [(centres[labels] + rng.normal(size=(N, 6)) * noise).astype(np.float32) for noise in (3.0, 1.5, 0.7)], labels


# --- the heads


@pytest.mark.parametrize("weighting", ["adaptive", "constant", "linear"])
def test_heads_learn_and_deeper_ones_know_more(features, weighting):
    inputs, labels = features
    heads = AnytimeHeads(width=16, weighting=weighting, epochs=60, batch_size=48, learning_rate=1e-2).fit(
        inputs, labels, 3
    )
    right = [float((logits.argmax(1) == labels).mean()) for logits in heads.answers(inputs)]
    assert right[0] > 0.4
    assert right[2] > 0.9
    assert right[2] > right[0]


def test_weights_are_inverse_to_each_losss_running_mean():
    means = torch.tensor([2.0, 1.0, 0.5])
    torch.testing.assert_close(AnytimeHeads()._weights(means), torch.tensor([0.25, 0.5, 1.0]) * 3 / 1.75)
    torch.testing.assert_close(AnytimeHeads(weighting="linear")._weights(means), torch.tensor([0.5, 1.0, 1.5]))
    torch.testing.assert_close(AnytimeHeads(weighting="constant")._weights(means), torch.ones(3))


def test_first_heads_need_the_first_depths_only(features):
    inputs, labels = features
    heads = AnytimeHeads(width=8, epochs=2).fit(inputs, labels, 3)
    everything = list(heads.answers(inputs))
    for n_depths in (1, 2, 3):
        np.testing.assert_array_equal(heads.logits(inputs[:n_depths]), everything[n_depths - 1])


def test_standardisation_is_folded_in_and_heads_repeat_with_their_seed(features):
    inputs, labels = features
    moved = [item * 100 + 7 for item in inputs]
    item, other = (AnytimeHeads(width=8, epochs=3, seed=1).fit(given, labels, 3) for given in (inputs, moved))
    np.testing.assert_allclose(item.logits(inputs), other.logits(moved), rtol=1e-2, atol=1e-2)
    again = AnytimeHeads.from_state(item.state())
    np.testing.assert_array_equal(item.logits(inputs), again.logits(inputs))
    assert any((a != b).any() for a, b in zip(item.state().values(), other.state().values(), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weighting": "quadratic"}, "weighting must be one of adaptive"),
        ({"features": []}, "must be one or more"),
        ({"features": [np.zeros((3, 2), dtype=np.float32)]}, "of the length of the labels"),
        ({"features": [np.full((N, 2), np.nan, dtype=np.float32)]}, "must be finite"),
        ({"n_classes": 2}, r"labels must be in \[0, 2\)"),
    ],
)
def test_heads_refuse_what_breaks_a_rule(features, changes, message):
    given = {"features": features[0], "weighting": "adaptive", "n_classes": 3} | changes
    with pytest.raises(DataError, match=message):
        AnytimeHeads(weighting=given["weighting"]).fit(given["features"], features[1], given["n_classes"])


def test_heads_refuse_other_widths_and_being_asked_before_fit(features):
    inputs, labels = features
    with pytest.raises(NotFittedError):
        AnytimeHeads().logits(inputs)
    heads = AnytimeHeads(width=8, epochs=1).fit(inputs[:1], labels, 3)
    with pytest.raises(DataError, match="there are 1 heads"):
        heads.logits(inputs)
    with pytest.raises(DataError, match="have 2 columns, fit saw 6"):
        heads.logits([inputs[0][:, :2]])


# --- in the guard


@pytest.fixture(scope="module")
def anytime(suspect, clean_split):
    config = GuardConfig(false_positive_rate=0.05, anytime=True, folds=3)
    return Guard.fit(suspect, *clean_split.validation, config)


def test_every_depth_keeps_the_false_positive_rate(anytime, clean_activations, triggered_activations):
    assert [entry.depth for entry in anytime.early] == list(anytime.reference.depths)
    caught = []
    for entry in anytime.early:
        early = anytime.at_depth(entry.depth)
        assert 0.03 <= entry.realised_false_positive_rate <= 0.07
        assert 0.02 <= early.scores(clean_activations).is_poisoned.mean() <= 0.085
        caught.append(early.scores(triggered_activations).is_poisoned.mean())
    caught.append(anytime.scores(triggered_activations).is_poisoned.mean())
    assert caught[-1] > 0.9


def test_early_verdict_looks_at_the_first_depths_only_and_says_so(anytime, clean_activations):
    first, second = list(anytime.reference.depths)[:2]
    early = anytime.at_depth(first)
    kinds = ("lof", "residual", "relative_distance")
    assert set(early.ensemble.names) == {*(f"{kind}:{first}" for kind in kinds), "anytime"}
    assert f"lof:{second}" in anytime.at_depth(second).ensemble.names
    blind = clean_activations[:20]
    hidden = {name: array if name == first else array * np.nan for name, array in blind.depths.items()}
    blind = type(blind)(blind.logits, blind.features * np.nan, hidden)
    verdicts = early.decide(blind)
    assert verdicts == early.decide(clean_activations[:20])
    assert {verdict.depth for verdict in verdicts} == {first}
    assert {verdict.depth for verdict in anytime.decide(clean_activations[:2])} == {""}


def test_early_verdict_keeps_the_rate_in_classes_by_its_own_scores(anytime, clean_activations, tmp_path):
    guard = Guard.load(anytime.with_config(false_positive_rate_scope="class").save(tmp_path))
    for entry in guard.early:
        early = guard.at_depth(entry.depth)
        ranks = ClassRanks.among(entry.clean_scores, entry.clean_answers, guard.class_ranks.groups)
        scores = early.scores(clean_activations)
        expected = ranks.p_values(scores.combined, clean_activations.predicted_labels)
        np.testing.assert_array_equal(scores.p_values, expected)
        assert 0.02 <= scores.is_poisoned.mean() <= 0.085


def test_early_verdict_relabels_with_the_same_second_opinion(anytime, triggered_activations):
    early = anytime.at_depth(anytime.early[0].depth).with_config(action="relabel", false_positive_rate=0.5)
    expected = anytime.ensemble.replacement_logits(triggered_activations[:50]).argmax(axis=1)
    verdicts = early.decide(triggered_activations[:50])
    assert any(verdict.is_poisoned for verdict in verdicts)
    for verdict, label in zip(verdicts, expected, strict=True):
        assert verdict.final_label == (label if verdict.is_poisoned else verdict.label)


def test_early_verdicts_live_in_the_bundle(anytime, suspect, clean_activations, tmp_path):
    folder = anytime.save(tmp_path)
    again = Guard.load(folder, SuspectModel(suspect.module))
    for early in anytime.early:
        assert again.at_depth(early.depth).decide(clean_activations[:30]) == anytime.at_depth(early.depth).decide(
            clean_activations[:30]
        )
    assert Guard.load(folder).save(tmp_path / "again").name == folder.name
    with pytest.raises(DataError, match="Save the one that it came from"):
        anytime.at_depth(anytime.early[0].depth).save(tmp_path)


def test_budget_without_early_verdicts_and_anytime_in_paper_mode_are_refused(fitted_guard, anytime, clean_split):
    with pytest.raises(ConfigError, match="need verdicts at several depths"):
        fitted_guard.with_config(max_guard_ms=2)
    with pytest.raises(ConfigError, match="max_guard_ms"):
        anytime.with_config(max_guard_ms=0)
    with pytest.raises(ConfigError, match="no verdict at depth 'nowhere'"):
        anytime.at_depth("nowhere")
    with pytest.raises(ConfigError, match="no verdict at depth 'nowhere': known are"):
        anytime.with_config(max_guard_ms=2, min_depth="nowhere")
    with pytest.raises(ConfigError, match="no verdict at depth 'fc': known are none"):
        fitted_guard.with_config(min_depth="fc")
    with pytest.raises(ConfigError, match="anytime goes with mode 'calibrated'"):
        Guard.fit_activations(anytime.reference, clean_split.validation.labels, GuardConfig(mode="paper", anytime=True))


# --- in time


class SlowClock:
    """Each call comes a whole millisecond after the one before, so that every measured verdict takes that long."""

    now = 0.0

    def __call__(self):
        self.now += 0.001
        return self.now


def test_pace_takes_the_deepest_verdict_that_fits(anytime):
    budget = TimeBudget(anytime, clock=SlowClock())
    depths = [early.depth for early in anytime.early]
    for place, depth in enumerate([*depths, ""]):
        budget._costs[depth] = [0.001 * (place + 1), 0.001 * (place + 1) + 0.031]  # and 1 ms per further row
    guard = anytime.with_config(min_depth=depths[0])
    assert budget.deepest_within(0.1, guard, 1)[0].depth == depths[0]  # none fits: the quickest
    assert budget.deepest_within(2.5, guard, 1)[0].depth == depths[1]
    assert budget.deepest_within(2.5, guard, 2)[0].depth == depths[0]
    assert budget.deepest_within(100, guard, 1)[0] is guard
    budget.took(guard, 1, 0.4)  # a hundred times as long as measured
    assert budget.slowness > 5
    assert budget.deepest_within(10, guard, 1)[0].depth == depths[0]
    for _ in range(200):
        budget.took(guard, 1, 0.004)
    assert budget.deepest_within(10, guard, 1)[0] is guard


def test_flood_pushes_no_verdict_below_the_floor(anytime):
    budget = TimeBudget(anytime, clock=SlowClock())
    depths = [early.depth for early in anytime.early]
    for place, depth in enumerate([*depths, ""]):
        budget._costs[depth] = [0.001 * (place + 1)] * 2
    for min_depth, floor in ((None, depths[-1]), *((depth, depth) for depth in depths)):
        guard = anytime.with_config(min_depth=min_depth, max_guard_ms=10)
        budget.slowness = 1.0
        assert budget.deepest_within(10, guard, 1) == (guard, False)
        assert budget.deepest_within(1e-6, guard, 1)[0].depth == floor  # a client's own wish
        assert not budget.deepest_within(1e-6, guard, 1)[1]
        for _ in range(100):
            budget.took(guard, 1, 10.0)
        assert budget.slowness == 20.0
        chosen, is_late = budget.deepest_within(10, guard, 1)
        assert (chosen.depth, is_late) == (floor, True)
        unlimited = anytime.with_config(min_depth=min_depth, deadline_header="Guard-Max-Ms")
        assert budget.deepest_within(1e-6, unlimited, 1)[1] is False


def test_guard_measured_during_a_flood_looks_deep_again_after_it(anytime):
    budget = TimeBudget(anytime, clock=SlowClock())
    depths = [early.depth for early in anytime.early]
    for place, depth in enumerate([*depths, ""]):
        budget._costs[depth] = [0.015 * (place + 1)] * 2  # fifteen times what it takes in quiet
    guard = anytime.with_config(max_guard_ms=5)
    chosen, is_late = budget.deepest_within(5, guard, 1)
    assert (chosen.depth, is_late) == (depths[-1], True)
    for _ in range(100):
        budget.took(chosen, 1, 0.001 * len(depths))
    assert budget.deepest_within(5, guard, 1) == (guard, False)


def test_pace_measures_every_depth_and_keeps_no_guard_alive(anytime):
    clock, guard = SlowClock(), replace(anytime)
    budget = TimeBudget(guard, clock=clock)
    assert clock.now == pytest.approx(0.001 * 2 * 5 * 2 * (len(anytime.early) + 1))
    assert budget.deepest_within(1.5, guard, 1)[0] is guard
    assert budget.deepest_within(0.5, guard, 1)[0].depth == anytime.early[-1].depth
    watched = weakref.ref(guard)
    del guard
    gc.collect()
    assert watched() is None


@pytest.mark.parametrize(
    ("deadlines", "header_alone", "with_setting"),
    [
        (["7.5"], 7.5, 5.0),
        (["3"], 3.0, 3.0),
        (["3", "7.5"], 7.5, 5.0),  # nobody's verdict is weaker than its own sender asked for
        (["3", None], None, 5.0),
        ([None, "0.001", "0.001"], None, 5.0),
        (["3", "soon"], None, 5.0),
        (["3", "-1"], None, 5.0),
        (["0", "nan", "inf", "1e-400", ""], None, 5.0),
        ([None], None, 5.0),
    ],
)
def test_deadline_never_shortens_the_time_of_another_request(anytime, deadlines, header_alone, with_setting):
    headers = [{} if text is None else {"guard-max-ms": text, "x": "0.1"} for text in deadlines]
    assert allowed_milliseconds(anytime, headers) is None  # no header is listened to unless settings name it
    listening = anytime.with_config(deadline_header="Guard-Max-Ms")
    assert allowed_milliseconds(listening, headers) == header_alone
    assert allowed_milliseconds(listening.with_config(max_guard_ms=5.0), headers) == with_setting


def test_served_answers_say_how_deep_the_guard_looked(anytime, badnet, clean_split, triggered, tmp_path):
    shop = Workshop(anytime, badnet, tmp_path)
    try:
        body, bad = png(clean_split.test.images[0]), png(triggered.images[0])
        shallowest, floor = anytime.early[0].depth, anytime.early[-1].depth
        assert shallowest != floor
        hurried = shop.guarded(max_guard_ms=1e-6, min_depth=shallowest)
        assert [answer.headers.get("Guard-Depth") for answer in hurried.ask(body, bad)] == [shallowest] * 2
        held = shop.guarded(max_guard_ms=1e-6)
        assert [answer.headers.get("Guard-Depth") for answer in held.ask(body, bad)] == [floor] * 2
        counted, model = held.counts(), held.context.model_name
        assert counted[f"guard_shallow_total{{{model}}}"] == counted[f"guard_depth_floor_total{{{model}}}"] == 2
        relaxed = shop.guarded(max_guard_ms=1e6)
        assert "Guard-Depth" not in relaxed.ask(body)[0].headers
        counted, model = relaxed.counts(), relaxed.context.model_name
        assert counted[f"guard_shallow_total{{{model}}}"] == counted[f"guard_depth_floor_total{{{model}}}"] == 0
        requested = shop.guarded(deadline_header="Guard-Max-Ms")
        assert "Guard-Depth" not in requested.ask(body)[0].headers
        hurry = {"Guard-Max-Ms": "0.000001"}
        assert requested.ask(body, headers=[hurry])[0].headers["Guard-Depth"] == floor
        together = requested.ask(body, bad, headers=[hurry, {}])
        assert ["Guard-Depth" in answer.headers for answer in together] == [False, False]
        counted, model = requested.counts(), requested.context.model_name
        assert counted[f"guard_shallow_total{{{model}}}"] == 1
        assert counted[f"guard_depth_floor_total{{{model}}}"] == 0
        deaf = shop.guarded()
        assert "Guard-Depth" not in deaf.ask(body, headers=[hurry])[0].headers
    finally:
        shop.close()
