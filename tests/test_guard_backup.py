"""A guard with a backup: it runs once for flagged inputs alone, lives in the bundle, and is chosen by measuring."""

from __future__ import annotations

import copy
import dataclasses
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from serving_helpers import Workshop, png

from guard import Guard, GuardConfig, SuspectModel
from guard.backups.backup import Backup
from guard.backups.backup_training import FitSettings
from guard.backups.defective import DefectiveSettings
from guard.backups.last_layer import LastLayerSettings
from guard.cli import run
from guard.detection.retraining import retrain
from guard.detection.training_set import Labelled
from guard.errors import BundleError, ConfigError, DataError
from guard.lab.assess.backups import HEAD, BackupRequest, with_backup
from guard.lab.assess.planting import PlantingSettings
from guard.serving.audit_sample import AuditSample
from guard.serving.runtime import GuardRuntime
from guard.storage.bundle import BundleStore
from guard.types import BACKUP

QUICK = {"defective": DefectiveSettings(fit=FitSettings(epochs=4)), "rtll": LastLayerSettings(epochs=10)}
PLANTING = PlantingSettings(epochs=4, learning_rates=(2e-3,))
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")


@pytest.fixture(scope="module")
def backed(fitted_guard, clean_split):
    """The session's guard, relabelling by a defective network."""
    guard = fitted_guard.with_config(action="relabel")
    some = (part[:300] for part in clean_split.validation)
    backup = Backup.train("defective", guard.suspect.module, *some, settings=QUICK["defective"])
    return dataclasses.replace(guard, backup=backup, recovery={HEAD: 0.5, "defective": 0.9})


@pytest.fixture(scope="module")
def twinned(backed, clean_split):
    """The same with a twin of the suspect model."""
    backup = Backup.train("rtll", backed.suspect.module, *clean_split.validation, settings=QUICK["rtll"])
    return dataclasses.replace(backed, backup=backup)


@pytest.fixture
def passes():
    """Counts the images that each forward pass of a guard's backup sees."""
    handles = []

    def count(guard):
        seen = []
        handles.append(guard.backup.network.register_forward_hook(lambda _m, args, _o: seen.append(len(args[0]))))
        return seen

    yield count
    for handle in handles:
        handle.remove()


@pytest.fixture
def serve(badnet, tmp_path):
    """Returns a runtime around a copy of the network that serves a guard's bundle."""
    runtimes = []

    def start(guard, *, module=None, **settings):
        module = copy.deepcopy(badnet) if module is None else module
        folder = guard.save(tmp_path)
        BundleStore(tmp_path).activate(folder.name)
        runtimes.append(GuardRuntime(module, settings, bundles=tmp_path, embedded=None, model_name="m"))
        return module, runtimes[-1]

    yield start
    for runtime in runtimes:
        runtime.close()


def forward(module, runtime, images):
    with torch.no_grad(), runtime.watching(runtime.current) as record:
        return module(torch.tensor(images)).numpy(), record.rows


def mixed(clean_split, triggered, n=10):
    return np.concatenate([clean_split.test.images[:n], triggered.images[:n]])


# --- one pass, for flagged inputs alone


def test_clean_inputs_run_no_backup_and_flagged_ones_once(backed, clean_split, triggered, passes):
    seen = passes(backed)
    verdicts = backed.inspect(clean_split.test.images[:100])
    clean = [row for row, verdict in enumerate(verdicts) if not verdict.is_poisoned]
    assert sum(seen) == 100 - len(clean) < 20
    seen.clear()
    backed.inspect(clean_split.test.images[clean])
    assert seen == []
    verdicts = backed.inspect(triggered.images[:50])
    assert seen == [sum(verdict.is_poisoned for verdict in verdicts)]
    assert seen[0] > 40
    expected = backed.backup.logits(triggered.images[:50]).argmax(1)
    for verdict, label in zip(verdicts, expected, strict=True):
        assert verdict.final_label == (label if verdict.is_poisoned else verdict.label)


