"""What a round learns from: caps, disagreement, and hold-outs that stay where they are."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from retrainer_helpers import Workspace, fit_guard, world

from guard import Activations, Guard, GuardConfig
from guard.errors import ConfigError, DataError
from guard.relabel.items import GoldResult, State
from guard.retrainer.anomalies import recognise
from guard.retrainer.candidate import doubt_poisoned, fit_candidate, try_candidate
from guard.retrainer.lessons import ClassLimits, reviewer_limit, reviewers_needed
from guard.retrainer.material import clean_hold_out, gather, last_words
from guard.retrainer.settings import RetrainerSettings, load_retrainer_settings
from guard.retrainer.traffic import CleanTraffic

FREE = RetrainerSettings(max_reviewer_share=1, max_false_alarms_per_class=1000, max_class_share=1)


@pytest.fixture(scope="module")
def guard():
    return fit_guard()


@pytest.fixture
def workspace():
    return Workspace()


def add_poisoned(workspace, n, *, trigger=0, seed=1, **more):
    activations, labels = world(n, seed, trigger)
    return workspace.add(activations, labels, is_poisoned=True, **more)


def add_false_alarms(workspace, n, *, seed=2, **more):
    activations, labels = world(n, seed)
    return workspace.add(activations, labels, is_poisoned=False, **more)


def gathered(guard, workspace, settings=FREE, **more):
    return gather(guard, workspace.items, workspace.decisions, settings, **more)


# --- the road of one item ---


def test_gather_every_decided_item_is_learned_from_or_held_out(guard, workspace):
    add_poisoned(workspace, 60, group=1)
    add_false_alarms(workspace, 40)
    material = gathered(guard, workspace)
    ids = {*material.training_ids, *material.held_out.item_ids}
    assert ids == {item.id for item in workspace.items}
    assert not {*material.training_ids} & {*material.held_out.item_ids}
    assert material.left_out == {}
    assert material.training.counts == (60 - len(material.held_out.poisoned), 40 - len(material.held_out.false_alarms))
    assert 2 <= len(material.held_out.false_alarms) <= 16  # about a fifth
    assert not material.held_out.other_group.any()  # there is one group only


def test_gather_takes_labels_and_activations_of_the_right_item(guard, workspace):
    add_poisoned(workspace, 10)
    add_false_alarms(workspace, 10)
    material = gathered(guard, workspace)
    for row, item_id in enumerate(material.training_ids):
        item = workspace.items[item_id - 1]
        assert material.training.true_labels[row] == item.decision.true_label
        assert material.training.is_poisoned[row] == item.decision.is_poisoned
        np.testing.assert_array_equal(material.training.activations.features[row], item.input.activations.features[0])


def test_gather_false_alarm_without_a_label_joins_the_class_that_the_suspect_named(guard, workspace):
    activations, _ = world(10, 3)
    workspace.add(activations, [None] * 10, is_poisoned=False)
    material = gathered(guard, workspace)
    wanted = [workspace.items[item_id - 1].input.suspect_label for item_id in material.training_ids]
    np.testing.assert_array_equal(material.training.true_labels, wanted)


def test_gather_poisoned_without_a_label_is_measured_on_and_never_learned_from(guard, workspace):
    activations, _ = world(30, 3, 0)
    workspace.add(activations, [None] * 30, is_poisoned=True)
    material = gathered(guard, workspace)
    assert len(material.training) == 0
    assert (material.held_out.poisoned_labels == -1).all()
    assert material.left_out == {"poisoned, true label unknown": 30 - len(material.held_out.poisoned)}


def test_gather_leaves_out_what_another_network_or_another_width_made(guard, workspace):
    activations, labels = world(4, 3)
    narrow = dataclasses.replace(activations, features=activations.features[:, 1:])
    workspace.add(narrow, labels, is_poisoned=False)
    shallow = Activations(activations.logits, activations.features)
    workspace.add(shallow, labels, is_poisoned=False)
    workspace.digest = "f" * 64
    workspace.add(activations, labels, is_poisoned=False)
    material = gathered(guard, workspace, same_network={"0" * 64})
    assert len(material.training) == 0
    assert material.left_out == {
        "activations do not fit the guard": 8,
        "flagged by a guard of another network": 4,
    }


# --- reviewers ---


def test_gather_leaves_out_items_on_which_reviewers_disagree(guard, workspace):
    ids = add_poisoned(workspace, 20, reviewer="ann")
    for item_id in ids[:5]:
        workspace.say(item_id, "bob", is_poisoned=False, label=0)
    for item_id in ids[5:9]:
        label = workspace.items[item_id - 1].decision.true_label
        workspace.say(item_id, "bob", is_poisoned=True, label=label)
    workspace.say(ids[9], "bob", is_poisoned=True, label=None)  # names no label: no contradiction
    workspace.say(ids[10], "bob", is_poisoned=False, label=0, withdrawn=True)
    material = gathered(guard, workspace)
    assert material.left_out == {"reviewers disagree": 5}
    assert not {*ids[:5]} & {*material.training_ids, *material.held_out.item_ids}
    assert material.agreement == (5, 10)
    assert material.by_reviewer["bob"] == {"decided": 10, "used": 0, "agreed": 5, "shared": 10}


def test_gather_a_superseded_word_of_another_reviewer_still_counts_as_disagreement(guard, workspace):
    """Or a hostile reviewer could overwrite the honest ones."""
    (item,) = add_poisoned(workspace, 1, reviewer="ann")
    later = workspace.say(item, "mallory", is_poisoned=False, label=0)
    workspace.items[0] = dataclasses.replace(workspace.items[0], decision=later)
    assert gathered(guard, workspace).left_out == {"reviewers disagree": 1}
    only_ann = RetrainerSettings(leave_out_reviewers=("mallory",))
    assert gathered(guard, workspace, only_ann).left_out == {"reviewer left out": 1}


def test_gather_leaves_out_reviewers_by_name_and_by_gold(guard, workspace):
    add_poisoned(workspace, 10, reviewer="ann")
    add_poisoned(workspace, 10, reviewer="bob", seed=5)
    add_poisoned(workspace, 10, reviewer="eve", seed=6)
    settings = FREE.model_copy(update={"leave_out_reviewers": ("bob",)})
    gold = {"ann": GoldResult(5, 5), "eve": GoldResult(3, 5), "bob": GoldResult(0, 0)}
    material = gathered(guard, workspace, settings, gold=gold)
    assert material.left_out == {"reviewer left out": 20}
    assert {workspace.items[item_id - 1].decision.reviewer for item_id in material.training_ids} == {"ann"}
    few = {"eve": GoldResult(0, 4)}  # too few to judge by
    assert gathered(guard, workspace, settings, gold=few).left_out == {"reviewer left out": 10}


def test_gather_one_reviewer_who_floods_gets_no_more_than_the_share(guard, workspace):
    add_poisoned(workspace, 300, reviewer="mallory")
    add_poisoned(workspace, 40, reviewer="ann", seed=5)
    add_poisoned(workspace, 20, reviewer="bob", seed=6)
    material = gathered(
        guard, workspace, RetrainerSettings(max_reviewer_share=0.5, reviewer_allowance=0, max_class_share=1)
    )
    used = {name: row["used"] for name, row in material.by_reviewer.items()}
    assert used["mallory"] == used["ann"] + used["bob"]
    assert material.left_out["over the cap of one reviewer"] > 150


@pytest.mark.parametrize(
    ("counts", "share", "allowance", "limit"),
    [
        ({"ann": 90}, 0.5, 0, 90),  # nobody to hold against
        ({"ann": 90, "bob": 10}, 0.5, 0, 10),
        ({"ann": 90, "bob": 10}, 0.5, 50, 50),
        ({"ann": 90, "bob": 10}, 0.9, 0, 90),
        ({"ann": 90, "bob": 10, "cy": 20}, 0.5, 0, 30),
        ({"ann": 90, "bob": 10}, 0.3, 0, 0),  # two cannot both be below a third
        ({}, 0.5, 0, 0),
    ],
)
def test_reviewer_limit_values(counts, share, allowance, limit):
    settings = RetrainerSettings(max_reviewer_share=share, reviewer_allowance=allowance)
    assert reviewer_limit(counts, settings) == limit


def test_gather_more_new_items_than_the_cap_wait_and_old_ones_stay(guard, workspace):
    old = add_poisoned(workspace, 30, state=State.TRAINED)
    add_poisoned(workspace, 100, seed=5)
    material = gathered(guard, workspace, FREE.model_copy(update={"max_new_per_round": 25}))
    assert {*old} <= {*material.training_ids}
    assert len(material.training) == 30 + 25
    assert (
        material.waiting == material.left_out["wait for the next round"] == 100 - 25 - len(material.held_out.item_ids)
    )


def test_last_words_are_the_last_of_each_reviewer(workspace):
    workspace.say(1, "ann", is_poisoned=True, label=2)
    second = workspace.say(1, "ann", is_poisoned=False, label=3)
    bobs = workspace.say(1, "bob", is_poisoned=True, label=2)
    workspace.say(1, "bob", is_poisoned=False, label=2, withdrawn=True)
    assert last_words(reversed(workspace.decisions)) == {1: {"ann": second, "bob": bobs}}


# --- hold-outs ---


def test_clean_hold_out_is_the_same_share_of_every_class_and_never_moves(guard):
    held = clean_hold_out(guard, 0.2)
    labels = guard.reference_labels
    for label in range(5):
        assert held[labels == label].sum() == round(0.2 * (labels == label).sum())
    np.testing.assert_array_equal(held, clean_hold_out(guard, 0.2))
    assert (clean_hold_out(guard, 0.3) | ~held).all()  # a larger one holds the smaller


def test_clean_hold_out_keeps_copies_together_and_counts_them_once():
    activations, labels = world(200, seed=0)
    rows = np.r_[:200, :60, :20]  # some images twice, some three times
    config = GuardConfig(false_positive_rate=0.05, folds=2, n_neighbors=10)
    guard = Guard.fit_activations(activations[rows], labels[rows], config)
    held = clean_hold_out(guard, 0.2)
    np.testing.assert_array_equal(held, held[:200][rows])
    assert guard.is_distinct.sum() == 200
    counts = np.bincount(labels)
    np.testing.assert_array_equal(np.bincount(labels[held[:200]], minlength=5), np.round(0.2 * counts))


def test_candidate_of_a_reference_with_copies_is_measured_on_distinct_images_and_loads(tmp_path):
    activations, labels = world(200, seed=0)
    rows = np.r_[:200, :200]
    config = GuardConfig(false_positive_rate=0.05, folds=2, n_neighbors=10)
    guard, settings = Guard.fit_activations(activations[rows], labels[rows], config), RetrainerSettings()
    material = gather(guard, [], [], settings)
    pair = fit_candidate(guard, material)
    held = int(clean_hold_out(guard, 0.2)[:200].sum())
    assert len(Guard.load(pair.candidate.save(tmp_path)).clean_scores) == 200 - held
    assert try_candidate(guard, pair, material, [], settings).after.clean_right.shape == (held,)


def test_clean_hold_out_of_too_small_a_reference_is_refused():
    small = fit_guard(20)
    with pytest.raises(DataError, match=r"^holdout_share=0\.05 holds out none of 20 clean images\. Raise it"):
        clean_hold_out(small, 0.05)


def test_held_out_items_stay_held_out_when_more_come(guard, workspace):
    add_poisoned(workspace, 40)
    add_false_alarms(workspace, 40)
    first = {*gathered(guard, workspace).held_out.item_ids}
    add_poisoned(workspace, 40, seed=7)
    add_false_alarms(workspace, 40, seed=8)
    assert first == {item_id for item_id in gathered(guard, workspace).held_out.item_ids if item_id <= 80}


def test_held_out_groups_are_whole_where_there_are_several(guard, workspace):
    groups = {}
    for trigger in range(4):
        groups[trigger] = add_poisoned(workspace, 15, trigger=trigger, group=trigger, seed=trigger)
    material = gathered(guard, workspace)
    held = {*material.held_out.item_ids}
    poisoned = [item_id for item_id in material.held_out.item_ids if workspace.items[item_id - 1].decision.is_poisoned]
    whole = [ids for ids in groups.values() if {*ids} <= held]
    assert 1 <= len(whole) < 4
    other = {item_id for item_id, is_other in zip(poisoned, material.held_out.other_group, strict=True) if is_other}
    assert other == {item_id for ids in whole for item_id in ids}


def test_a_group_that_was_learned_from_is_not_held_out_and_a_locked_one_is_not_learned_from(guard, workspace):
    trained = add_poisoned(workspace, 10, trigger=0, group=0, state=State.TRAINED)
    locked = add_poisoned(workspace, 10, trigger=1, group=1, seed=4)
    for number in range(2, 6):
        add_poisoned(workspace, 5, trigger=2, group=number, seed=number)
    material = gathered(guard, workspace, locked=set(locked))
    assert {*trained} <= {*material.training_ids}
    assert {*locked} <= {*material.held_out.item_ids}
    # Clustered anew, the locked ones look like what is learned from: still held out, no longer of another group.
    for item_id in locked:
        workspace.items[item_id - 1] = dataclasses.replace(workspace.items[item_id - 1], group=0)
    again = gathered(guard, workspace, locked=set(locked))
    assert {*locked} <= {*again.held_out.item_ids}
    rows = [entry for entry in again.held_out.item_ids if workspace.items[entry - 1].decision.is_poisoned]
    assert not any(
        is_other for entry, is_other in zip(rows, again.held_out.other_group, strict=True) if entry in locked
    )


def test_a_group_that_is_most_of_what_was_decided_is_never_held_out_whole(guard, workspace):
    """On GTSRB Blend 151 of 155 were: the round learned from the other four, and made the guard worse."""
    large = add_poisoned(workspace, 60, trigger=0, group=1)
    small = add_poisoned(workspace, 4, trigger=1, group=2, seed=4)
    for locked in ((), large[:1]):
        material = gathered(guard, workspace, locked=locked)
        assert len({*material.training_ids} & {*large}) > 30
        assert {*small} <= {*material.held_out.item_ids}


# --- audits ---


def test_gather_clean_audits_are_measured_on_and_teach_nothing(guard, workspace):
    flagged = add_false_alarms(workspace, 20)
    audits = add_false_alarms(workspace, 30, seed=3, audit_probability=0.05)
    material = gathered(guard, workspace)
    assert not {*material.training_ids} & {*audits}
    assert {*material.training_ids} & {*flagged}
    assert material.left_out["clean audits, which are only measured on"] > 15
    assert len(material.held_out.clean_audits) == 30
    np.testing.assert_array_equal(material.held_out.clean_audit_weights, np.full(30, 20.0))
    assert len(material.held_out.false_alarms) + len(material.training_ids) == 20


def test_gather_missed_inputs_are_learned_from_first_and_a_share_is_held_out(guard, workspace):
    add_poisoned(workspace, 60)
    missed = add_poisoned(workspace, 40, seed=5, audit_probability=0.1)
    material = gathered(guard, workspace, RetrainerSettings())
    held = {*material.held_out.item_ids} & {*missed}
    assert 0 < len(held) == material.held_out.is_miss.sum() < 20
    assert {*material.training_ids} <= {*missed} - held  # the cap of a class leaves room for no other
    np.testing.assert_array_equal(material.held_out.poisoned_weights, np.where(material.held_out.is_miss, 10.0, 1.0))
    assert {*missed} - held <= {*material.poisoned_ids}


def test_clean_traffic_leaves_out_what_one_reviewer_alone_calls_clean_and_looks_like_the_attack(guard, workspace):
    add_poisoned(workspace, 60)
    honest = add_false_alarms(workspace, 60, seed=3, audit_probability=0.05)
    activations, _ = world(20, 9, 0)
    lies = workspace.add(activations, activations.predicted_labels, is_poisoned=False, audit_probability=0.05)
    clean = CleanTraffic.of(guard, gathered(guard, workspace), FREE)
    assert clean.n_disputed >= 12
    assert clean.n_audits == len(clean.weights) >= len(honest)
    for item_id in lies:
        workspace.say(item_id, "bob", is_poisoned=False, label=None)
    assert CleanTraffic.of(guard, gathered(guard, workspace), FREE).n_audits >= len(honest) + len(lies) - 5
    few = RetrainerSettings(min_anomalies=1000)
    assert CleanTraffic.of(guard, gathered(guard, workspace), few).n_disputed == 0


def test_gather_caps_hold_for_answers_about_audits(guard, workspace):
    """A reviewer who calls everything that passes poisoned gives no more than any other."""
    settings = RetrainerSettings(reviewer_allowance=5, max_class_share=1)
    add_poisoned(workspace, 40, reviewer="ann")
    lies = add_poisoned(workspace, 200, seed=6, reviewer="mallory", audit_probability=0.1)
    used = {*gathered(guard, workspace, settings).training_ids}
    assert len(used & {*lies}) <= len(used) / 2
    capped = gathered(guard, workspace, RetrainerSettings(max_class_share=0.02))
    labels = Counter(workspace.items[entry - 1].decision.true_label for entry in capped.training_ids)
    assert max(labels.values()) <= 0.02 * np.bincount(guard.reference_labels).max() + 1e-9
    without = gathered(guard, workspace, gold={"mallory": GoldResult(right=1, answered=6)})
    assert not {*without.training_ids, *without.held_out.item_ids} & {*lies}


def test_hold_out_cannot_be_foreseen_without_the_reference(workspace):
    """A reviewer who knew which answers are measured could lie in the others."""
    add_poisoned(workspace, 60)
    entry, other = (gathered(fit_guard(100, seed), workspace).held_out.item_ids for seed in (0, 1))
    assert entry != other


# --- settings ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"holdout_share": 0}, r"^holdout_share: input should be greater than 0, got 0\.$"),
        ({"holdout_share": 0.6}, r"^holdout_share: input should be less than or equal to 0\.5, got 0\.6\.$"),
        ({"max_reviewer_share": 1.5}, r"^max_reviewer_share: input should be less than or equal to 1, got 1\.5\.$"),
        ({"enough_decisions": -1}, r"^enough_decisions: input should be greater than or equal to 0, got -1\.$"),
        ({"every_hours": float("nan")}, r"^every_hours: input should be .*, got nan\.$"),
        ({"hold_out_share": 0.1}, r"^unknown retrainer setting 'hold_out_share'\. Did you mean 'holdout_share'\?$"),
        ({"xyz": 1}, r"^unknown retrainer setting 'xyz'\. Known are canary_hours, "),
    ],
)
def test_settings_that_break_a_rule_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        RetrainerSettings(**values)


def test_settings_flags_win_over_the_file(tmp_path):
    file = tmp_path / "retrainer.toml"
    file.write_text("enough_decisions = 7\nleave_out_reviewers = ['eve']\n")
    settings = load_retrainer_settings(file, enough_decisions=9, canary_inputs=None)
    assert (settings.enough_decisions, settings.leave_out_reviewers) == (9, ("eve",))
    file.write_text("enough = ")
    with pytest.raises(ConfigError, match=r"^settings file .* cannot be read: .*Is it TOML\?$"):
        load_retrainer_settings(file)
    with pytest.raises(ConfigError, match=r"cannot be read: .*No such file"):
        load_retrainer_settings(tmp_path / "none.toml")


# --- caps on what answers may change ---


def small(*sizes):
    """A guard's reference with so many clean images per class; nothing else of it is read."""
    return SimpleNamespace(reference_labels=np.repeat(np.arange(len(sizes)), sizes))


