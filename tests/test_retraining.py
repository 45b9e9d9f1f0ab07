"""A guard that learns from what a person said of the inputs it flagged."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import numpy as np
import pytest

from guard import Activations, Guard, GuardConfig
from guard.detection.detectors.base import WHAT_IS_CLEAN, WHAT_IS_WHAT, Source
from guard.detection.ensemble import Ensemble, Member
from guard.detection.kept_reference import kept_reference
from guard.detection.retraining import Labelled, retrain
from guard.errors import BundleError, DataError
from guard.statistics.evaluation import attack_success_rate, auroc, recovery_accuracy
from guard.storage.bundle import read_bundle, write_bundle

RATE = 0.01
#: The first images of the test set are the traffic that a person has seen; the others are held out.
SEEN = 300


@pytest.fixture(scope="module")
def guard(fitted_guard):
    """At a rate at which it misses a part of the attack."""
    return fitted_guard.with_config(false_positive_rate=RATE)


@pytest.fixture(scope="module")
def traffic(clean_activations, triggered_activations, clean_split, triggered):
    """Clean and triggered inputs of the seen images, all labelled truly."""
    seen = triggered.source_rows < SEEN
    return Labelled(
        Activations.concatenate([clean_activations[:SEEN], triggered_activations[seen]]),
        np.concatenate([clean_split.test.labels[:SEEN], triggered.true_labels[seen]]),
        np.repeat([False, True], [SEEN, int(seen.sum())]),
    )


@pytest.fixture(scope="module")
def some(traffic):
    """A few of them, 40 clean and 30 triggered ones."""
    return traffic[np.r_[0:40, SEEN : SEEN + 30]]


@pytest.fixture(scope="module")
def reviewed(guard, traffic):
    """What the guard flagged of the traffic, and a person labelled."""
    return traffic[guard.scores(traffic.activations).is_poisoned]


@pytest.fixture(scope="module")
def retrained(guard, reviewed):
    return retrain(guard, reviewed)


@pytest.fixture(scope="module")
def few(fitted_guard, suspect, clean_split):
    """300 clean inputs, as a guard keeps them, and labels, for guards that are fitted again and again."""
    activations = suspect.activations(clean_split.validation.images[:300])
    return kept_reference(activations, np.arange(300)), clean_split.validation.labels[:300]


@pytest.fixture(scope="module", params=["calibrated", "paper"])
def small_guard(request, few):
    return Guard.fit_activations(*few, GuardConfig(false_positive_rate=0.05, folds=2, mode=request.param))


@pytest.fixture(scope="module")
def paper_guard(few):
    return Guard.fit_activations(*few, GuardConfig(false_positive_rate=0.05, folds=2, mode="paper"))


def arrays_of(guard, kind):
    """What the detectors of a kind have learned."""
    return [
        array for member in guard.ensemble.members if member.kind == kind for array in member.detector.state().values()
    ]


def assert_same_arrays(ours, others):
    for array, other in zip(ours, others, strict=True):
        np.testing.assert_array_equal(array, other, strict=True)


# --- what it is for ---


def test_retrain_stops_more_of_the_attack_on_held_out_inputs(guard, retrained, triggered_activations, triggered):
    rest = triggered.source_rows >= SEEN
    activations, labels, true_labels = triggered_activations[rest], triggered.labels[rest], triggered.true_labels[rest]

    def success(fitted):
        flags = fitted.scores(activations).is_poisoned
        return attack_success_rate(activations.predicted_labels, labels, true_labels, flags)

    if success(guard) <= 0.02:
        pytest.skip("the guard stops the attack on the network that this machine trains: there is nothing to win")
    assert success(retrained) < success(guard)


def test_retrain_separates_held_out_inputs_no_worse(
    guard, retrained, clean_activations, triggered_activations, triggered
):
    poisoned = triggered_activations[triggered.source_rows >= SEEN]
    both = Activations.concatenate([clean_activations[SEEN:], poisoned])
    is_poisoned = np.arange(len(both)) >= len(clean_activations) - SEEN
    before = auroc(guard.scores(both).combined, is_poisoned)
    if before > 0.9995:
        pytest.skip("the guard separates the inputs of the network that this machine trains: there is nothing to win")
    standard_error = np.sqrt(before * (1 - before) / is_poisoned.sum())  # at most: Birnbaum's bound
    assert auroc(retrained.scores(both).combined, is_poisoned) > before - standard_error


def test_retrain_keeps_the_requested_share_of_held_out_clean_images(guard, retrained, clean_activations):
    rest = clean_activations[SEEN:]
    for rate in (RATE, 0.05):
        flags = retrained.with_config(false_positive_rate=rate).scores(rest).is_poisoned
        allowed = 4 * np.sqrt(rate * (1 - rate) * (1 / 1000 + 1 / len(rest)))  # of the clean draw, and of counting
        assert flags.mean() == pytest.approx(rate, abs=allowed)
    assert retrained.realised_false_positive_rate == pytest.approx(RATE, abs=4 * np.sqrt(RATE * (1 - RATE) / 500))


def test_retrain_teaches_the_replacement_head_the_true_labels(guard, retrained, triggered_activations, triggered):
    rest = triggered.source_rows >= SEEN

    def recovered(fitted):
        answers = fitted.ensemble.replacement_logits(triggered_activations[rest]).argmax(axis=1)
        return recovery_accuracy(answers, triggered.true_labels[rest])

    assert recovered(guard) < 0.85
    assert recovered(retrained) > 0.9


# --- who learns what ---


def test_retrain_with_poisoned_inputs_changes_heads_and_not_one_bit_of_novelty_detectors(small_guard, some):
    again = retrain(small_guard, some[some.is_poisoned])
    assert_same_arrays(arrays_of(again, "lof"), arrays_of(small_guard, "lof"))
    heads = zip(arrays_of(again, "disagreement"), arrays_of(small_guard, "disagreement"), strict=True)
    assert all((array != old).any() for array, old in heads)


def test_retrain_with_false_alarms_teaches_novelty_detectors_and_no_head(small_guard, traffic):
    again = retrain(small_guard, traffic[np.arange(12)])
    for entry, old in zip(again.ensemble.members, small_guard.ensemble.members, strict=True):
        if entry.kind == "lof":
            assert len(entry.detector.state()["references"]) == len(old.detector.state()["references"]) + 12
    assert_same_arrays(arrays_of(again, "disagreement"), arrays_of(small_guard, "disagreement"))


def test_retrain_teaches_no_head_the_networks_own_answer(small_guard, some):
    """Called poisoned with the attacker's label, a triggered input would teach the trigger."""
    labels = some.activations.predicted_labels
    lies = dataclasses.replace(some, true_labels=labels, is_poisoned=np.ones(len(some), dtype=bool))
    again = retrain(small_guard, lies)
    for kind in ("lof", "disagreement"):
        assert_same_arrays(arrays_of(again, kind), arrays_of(small_guard, kind))