@pytest.mark.parametrize("queued", [False, True])
def test_serving_runs_the_backup_once_per_flagged_row_whoever_asks(
    backed, clean_split, triggered, passes, serve, queued
):
    module, runtime = serve(backed)
    seen = passes(runtime.current)
    runtime.review_queue = SimpleNamespace(close=lambda: None, sample=AuditSample()) if queued else None
    images = mixed(clean_split, triggered)
    logits, rows = forward(module, runtime, images)
    flagged = [row for row, outcome in enumerate(rows) if outcome.kind == "poisoned"]
    assert seen == [len(flagged)]
    np.testing.assert_allclose(logits[flagged], backed.backup.logits(images[flagged]), rtol=1e-4, atol=1e-4)
    clean = [row for row in range(len(images)) if row not in flagged]
    assert (logits[clean].argmax(1) == [rows[row].verdict.label for row in clean]).all()
    for row in flagged:
        assert (rows[row].evidence is not None) == queued
        if queued:
            logit = np.exp(logits[row] - logits[row].max())
            assert rows[row].evidence.backup_label == logit.argmax()
            assert rows[row].evidence.backup_confidence == pytest.approx(logit.max() / logit.sum(), rel=1e-3)
    seen.clear()
    forward(module, runtime, images[clean])
    assert seen == []


def test_archive_answers_flagged_requests_with_the_backups_label(backed, badnet, clean_split, triggered, tmp_path):
    shop = Workshop(backed, badnet, tmp_path)
    bodies = [png(image) for image in mixed(clean_split, triggered, 4)]
    images = np.stack([np.asarray(Image.open(io.BytesIO(body)), dtype=np.float32)[None] / 255 for body in bodies])
    try:
        answers = shop.guarded(action="relabel").ask(*bodies)
    finally:
        shop.close()
    flagged = [answer.headers["Guard-Action"] == "relabel" for answer in answers]
    assert sum(flagged) >= 4
    for answer, verdict, opinion in zip(answers, backed.inspect(images), backed.backup.logits(images), strict=True):
        expected = opinion.argmax() if answer.headers["Guard-Action"] == "relabel" else verdict.label
        assert answer.body["label"] == expected


def test_reviewers_get_the_backups_label_under_every_action(backed, triggered, clean_split, passes):
    flagging = backed.with_config(action="flag")
    seen = passes(flagging)
    images = mixed(clean_split, triggered)
    activations = flagging.suspect.activations(images)
    assert all(verdict.second_opinion is None for verdict in flagging.decide(activations, images))
    assert seen == []
    verdicts = flagging.decide(activations, images, ask_backup=True)
    assert seen == [sum(verdict.is_poisoned for verdict in verdicts)]
    assert all((verdict.second_opinion is not None) == verdict.is_poisoned for verdict in verdicts)
    assert all(verdict.final_label == verdict.label for verdict in verdicts)


def test_backup_sees_the_input_as_it_came_even_if_the_model_works_in_place(backed, triggered, badnet, serve):
    class InPlace(type(badnet)):
        def forward(self, images):
            answer = super().forward(images)
            images.zero_()
            return answer

    module = copy.deepcopy(badnet)
    module.__class__ = InPlace
    module, runtime = serve(backed, module=module)
    logits, rows = forward(module, runtime, triggered.images[:10])
    flagged = [row for row, outcome in enumerate(rows) if outcome.kind == "poisoned"]
    assert len(flagged) > 5
    expected = backed.backup.logits(triggered.images[:10])[flagged]
    np.testing.assert_allclose(logits[flagged], expected, rtol=1e-4, atol=1e-4)


def test_request_of_many_rows_is_relabelled_whole_and_each_row_is_asked_once(
    backed, clean_split, triggered, passes, serve
):
    module, runtime = serve(backed, rows_per_request="any")
    seen = passes(runtime.current)
    images = mixed(clean_split, triggered, 4)
    logits, _ = forward(module, runtime, images)
    assert sum(seen) == len(images)
    np.testing.assert_allclose(logits, backed.backup.logits(images), rtol=1e-4, atol=1e-4)