@pytest.mark.parametrize(
    ("settings", "n_reviewers", "limits", "of_one"),
    [
        ({}, 1, [(10, 0), (2, 0), (0, 0)], [(10, 0), (2, 0), (0, 0)]),  # 2 % of 500, 100 and 49; no false alarm
        ({}, 2, [(10, 0), (2, 0), (0, 0)], [(5, 0), (1, 0), (0, 0)]),
        ({"max_reviewer_share": 0.3}, 2, [(10, 0), (2, 0), (0, 0)], [(3, 0), (1, 0), (0, 0)]),
        ({"max_class_share": 0.1}, 1, [(50, 0), (10, 0), (4, 0)], [(50, 0), (10, 0), (4, 0)]),
        ({"max_false_alarms_per_class": 3}, 2, [(10, 3), (2, 3), (0, 3)], [(5, 2), (1, 2), (0, 2)]),
    ],
)
def test_class_limits_values(settings, n_reviewers, limits, of_one):
    """Poisoned inputs and false alarms, per class; of all reviewers, and of one."""
    caps = ClassLimits(small(500, 100, 49), RetrainerSettings(**settings), n_reviewers)
    kinds = (True, False)
    assert [tuple(caps.of_class(label, is_poisoned=kind) for kind in kinds) for label in range(3)] == limits
    assert [tuple(caps.of_reviewer(label, is_poisoned=kind) for kind in kinds) for label in range(3)] == of_one