def test_retrain_calibrates_on_the_clean_reference_alone(paper_guard, some, tmp_path):
    stored = read_bundle(retrain(paper_guard, some).save(tmp_path))
    assert stored.arrays["clean_scores"].shape == (300,)
    assert (np.diff(stored.arrays["clean_scores"]) >= 0).all()
    np.testing.assert_array_equal(stored.arrays["labels"], paper_guard.reference_labels)
    assert stored.document["clean_images"] == 300


def test_retrain_with_nothing_gives_the_guard_as_it_was_fitted(small_guard, some, few):
    again = retrain(small_guard, some[:0])
    assert again.scores(few[0]).combined.tobytes() == small_guard.scores(few[0]).combined.tobytes()
    assert again.realised_false_positive_rate == small_guard.realised_false_positive_rate
    assert again.retrained_with == (0, 0)


def test_retrain_with_nothing_gives_the_guard_as_it_was_fitted_but_for_rounding(
    suspect, clean_split, small_guard, some, clean_activations
):
    """The reference is kept in half precision, and heads are trained anew on it."""
    images, labels = (part[:300] for part in clean_split.validation)
    first = Guard.fit_activations(suspect.activations(images), labels, small_guard.config)
    again = retrain(first, some[:0])
    p_values, before = (entry.scores(clean_activations).p_values for entry in (again, first))
    assert 0.0 < np.abs(p_values - before).mean() <= 0.01
    assert abs(again.realised_false_positive_rate - first.realised_false_positive_rate) <= 0.01


def test_retrain_twice_forgets_what_is_not_given_again(paper_guard, some, traffic):
    twice = retrain(retrain(paper_guard, some), some[:5])
    once = retrain(paper_guard, some[:5])
    assert twice.inspect_activations(traffic.activations) == once.inspect_activations(traffic.activations)
    assert twice.retrained_with == (0, 5)


def test_retrain_limits_poisoned_inputs_of_one_label_to_the_commonest_class(paper_guard, traffic, few):
    limit = int(np.bincount(few[1]).max())
    label = few[1][0]
    rows = np.flatnonzero(traffic.is_poisoned)
    of_one = Labelled(traffic.activations[rows], np.full(len(rows), label), np.ones(len(rows), dtype=bool))
    assert len(of_one) > limit
    assert retrain(paper_guard, of_one).retrained_with == (limit, 0)
    assert retrain(paper_guard, of_one[np.arange(limit)]).retrained_with == (limit, 0)
    false_alarms = dataclasses.replace(of_one, is_poisoned=~of_one.is_poisoned)
    assert retrain(paper_guard, false_alarms).retrained_with == (0, len(rows))