def test_backup_that_gives_no_number_flags_and_names_no_label(backed, triggered, serve):
    module, runtime = serve(backed)
    with torch.no_grad():
        runtime.current.backup.network.fc.bias[0] = float("nan")
    runtime.review_queue = SimpleNamespace(close=lambda: None, sample=AuditSample())
    logits, rows = forward(module, runtime, triggered.images[:5])
    (row, *_) = [row for row, outcome in enumerate(rows) if outcome.kind == "poisoned"]
    assert rows[row].verdict.action == "flag"
    assert rows[row].verdict.final_label == rows[row].verdict.label == logits[row].argmax()
    assert (rows[row].evidence.backup_label, rows[row].evidence.backup_confidence) == (None, None)


def test_backup_of_no_numbers_in_a_bundle_is_refused(backed, tmp_path):
    backup = dataclasses.replace(backed.backup, network=copy.deepcopy(backed.backup.network))
    damaged = dataclasses.replace(backed, backup=backup)
    with torch.no_grad():
        damaged.backup.network.fc.bias[0] = float("nan")
    with pytest.raises(BundleError, match=r"array fc\.bias of the backup must be finite"):
        Guard.load(damaged.save(tmp_path), backed.suspect)


def test_no_second_opinion_good_enough_means_flag_only(backed, triggered, passes, serve):
    shy = dataclasses.replace(backed, relabels=False)
    seen = passes(shy)
    verdicts = shy.inspect(triggered.images[:20])
    assert seen == []
    assert all(verdict.final_label == verdict.label for verdict in verdicts)
    assert {verdict.action for verdict in verdicts if verdict.is_poisoned} == {"flag"}
    module, runtime = serve(shy)
    assert {s.labels[2] for s in runtime.metrics.drain() if s.labels[1:2] == ("poisoned",)} == {"flag"}
    logits, _ = forward(module, runtime, triggered.images[:5])
    assert (logits.argmax(1) == [verdict.label for verdict in verdicts[:5]]).all()


def test_activations_alone_cannot_be_relabelled_by_a_backup(backed, triggered_activations):
    with pytest.raises(DataError, match="backup looks at images"):
        backed.inspect_activations(triggered_activations)


# --- in the bundle


@pytest.mark.parametrize("kind", ["backed", "twinned"])
def test_backup_lives_in_the_bundle_and_nothing_is_lost_without_the_model(kind, request, triggered, badnet, tmp_path):
    guard = request.getfixturevalue(kind)
    folder = guard.save(tmp_path)
    bare = Guard.load(folder)
    assert bare.save(tmp_path / "again").name == folder.name
    assert bare.with_config(action="relabel").save(tmp_path / "again").name == folder.name
    again = Guard.load(tmp_path / "again" / folder.name, SuspectModel(copy.deepcopy(badnet)))
    assert again.recovery == guard.recovery
    images = triggered.images[:20]
    assert [v.final_label for v in again.inspect(images)] == [v.final_label for v in guard.inspect(images)]
    np.testing.assert_array_equal(again.backup.logits(images), guard.backup.logits(images))


def test_twin_without_its_model_says_what_to_do(twinned, triggered, tmp_path):
    bare = Guard.load(twinned.save(tmp_path))
    with pytest.raises(BundleError, match="load the bundle with a suspect model"):
        bare.backup.logits(triggered.images[:1])