@pytest.mark.parametrize(
    ("able", "settings", "needed"),
    [
        ([], {}, 1),
        (["ann"], {}, 1),
        (["ann", "bob"], {}, 2),
        (["ann", "bob", "cy"], {}, 2),
        (["ann", "bob"], {"leave_out_reviewers": ("bob",)}, 1),
        (["ann", "bob"], {"min_reviewers": 1}, 1),
        (["ann"], {"min_reviewers": 3}, 3),
    ],
)
def test_reviewers_needed_values(able, settings, needed):
    assert reviewers_needed(able, RetrainerSettings(**settings)) == needed


def test_gather_learns_from_no_false_alarm_by_default(guard, workspace):
    add_false_alarms(workspace, 40)
    material = gathered(guard, workspace, RetrainerSettings())
    assert len(material.training) == 0
    assert len(material.held_out.not_learned) == 40
    assert material.left_out == {"false alarms, which are only measured on": 40 - len(material.held_out.false_alarms)}


def test_gather_false_alarm_waits_for_a_second_reviewer(guard, workspace):
    ids = add_false_alarms(workspace, 40)
    for item_id in ids[:20]:
        workspace.say(item_id, "bob", is_poisoned=False, label=workspace.items[item_id - 1].decision.true_label)
    material = gathered(guard, workspace, needed=2)
    held = {*material.held_out.item_ids}
    assert {*material.training_ids} == {*ids[:20]} - held
    assert material.left_out == {"false alarms without a second reviewer": len({*ids[20:]} - held)}
    assert len(material.held_out.not_learned) == 40 - len(material.training)
    assert len(gathered(guard, workspace).training) == 40 - len(held)