def test_ensemble_fit_gives_every_detector_its_rows(few):
    class Recorder:
        reads = "activations"

        def __init__(self, learns_from):
            self.learns_from = learns_from

        def fit(self, activations, labels):
            self.seen = (len(activations), labels.tolist())

    activations, labels = few[0][:6], np.arange(6)
    sources = np.array([Source.CLEAN, Source.POISONED, Source.CLEAN, Source.POISONED, Source.FALSE_ALARM, Source.CLEAN])
    novelty, head = Recorder(WHAT_IS_CLEAN), Recorder(WHAT_IS_WHAT)
    Ensemble([Member("a", "a", novelty), Member("b", "b", head)]).fit(activations, labels, sources)
    assert novelty.seen == (4, [0, 2, 4, 5])
    assert head.seen == (5, [0, 1, 2, 3, 5])


# --- what stays ---


def test_retrain_leaves_the_old_guard_as_it_was(paper_guard, some, traffic):
    before = paper_guard.inspect_activations(traffic.activations)
    again = retrain(paper_guard, some)
    assert paper_guard.inspect_activations(traffic.activations) == before
    assert again.inspect_activations(traffic.activations) != before
    assert paper_guard.retrained_with is None


def test_retrain_shares_no_array_with_the_old_guard_or_the_labelled_inputs(small_guard, some):
    again = retrain(small_guard, some)

    def arrays(fitted):
        reference = [array for _, array in fitted.reference.items()]
        return [
            *reference,
            fitted.reference_labels,
            *fitted.ensemble.arrays().values(),
            *fitted.fusion.arrays().values(),
        ]

    given = [*(array for _, array in some.activations.items()), some.true_labels]
    for ours in arrays(again):
        assert not any(np.shares_memory(ours, other) for other in arrays(small_guard) + given)


def test_retrain_keeps_settings_suspect_and_what_the_guard_says_of_itself(guard, retrained, reviewed):
    assert retrained.config == guard.config
    assert retrained.suspect is guard.suspect
    assert (retrained.input_shape, retrained.preprocessing) == (guard.input_shape, guard.preprocessing)
    assert retrained.ensemble.describe() == guard.ensemble.describe()
    assert_same_arrays(*([array for _, array in entry.reference.items()] for entry in (retrained, guard)))
    poisoned = int(reviewed.is_poisoned.sum())
    assert retrained.retrained_with == (poisoned, len(reviewed) - poisoned)
    assert retrained.digest is None


def test_retrain_keeps_class_names_and_preprocessing(few, traffic):
    names = [f"digit {digit}" for digit in range(10)]
    old = Guard.fit_activations(*few, GuardConfig(false_positive_rate=0.05, folds=2, mode="paper"), class_names=names)
    again = retrain(replace(old, preprocessing="their own handler", images_from="/clean"), traffic[:5])
    assert (again.class_names, again.preprocessing) == (tuple(names), "their own handler")
    assert again.images_from == "/clean"


def test_retrain_reports_progress(paper_guard, traffic):
    shares = []
    retrain(paper_guard, traffic[:5], progress=lambda _, share: shares.append(share))
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


# --- on disk ---


def test_retrained_guard_can_be_saved_loaded_and_used(retrained, suspect, clean_split, triggered, tmp_path):
    path = retrained.save(tmp_path)
    loaded = Guard.load(path, suspect)
    images = np.concatenate([clean_split.test.images[:50], triggered.images[:50]])
    assert loaded.inspect(images) == retrained.inspect(images)
    assert loaded.retrained_with == retrained.retrained_with
    assert loaded.save(tmp_path).name == path.name


def test_bundle_document_says_with_how_many_inputs_it_was_retrained(paper_guard, traffic, tmp_path):
    chosen = traffic[np.r_[0:4, SEEN : SEEN + 7]]
    document = read_bundle(retrain(paper_guard, chosen).save(tmp_path)).document
    assert document["retrained_with"] == {"poisoned": 7, "false_alarms": 4}
    assert read_bundle(paper_guard.save(tmp_path)).document["retrained_with"] is None


def test_bundle_written_before_retraining_was_known_loads(paper_guard, tmp_path):
    stored = read_bundle(paper_guard.save(tmp_path))
    del stored.document["retrained_with"]
    assert Guard.load(write_bundle(tmp_path, stored.document, stored.arrays)).retrained_with is None