def test_hot_swap_changes_the_backup_between_two_batches(backed, twinned, triggered, serve, tmp_path):
    module, runtime = serve(backed)
    images = triggered.images[:10]
    first, rows = forward(module, runtime, images)
    flagged = [row for row, outcome in enumerate(rows) if outcome.kind == "poisoned"]
    BundleStore(tmp_path).activate(twinned.save(tmp_path).name)
    runtime.refresh()  # while the old guard's hooks are on the network, of which the twin is a copy
    second, _ = forward(module, runtime, images)
    np.testing.assert_allclose(first[flagged], backed.backup.logits(images)[flagged], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(second[flagged], twinned.backup.logits(images)[flagged], rtol=1e-4, atol=1e-4)


def test_damaged_or_unknown_backup_is_refused(twinned, badnet):
    about, arrays = twinned.backup.description, twinned.backup.arrays()
    name, array = next(iter(arrays.items()))
    for description, given in (
        ({**about, "kind": "oracle"}, arrays),
        (about, {}),
        (about, {**arrays, name: array[:1]}),
    ):
        with pytest.raises(BundleError, match="backup"):
            Backup.restore(description, given, badnet)


@needs_cuda
def test_backup_follows_the_model_to_the_gpu(backed, triggered, badnet, tmp_path):
    folder = backed.save(tmp_path)
    on_gpu = Guard.load(folder, SuspectModel(copy.deepcopy(badnet), device="cuda"))
    images = triggered.images[:20]
    np.testing.assert_allclose(on_gpu.backup.logits(images), backed.backup.logits(images), rtol=1e-3, atol=1e-3)
    assert next(on_gpu.backup.network.parameters()).is_cuda
    assert [v.is_poisoned for v in on_gpu.inspect(images)] == [v.is_poisoned for v in backed.inspect(images)]


# --- chosen by measuring


@pytest.fixture(scope="module")
def detecting(fitted_guard, clean_split):
    """The session's guard with a measured backup that detects as well."""
    request = BackupRequest(
        "rtll", floor=0.99999, detects=True, triggers=["pattern"], settings=QUICK, planting=PLANTING
    )
    quick = dataclasses.replace(fitted_guard, config=fitted_guard.config.replace(folds=3))
    return with_backup(quick, *clean_split.validation, request)


def test_with_backup_measures_and_leaves_the_given_guard_alone(detecting, fitted_guard):
    assert set(detecting.recovery) == {HEAD, "rtll"}
    assert all(0.0 <= share <= 1.0 for share in detecting.recovery.values())
    assert detecting.relabels == (detecting.recovery["rtll"] >= 0.99999)
    assert detecting.backup.kind == "rtll"  # the one that was asked for stays for reviewers, whatever it reached
    assert (fitted_guard.backup, fitted_guard.recovery) == (None, {})


@pytest.mark.parametrize(
    ("kind", "recovery", "chosen"),
    [
        ("auto", {HEAD: 0.4, "rtll": 0.6}, "rtll"),
        ("auto", {HEAD: 0.7, "rtll": 0.6}, HEAD),
        ("auto", {HEAD: 0.1, "rtll": 0.6, "anp": 0.8}, "anp"),
        ("rtll", {HEAD: 0.7, "rtll": 0.6}, "rtll"),
    ],
)
def test_auto_takes_the_best_and_may_take_the_head(kind, recovery, chosen):
    assert BackupRequest(kind).choose(recovery) == chosen


def test_auto_leaves_the_second_opinion_to_a_head_that_recovers_most(fitted_guard, clean_split, monkeypatch):
    monkeypatch.setattr("guard.lab.assess.backups.CANDIDATES", ())  # nothing beside the head
    request = BackupRequest(floor=0.0, triggers=["pattern"], planting=PLANTING)
    guard = with_backup(fitted_guard, *clean_split.validation, request)
    assert guard.backup is None
    assert [*guard.recovery] == [HEAD]
    assert guard.relabels


def test_backup_as_a_detector_keeps_the_rate_and_costs_a_pass_for_every_input(
    detecting, clean_split, triggered, passes, tmp_path, suspect
):
    assert detecting.ensemble.names[-1] == "backup"
    assert BACKUP in detecting.reference.depths
    assert 0.03 <= detecting.realised_false_positive_rate <= 0.07
    cost = detecting.backup.description["cost"]
    assert cost["multiply_adds"] == cost["suspect_multiply_adds"] > 1e5  # a twin
    guard = dataclasses.replace(detecting.with_config(action="relabel"), relabels=True)
    seen = passes(guard)
    verdicts = guard.inspect(clean_split.test.images)
    assert sum(seen) == 1000
    assert sum(verdict.is_poisoned for verdict in verdicts) < 100
    seen.clear()
    flagged = guard.inspect(triggered.images[:100])
    assert sum(seen) == 100  # relabelling takes no second pass
    assert sum(verdict.is_poisoned for verdict in flagged) > 90
    again = Guard.load(guard.save(tmp_path), SuspectModel(suspect.module))
    assert again.inspect(triggered.images[:100]) == flagged


def test_detecting_backup_is_kept_by_serving_and_retraining(detecting, triggered, serve):
    module, runtime = serve(detecting)
    runtime.review_queue = SimpleNamespace(close=lambda: None, sample=AuditSample())
    _, rows = forward(module, runtime, triggered.images[:20])
    evidence = [outcome.evidence for outcome in rows if outcome.evidence is not None]
    assert len(evidence) > 15
    assert all("backup" in outcome.verdict.surprise for outcome in rows if outcome.evidence is not None)
    kept = type(evidence[0].activations).concatenate([entry.activations for entry in evidence])
    labelled = Labelled(kept, triggered.true_labels[: len(kept)], np.ones(len(kept), dtype=bool))
    other = retrain(detecting.with_config(false_positive_rate=0.1), labelled)
    assert other.backup is detecting.backup
    assert (other.recovery, other.relabels) == (detecting.recovery, detecting.relabels)
    assert other.ensemble.names[-1] == "backup"
    assert other.scores(kept).is_poisoned.mean() > 0.9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "oracle"}, "there is no backup 'oracle'"),
        ({"floor": 2.0}, "floor must be in"),
        ({"triggers": ["patern"]}, "Did you mean 'pattern'"),
    ],
)
def test_request_that_breaks_a_rule_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        BackupRequest(**settings)


