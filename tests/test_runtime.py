"""The server-neutral part: one outcome per row, one outcome per request, and the active bundle."""

from __future__ import annotations

import copy
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from guard import Guard, SuspectModel
from guard.errors import BundleError, DataError, InputRejectedError, SuspectModelError
from guard.lab.attacks import MnistCnn, Poisoned
from guard.serving.outcomes import Outcome, merge, unscored
from guard.serving.runtime import GuardRuntime
from guard.storage.bundle import BundleStore
from guard.types import Verdict

Make = Callable[..., GuardRuntime]


@pytest.fixture(scope="module")
def bundles(fitted_guard: Guard, second_guard: Guard, tmp_path_factory: Any) -> Path:
    """A folder with two bundles, the session's guard active."""
    folder: Path = tmp_path_factory.mktemp("bundles")
    path = fitted_guard.save(folder)
    second_guard.save(folder)
    BundleStore(folder).activate(path.name)
    return folder


@pytest.fixture
def store(bundles: Path, tmp_path: Path) -> BundleStore:
    """A copy of that folder, for this test alone."""
    shutil.copytree(bundles, tmp_path / "bundles")
    return BundleStore(tmp_path / "bundles")


@pytest.fixture
def module(badnet: MnistCnn) -> MnistCnn:
    return copy.deepcopy(badnet)


@pytest.fixture
def make(store: BundleStore, module: MnistCnn) -> Iterator[Make]:
    made: list[GuardRuntime] = []

    def build(**settings: Any) -> GuardRuntime:
        made.append(GuardRuntime(module, settings, bundles=store.root, embedded=None, model_name="m"))
        return made[-1]

    yield build
    for runtime in made:
        runtime.close()


def other_than_active(store: BundleStore) -> str:
    return next(entry.digest for entry in store.entries() if not entry.is_active)