def test_bundle_with_unknown_counts_is_a_bundle_error(paper_guard, tmp_path):
    stored = read_bundle(paper_guard.save(tmp_path))
    stored.document["retrained_with"] = {"poisoned": 1, "bribed": 2}
    with pytest.raises(BundleError, match=r"^bundle [0-9a-f]{12} lacks "):
        Guard.load(write_bundle(tmp_path, stored.document, stored.arrays))


def test_retrain_a_loaded_guard_equals_retraining_the_one_that_was_saved(few, suspect, some, clean_split, tmp_path):
    """Noisy copies of the clean images are in the bundle too, or the detectors would forget them."""
    noisy = suspect.activations(clean_split.validation.images[:300] * np.float32(0.9))
    config = GuardConfig(false_positive_rate=0.05, folds=2, mode="paper")
    old = Guard.fit_activations(*few, config, noisy=noisy)
    digests = [retrain(entry, some).save(tmp_path).name for entry in (old, Guard.load(old.save(tmp_path)))]
    assert digests[0] == digests[1]
    again = Guard.load(tmp_path / digests[0])
    assert len(arrays_of(again, "lof")[0]) == 600 + 40
    kept = old.noisy_reference
    assert_same_arrays(*([array for _, array in entry.items()] for entry in (again.noisy_reference, kept)))
    for (_, array), (_, given) in zip(kept.items(), noisy.items(), strict=True):
        np.testing.assert_allclose(array, given, rtol=2**-11, atol=2**-25)  # in half precision


# --- bad input ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"true_labels": np.zeros(4, dtype=int)},
            r"^true_labels must have shape \(5,\), one per labelled input, got \(4",
        ),
        ({"is_poisoned": np.zeros((5, 1), dtype=bool)}, r"^is_poisoned must have shape \(5,\), .*got \(5, 1\)\.$"),
        ({"true_labels": np.zeros(5)}, r"^true_labels must be integers, got float64\.$"),
        ({"is_poisoned": np.zeros(5, dtype=int)}, r"^is_poisoned must be bool, got int64\.$"),
        ({"true_labels": np.arange(5) + 6}, r"^true_labels must be in \[0, 10\), got 6 to 10\.$"),
        ({"true_labels": np.arange(5) - 1}, r"^true_labels must be in \[0, 10\), got -1 to 3\.$"),
    ],
)
def test_labelled_that_breaks_a_rule_is_refused(traffic, change, message):
    with pytest.raises(DataError, match=message):
        dataclasses.replace(traffic[:5], **change)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_labelled_that_is_not_finite_is_refused_with_the_row(traffic, value):
    features = traffic.activations.features[:5].copy()
    features[3, 2] = value
    damaged = dataclasses.replace(traffic.activations[:5], features=features)
    with pytest.raises(DataError, match=r"^activations of labelled input 3 are not finite\. Leave it out\.$"):
        Labelled(damaged, traffic.true_labels[:5], traffic.is_poisoned[:5])


def test_labelled_takes_any_integers_and_keeps_a_copy(traffic):
    labels, is_poisoned = np.arange(5, dtype=np.uint8), np.zeros(5, dtype=bool)
    labelled = Labelled(traffic.activations[:5], labels, is_poisoned)
    labels[:], is_poisoned[:] = 9, True
    np.testing.assert_array_equal(labelled.true_labels, np.arange(5), strict=True)
    assert labelled.counts == (0, 5)
    assert len(labelled) == 5
    with pytest.raises(dataclasses.FrozenInstanceError):
        labelled.true_labels = labels


def test_retrain_labelled_inputs_of_another_network_are_refused(paper_guard, traffic):
    few = traffic[:5]
    activations = few.activations
    depth = next(iter(activations.depths))
    for damaged, message in (
        (
            dataclasses.replace(activations, features=activations.features[:, :-1]),
            r"^features of labelled inputs have 511 columns, the guard's have 512\. Is it the same suspect model\?$",
        ),
        (
            dataclasses.replace(activations, logits=np.pad(activations.logits, ((0, 0), (0, 1)))),
            r"^logits of labelled inputs have 11 columns, the guard's have 10\.",
        ),
        (
            dataclasses.replace(activations, depths={**activations.depths, depth: activations.depths[depth][:, 1:]}),
            rf"^{depth} of labelled inputs have \d+ columns, the guard's have \d+\.",
        ),
        (
            dataclasses.replace(activations, depths={}),
            rf"^labelled inputs have no depth '{depth}': the guard has \['{depth}', ",
        ),
    ):
        with pytest.raises(DataError, match=message):
            retrain(paper_guard, dataclasses.replace(few, activations=damaged))