def test_with_backup_refuses_what_cannot_be_measured(fitted_guard, clean_split):
    images, labels = clean_split.validation
    with pytest.raises(DataError, match="fitted on 1000 images, got 10"):
        with_backup(fitted_guard, images[:10], labels[:10], BackupRequest())
    bare = dataclasses.replace(fitted_guard, suspect=None)
    with pytest.raises(DataError, match="no suspect model"):
        with_backup(bare, images, labels, BackupRequest())
    paper = dataclasses.replace(fitted_guard, config=GuardConfig(mode="paper"))
    with pytest.raises(ConfigError, match="cannot detect in paper mode"):
        with_backup(paper, images, labels, BackupRequest(detects=True))
    never = PlantingSettings(epochs=1, learning_rates=(1e-9,))
    request = BackupRequest("rtll", triggers=["blend"], settings=QUICK, planting=never)
    with pytest.raises(DataError, match="none of the triggers blend can be planted"):
        with_backup(fitted_guard, images, labels, request)


@pytest.mark.usefixtures("few_folds")
@pytest.mark.usefixtures("few_folds")
def test_fit_command_with_a_backup_writes_it_and_says_what_was_measured(
    badnet, clean_split, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    save_file(badnet.state_dict(), "weights.safetensors")
    images, labels = clean_split.validation
    np.savez("clean.npz", images=images[:400], labels=labels[:400])
    fit = ["fit", "--weights", "weights.safetensors", "--architecture", "guard.lab.attacks.networks:mnist_cnn"]
    fit += ["--images", "clean.npz", "--false-positive-rate", "0.05", "--action", "relabel"]
    for wrong, message in (
        (["--backup", "magic"], "--backup must be one of none, auto, defective"),
        (["--backup", "auto", "--backup-floor", "1.5"], "--backup-floor must be in [0, 1]"),
        (["--backup-detects"], "--backup-detects needs a backup"),
    ):
        assert run([*fit, *wrong]) == 2
        assert message in " ".join(capfd.readouterr().err.split())
    np.savez("few.npz", images=images[:60], labels=labels[:60])
    fit[fit.index("clean.npz")] = "few.npz"
    assert run([*fit, "--backup", "defective"]) == 1
    assert "classes needs at least 5 clean images" in " ".join(capfd.readouterr().err.split())
    fit[fit.index("few.npz")] = "clean.npz"
    assert not (tmp_path / "bundles").exists()
    quick = dataclasses.replace(BackupRequest(triggers=["pattern"]), settings=QUICK, planting=PLANTING)
    monkeypatch.setattr(
        "guard.lab.assess.backups.BackupRequest",
        lambda kind, floor, detects: dataclasses.replace(quick, kind=kind, floor=floor, detects=detects),
    )
    assert run([*fit, "--backup", "defective", "--backup-floor", "0"]) == 0
    answer = " ".join(capfd.readouterr().out.split())
    assert "backup defective recovered of planted triggers: head" in answer
    assert "for flagged inputs alone" in answer
    stored = Guard.load(BundleStore("bundles").active_path())
    assert stored.backup.kind == "defective"
    assert set(stored.recovery) == {HEAD, "defective"}