def wait_for(condition: Callable[[], bool], seconds: float = 2.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return False


def counted(runtime: GuardRuntime, name: str) -> dict[tuple[str, ...], float]:
    return {sample.labels: sample.value for sample in runtime.metrics.drain() if sample.name == name}


# --- watching


def test_watching_judges_every_row_as_the_offline_guard_does(
    make: Make, module: MnistCnn, triggered: Poisoned, clean_split: Any, fitted_guard: Guard
) -> None:
    images = np.concatenate([triggered.images[:5], clean_split.test.images[:5]])
    runtime = make()
    with torch.no_grad():
        bare = module(torch.from_numpy(images))
        with runtime.watching(runtime.current) as record:
            watched = module(torch.from_numpy(images))
    assert torch.equal(bare, watched)
    assert (record.forward_passes, record.model_ran) == (1, True)
    assert record.guard_seconds > 0
    offline = fitted_guard.inspect(images)
    assert [row.verdict.p_value for row in record.rows if row.verdict] == [verdict.p_value for verdict in offline]
    assert [row.kind == "poisoned" for row in record.rows] == [verdict.is_poisoned for verdict in offline]


def test_watching_sees_only_what_happens_inside_and_nothing_for_none(
    make: Make, module: MnistCnn, clean_split: Any
) -> None:
    images = torch.tensor(clean_split.test.images[:2])
    runtime = make()
    with torch.no_grad():
        with runtime.watching(runtime.current) as first:
            module(images)
            module(images=images)
        module(images)
        with runtime.watching(None) as nothing:
            module(images)
        with runtime.watching(runtime.current) as last:
            module(images)
    assert (first.forward_passes, len(first.rows), len(nothing.rows), len(last.rows)) == (2, 4, 0, 2)


@pytest.mark.parametrize("as_keyword", [False, True])
def test_watching_refuses_another_shape_before_the_model_runs(make: Make, module: MnistCnn, as_keyword: bool) -> None:
    images = torch.zeros(1, 3, 28, 28)
    runtime = make()
    with (
        runtime.watching(runtime.current) as record,
        pytest.raises(InputRejectedError, match=r"\(3, 28, 28\)") as answer,
    ):
        module(images=images) if as_keyword else module(images)
    assert answer.value.status == 422
    assert not record.model_ran
    open_runtime = make(failure_mode="open")
    with open_runtime.watching(open_runtime.current) as record, pytest.raises(RuntimeError, match="expected input"):
        module(images)  # the model's own complaint
    assert not record.model_ran


def test_close_takes_the_hooks_off_and_stops_following(make: Make, module: MnistCnn, clean_split: Any) -> None:
    runtime = make()
    with runtime.watching(runtime.current), torch.no_grad():
        module(torch.tensor(clean_split.test.images[:1]))
    runtime.close()
    hooks = [*module._forward_hooks, *module._forward_pre_hooks]
    hooks += [hook for layer in module.modules() for hook in (*layer._forward_hooks, *layer._forward_pre_hooks)]
    assert not hooks


def test_relabel_changes_flagged_rows_alone(
    make: Make, module: MnistCnn, triggered: Poisoned, clean_split: Any
) -> None:
    images = torch.from_numpy(np.concatenate([triggered.images[:4], clean_split.test.images[:4]]))
    runtime = make(action="relabel")
    with torch.no_grad():
        bare = module(images)
        with runtime.watching(runtime.current) as record:
            replaced = module(images)
    for row, outcome in enumerate(record.rows):
        assert torch.equal(bare[row], replaced[row]) == (outcome.kind == "clean")
        assert outcome.verdict is not None
        assert int(replaced[row].argmax()) == outcome.verdict.final_label
    assert record.rows[0].kind == "poisoned"


# --- what cannot be scored


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_judge_tells_one_bad_row_from_its_neighbours(
    make: Make, module: MnistCnn, clean_split: Any, value: float
) -> None:
    images = clean_split.test.images[:3].copy()
    images[1, 0, 5, 5] = value
    for failure_mode, kind in (("closed", "rejected"), ("open", "bypassed")):
        runtime = make(failure_mode=failure_mode)
        with runtime.watching(runtime.current) as record, torch.no_grad():
            module(torch.from_numpy(images))
        assert [row.kind for row in record.rows] == ["clean", kind, "clean"]
        assert record.rows[1].reason == "not_finite"


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_judge_refuses_infinity_that_the_activations_no_longer_show(make: Make, clean_split: Any, value: float) -> None:
    runtime = make()
    images = clean_split.test.images[:2].copy()
    suspect = runtime.current.suspect
    assert suspect is not None
    activations = suspect.activations(images)  # as of a model that clamps its input
    images[0, 0, 0, 0] = value
    outcomes = runtime.judge(runtime.current, activations, torch.from_numpy(images))
    assert [outcome.kind for outcome in outcomes] == ["rejected", "clean"]


def test_judge_blames_the_model_for_its_own_infinity(make: Make, clean_split: Any) -> None:
    runtime = make()
    suspect = runtime.current.suspect
    assert suspect is not None
    activations = suspect.activations(clean_split.test.images[:2])
    activations.features[0] = np.inf
    outcomes = runtime.judge(runtime.current, activations, torch.tensor(clean_split.test.images[:2]))
    assert [(outcome.kind, outcome.status) for outcome in outcomes] == [("failed", 500), ("clean", 200)]


def test_judge_never_raises_and_never_says_clean_when_the_guard_breaks(
    make: Make, clean_split: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise DataError("of image 7")

    images = torch.tensor(clean_split.test.images[:2])
    for failure_mode, kind in (("closed", "failed"), ("open", "bypassed")):
        runtime = make(failure_mode=failure_mode)
        suspect = runtime.current.suspect
        assert suspect is not None
        activations = suspect.activations(clean_split.test.images[:2])
        with monkeypatch.context() as patch:
            patch.setattr(Guard, "decide", broken)
            outcomes = runtime.judge(runtime.current, activations, images)
        assert [(outcome.kind, outcome.reason) for outcome in outcomes] == [(kind, "guard_error")] * 2
        fewer = runtime.judge(runtime.current, activations, images[:1] * torch.nan)
        assert {outcome.kind for outcome in fewer} == {kind}
    assert "image 7" not in caplog.text


# --- one outcome per request


def verdict(p_value: float, is_poisoned: bool) -> Verdict:
    return Verdict(
        label=1,
        final_label=1,
        is_poisoned=is_poisoned,
        p_value=p_value,
        score=0.0,
        action="flag",
        detector_scores={},
        reason="",
    )


CLEAN, CLEANER = Outcome("clean", verdict(0.3, False)), Outcome("clean", verdict(0.9, False))
POISONED, WORSE = Outcome("poisoned", verdict(0.02, True)), Outcome("poisoned", verdict(0.001, True))
BYPASSED = Outcome("bypassed", reason="not_finite", message="?")
REJECTED = Outcome("rejected", status=422, reason="not_finite", message="?")
FAILED = Outcome("failed", status=500, reason="guard_error", message="?")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([CLEAN], CLEAN),
        ([CLEANER, CLEAN], CLEAN),
        ([CLEAN, POISONED, CLEANER], POISONED),
        ([POISONED, WORSE], WORSE),
        ([CLEAN, BYPASSED], BYPASSED),
        ([BYPASSED, POISONED], POISONED),  # a row that cannot be scored does not excuse one that was
        ([CLEAN, REJECTED], REJECTED),
        ([POISONED, REJECTED, FAILED], FAILED),
    ],
)
def test_merge_any_takes_the_gravest_row(fitted_guard: Guard, rows: list[Outcome], expected: Outcome) -> None:
    guard = fitted_guard.with_config(rows_per_request="any")
    assert merge(guard, rows) is expected
    assert merge(guard, rows[::-1]) is expected