def test_gather_caps_of_a_class_hold_over_all_rounds_and_keep_what_was_learned(guard, workspace):
    settings = RetrainerSettings(max_class_share=0.05, max_false_alarms_per_class=2)
    first = add_poisoned(workspace, 100, state=State.TRAINED) + add_false_alarms(workspace, 60)
    kept = gathered(guard, workspace, settings).training_ids
    sizes = np.bincount(guard.reference_labels)
    limits = Counter({(label, True): int(0.05 * sizes[label]) for label in range(1, 5)})
    limits.update({(label, False): 2 for label in range(5)})

    def per_class(ids):
        decisions = [workspace.items[item_id - 1].decision for item_id in ids]
        return Counter((item_id.true_label, item_id.is_poisoned) for item_id in decisions)

    assert per_class(kept) == limits
    for row in range(len(first)):  # all of a next round
        if row + 1 in kept:
            workspace.items[row] = dataclasses.replace(workspace.items[row], state=State.TRAINED)
    add_poisoned(workspace, 100, seed=11)
    add_false_alarms(workspace, 60, seed=12)
    assert gathered(guard, workspace, settings).training_ids == kept


def test_gather_poisoned_with_the_networks_own_answer_teaches_no_head(guard, workspace):
    activations, _ = world(20, 3, 0)
    ids = workspace.add(activations, activations.predicted_labels, is_poisoned=True)
    material = gathered(guard, workspace)
    n = len({*ids} - {*material.held_out.item_ids})
    assert len(material.training) == 0
    assert len(material.poisoned) == n  # a demarcation learns no label
    assert material.left_out == {"poisoned, true label is the network's answer": n}