def test_merge_without_a_row_or_with_too_many_is_never_clean(fitted_guard: Guard) -> None:
    for rows, reason in (([], "not_observed"), ([CLEAN, CLEANER], "rows")):
        closed = merge(fitted_guard, rows)
        assert (closed.kind, closed.status, closed.reason) == ("failed", 500, reason)
        bypassed = merge(fitted_guard.with_config(failure_mode="open"), rows)
        assert (bypassed.kind, bypassed.reason) == ("bypassed", reason)
    assert "rows_per_request to 'any'" in merge(fitted_guard, [CLEAN, CLEANER]).message
    assert merge(fitted_guard.with_config(failure_mode="open"), [CLEAN, WORSE]) is WORSE


@pytest.mark.parametrize(("status", "kind"), [(404, "rejected"), (503, "failed")])
def test_merge_takes_the_users_own_refusal_for_what_it_is(fitted_guard: Guard, status: int, kind: str) -> None:
    guard = fitted_guard.with_config(failure_mode="open")
    for rows in ([], [CLEAN], [BYPASSED]):
        assert merge(guard, rows, status) == Outcome(kind, status=status)  # type: ignore[arg-type]
    assert merge(guard, [POISONED], status) is POISONED


def test_unscored_follows_failure_mode(fitted_guard: Guard) -> None:
    assert unscored(fitted_guard, "shape", 422, "x").kind == "rejected"
    assert unscored(fitted_guard, "guard_error", 500, "x").kind == "failed"
    assert unscored(fitted_guard.with_config(failure_mode="open"), "shape", 422, "x").kind == "bypassed"


# --- following ACTIVE


def test_new_active_is_taken_within_two_seconds(make: Make, store: BundleStore) -> None:
    runtime = make()
    old, new = runtime.current.digest, other_than_active(store)
    assert old is not None
    store.activate(new)
    assert wait_for(lambda: runtime.current.digest == new)
    assert runtime.current.config.false_positive_rate == 0.1
    samples = {(sample.name, *sample.labels): sample.value for sample in runtime.metrics.drain()}
    assert samples["guard_bundle_info", "m", old] == 0
    assert samples["guard_bundle_info", "m", new] == 1
    assert samples["guard_bundle_swaps_total", "m", "taken"] == 1
    store.roll_back()
    assert wait_for(lambda: runtime.current.digest == old)


def test_settings_given_to_the_runtime_outlive_a_swap(make: Make, store: BundleStore) -> None:
    runtime = make(false_positive_rate=0.02, action="block", unknown_to_serving=3)
    store.activate(other_than_active(store))
    runtime.refresh()
    assert (runtime.current.config.false_positive_rate, runtime.current.config.action) == (0.02, "block")


def damage(folder: Path) -> None:
    data = bytearray((folder / "arrays.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "arrays.safetensors").write_bytes(data)


@pytest.mark.parametrize("how", ["damaged", "missing", "nonsense", "empty", "breaks"])
def test_bad_new_active_is_refused_once_and_the_old_one_stays(
    make: Make, store: BundleStore, how: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    runtime = make(bundle_poll_seconds=2)
    guard, new = runtime.current, other_than_active(store)
    if how == "damaged":
        damage(store.root / new)
    elif how == "breaks":
        monkeypatch.setattr(Guard, "with_config", lambda *_, **__: 1 / 0)
    text = {"missing": "f" * 64, "nonsense": "../../elsewhere", "empty": ""}.get(how, new)
    (store.root / "ACTIVE").write_text(text)
    for _ in range(3):
        runtime.refresh()
    assert runtime.current is guard
    assert counted(runtime, "guard_bundle_swaps_total")["m", "refused"] == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if '"bundle_refused"' in line]
    answer = json.loads(line)
    assert (answer["bundle"], answer["stays"], answer["model"]) == (text if len(text) == 64 else "", guard.digest, "m")
    assert answer["why"]


def test_bundle_that_comes_later_than_active_is_taken_then(make: Make, store: BundleStore) -> None:
    runtime = make()
    new = other_than_active(store)
    (store.root / new).rename(store.root / "later")
    (store.root / "ACTIVE").write_text(new)
    assert wait_for(lambda: runtime._refused[0] == new)
    (store.root / "later").rename(store.root / new)
    assert wait_for(lambda: runtime.current.digest == new)


def test_folder_that_vanishes_is_reported_once_and_the_old_one_stays(
    make: Make, store: BundleStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def denied(_: Any) -> str:
        raise PermissionError

    runtime = make(bundle_poll_seconds=0.01)
    digest = runtime.current.digest
    monkeypatch.setattr(BundleStore, "active_digest", denied)
    assert wait_for(lambda: "following ACTIVE failed" in caplog.text)
    time.sleep(0.1)
    assert caplog.text.count("following ACTIVE failed") == 1
    monkeypatch.undo()
    (store.root / "ACTIVE").unlink()
    time.sleep(0.1)
    assert runtime.current.digest == digest


def test_start_without_the_folder_serves_the_embedded_bundle_until_it_appears(
    module: MnistCnn, store: BundleStore, tmp_path: Path, bundles: Path
) -> None:
    embedded = next(folder for folder in bundles.glob("?" * 64) if folder.name == other_than_active(store))
    runtime = GuardRuntime(
        module, {"bundle_poll_seconds": 0.05}, bundles=tmp_path / "later", embedded=embedded, model_name="m"
    )
    assert runtime.current.digest == embedded.name
    store.root.rename(tmp_path / "later")
    assert wait_for(lambda: runtime.current.digest != embedded.name)
    runtime.close()


def test_start_refuses_what_it_cannot_guard(module: MnistCnn, store: BundleStore, tmp_path: Path) -> None:
    with pytest.raises(SuspectModelError, match=r"must be a torch\.nn\.Module, got NoneType"):
        GuardRuntime(None, {}, bundles=store.root, embedded=None, model_name="m")
    with pytest.raises(BundleError, match="there is no bundle to serve"):
        GuardRuntime(module, {}, bundles=None, embedded=None, model_name="m")
    with pytest.raises(BundleError, match="was fitted for weights"):
        GuardRuntime(MnistCnn(), {}, bundles=store.root, embedded=None, model_name="m")
    (store.root / "ACTIVE").unlink()
    with pytest.raises(BundleError, match="no bundle is active"):
        GuardRuntime(module, {}, bundles=store.root, embedded=tmp_path, model_name="m")


def test_swap_under_threads_never_mixes_two_bundles_in_one_block(
    make: Make, module: MnistCnn, store: BundleStore, clean_split: Any
) -> None:
    runtime = make(bundle_poll_seconds=2)
    images = torch.tensor(clean_split.test.images[:4])
    digests = [entry.digest for entry in store.entries()]
    expected = {}
    for digest in digests:
        guard = Guard.load(store.root / digest, SuspectModel(copy.deepcopy(module)))
        expected[digest] = [verdict.p_value for verdict in guard.inspect(images.numpy())]
    assert expected[digests[0]] != expected[digests[1]]
    done = threading.Event()

    def swap() -> None:
        while not done.is_set():
            for digest in digests:
                store.activate(digest)
                runtime.refresh()

    thread = threading.Thread(target=swap)
    thread.start()
    seen = set()
    for _ in range(200):
        guard = runtime.current
        with runtime.watching(guard) as record, torch.no_grad():
            module(images)
        assert guard.digest is not None
        assert [row.verdict.p_value for row in record.rows if row.verdict] == expected[guard.digest]
        seen.add(guard.digest)
    done.set()
    thread.join()
    assert seen == set(digests)