def test_gather_poisoned_over_the_cap_of_a_class_still_joins_the_anomalies(guard, workspace):
    add_poisoned(workspace, 60)
    material = gathered(guard, workspace, RetrainerSettings(max_class_share=0))
    assert len(material.training) == 0
    assert (
        len(material.poisoned) == material.left_out["over the cap of one class"] == 60 - len(material.held_out.poisoned)
    )


def test_recognise_knows_a_trigger_and_not_odd_clean_inputs(guard):
    triggered, _ = world(40, 3, 1, 8.0)
    clean, _ = world(2000, 4)
    odd = clean[np.argsort(guard.scores(clean).p_values, kind="stable")[:40]]
    assert recognise(guard, triggered).mean() > 0.9
    assert recognise(guard, odd).mean() < 0.5
    mixed = recognise(guard, Activations.concatenate([triggered, odd]))
    assert mixed[:40].mean() > 0.9
    assert not recognise(guard, triggered[:4]).any()  # too few to draw a line with some of them left out


def test_doubt_poisoned_takes_all_out_where_most_are_unlike_the_others(guard, workspace):
    activations, labels = world(40, 1, 1, 6.0)
    workspace.add(activations, labels, is_poisoned=True)
    settings = RetrainerSettings(holdout_share=0.2, max_class_share=1)
    material = gathered(guard, workspace, settings)
    kept = doubt_poisoned(guard, material, settings)
    assert len(kept.poisoned) > 0.5 * len(material.poisoned)
    assert {*kept.training_ids} <= {*kept.poisoned_ids}
    n = len(material.poisoned)
    demanding = settings.model_copy(update={"min_anomalies": n + 1})
    nothing = doubt_poisoned(guard, material, demanding)
    assert len(nothing.poisoned) == len(nothing.training) == 0
    assert nothing.left_out["poisoned, unlike the others called so"] == n


def test_settings_are_all_in_the_documentation():
    text = (Path(__file__).parents[1] / "docs" / "retraining.md").read_text()
    assert [name for name in RetrainerSettings.model_fields if f"`{name}`" not in text] == []
