"""The tables of the Fusion paper: printed values, rows, and how the rate of the calibrated guard is chosen."""

from __future__ import annotations

import csv
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from guard import Activations, GuardConfig, SuspectModel
from guard.lab.zoo.splits import LabelledImages

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "benchmarks" / "fusion"
RESULTS = ROOT / "benchmarks" / "results" / "fusion"
TABLES = ("table_2", "table_4", "table_5", "table_6", "table_7", "table_8", "imperceptible", "red_box")

#: The tables as arXiv 2011.02526 prints them, copied by hand, row by row; cells that the text has lost are left out.
PRINTED = {
    "table_2": """
        a 100.0 100.0 96.86 10.42 96.86 10.42 87.71 8.38
        b 100.0 34.35 89.31 17.51 89.31 8.96 86.94 0.0
        c 100.0 99.88 95.52 3.84 95.52 3.84
        d 99.55 0.52 95.37 2.62 94.95 0.0
        e 100 98.14 95.56 80.75 95.56 78.89
        f 99.76 0.13 91.26 94.26 91.04 0.1 86.02 0.0
        g 100.0 0.22 90.62 94.52 90.62 0.18 86.18 0.0
        h 100.0 100.0 88.40 0.16 88.40 0.16 91.50 17.7
        i 100.0 94.57 88.69 10.27 88.69 10.09 91.37 7.77
        j 100.0 100 100 100 88.16 6.49 6.19 2.33 88.16 6.49 6.19 2.33 91.79 9.32 7.87 0.0
        k 100.0 100 100 100 88.09 6.43 6.30 0.0 88.09 6.43 6.30 0.0 91.75 7.98 7.83 0.0
    """,
    "table_4": """
        a 97.2 95.1 95.9 7.6 97.6 57.3 99.2
        b 89.1 100 88.1 8.9 99.1 14.6 43.4
        c 96.5 97.4 92.9 0.1 94.9 1.5
        d 95.1 99.7 95.2 12.3 92.7 0 94.5 99.6 100
        e 94.7 90.2 95.8 28.9 93.6 69.6 95.3 45.5 99.9
        f 88.5 99.8 84.4 0.1
        g 88.3 99.9 84.1 0.1 88.2 99.6 22.2
        h 97.7 99.9 88 0.16 97.1 95.9 10.3
        i 97.1 91.4 88.3 2.9 97.8 90.5 18.4
        j 95.9 92.1 92.2 100 87.7 1.9 0.03 5.6 97.3 45.0 64.7 94.9 11.7 63.7 5.8
        k 95.9 91.5 91.3 100 87.7 0.5 0.01 0 96.9 52.3 82.3 0 15.9 53.6 15.5
    """,
    "table_5": """
        d 93.46 48.17 92.77 0.0
        f 86.84 99.50 84.42 0.0
        h 79.68 0.07 88.00 0.16
        i 83.07 88.35
    """,
    "table_6": """
        c 93.01 20.69 94.03 10.27
        d 91.83 0.01 92.62 0.03
        f 83.18 37.6 83.62 15.7
        h 76.35 0.35 83.18 0.11
        i 77.29 83.52
    """,
    "table_7": """
        a 95.97 97.6 95.72 1.94
        b 88.06 8.96 85.77 5.76
        c 94.96 1.50 92.60 2.56
        d 92.77 0.0 93.36 0
        e 93.61 69.6 93.61 7.75
        f 84.42 0.0 80.04 1.35
        g 84.12 0.08 80.04 0.02
        h 88.00 0.16 84.54 0.24
        i 88.35 2.91 84.86 2.03
        j 87.78 1.9 0.03 5.6 84.07 0.08 0.03 4.5
        k 87.74 0.5 0.01 0 85.13 0.07 0.01 0
    """,
    "table_8": """
        a 95.98 1.98 96.60 0.39
        b 87.78 2.68 88.1 1.68
        c 92.81 2.42 91.43 0.98
        d 93.30 0.0 93.94 0.02
        e 93.47 7.84 93.53 3.38
        f 79.45 1.85 81.8 0.35
        g 79.97 0.02 83.62 0
        h 84.31 0.21 88.65 0.07
        i 84.38 2.05 88.94 0.25
        j 84.27 0.08 0.03 4.5 89.25 0.07 0.02 0
        k 85.35 0.08 0.02 0 88.83 0.08 0.06 0.1
    """,
    "imperceptible": "",
    "red_box": "",
}


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    """Import the scripts as they import each other: from their own folder."""
    before = set(sys.modules)
    sys.path.insert(0, str(SCRIPTS))
    names = ("common", "studies", "subjects", "last_layer", "pictures", "side_studies", "run_all", *TABLES)
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path.remove(str(SCRIPTS))
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(SCRIPTS) in str(sys.modules[name].__file__):
            del sys.modules[name]


def table_module(scripts: SimpleNamespace, name: str) -> ModuleType:
    module: ModuleType = getattr(scripts, name)
    return module


class FakeZoo:
    """Holds the models that it is told to hold."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.folder = Path("nowhere")

    def has(self, name: str) -> bool:
        return name in self.names


def records_of(scripts: SimpleNamespace, held: dict[tuple[str, Any], dict[str, dict[str, Any]]]) -> Any:
    """Return records that were measured already."""
    records = scripts.studies.Records(Path("nowhere"), FakeZoo(*{name for name, _ in held}))
    records._read = dict(held)
    return records


def guard_record(clean: float, attack: float | list[float]) -> dict[str, dict[str, Any]]:
    rates = {
        "true_negative": clean,
        "false_negative": attack,
        "clean_accuracy": clean,
        "attack_success": attack,
        "validation_false_positive": 0.05,
    }
    return {part: dict(rates) for part in ("unguarded", "novelty", "head", "paper", "calibrated", "calibrated_usual")}


@pytest.mark.parametrize("name", TABLES)
def test_printed_values_are_those_of_the_paper(scripts: SimpleNamespace, name: str) -> None:
    printed: dict[str, list[float]] = {}
    for line in PRINTED[name].split("\n"):
        case, *values = line.split() or [""]
        printed[case] = sorted(map(float, values))
    found: dict[str, list[float]] = {}
    for (case, _), value in table_module(scripts, name).TABLE.expected().items():
        found.setdefault(case, [])
        if value is not None:
            found[case].append(value)
    for case, values in found.items():
        assert sorted(values) == printed.get(case, []), case


@pytest.mark.parametrize("name", TABLES)
def test_every_printed_value_has_a_place_in_its_table(scripts: SimpleNamespace, name: str) -> None:
    table = table_module(scripts, name).TABLE
    rows = scripts.common.rows_of(table, records_of(scripts, {}))
    with_value = {key for key, value in table.expected().items() if value is not None}
    assert with_value <= {(row.case, row.quantity) for row in rows}
    assert {case for case, _ in table.expected()} == set(table.cases)


def test_read_expected_refuses_a_number_that_is_no_percentage(scripts: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "odd.expected.csv"
    path.write_text("case,quantity,paper\na,fusion_true_negative,120\n", encoding="utf-8")
    with pytest.raises(ValueError, match="percentage"):
        scripts.common.read_expected(path)


def test_percent_is_a_hundred_times_the_fraction(scripts: SimpleNamespace) -> None:
    assert scripts.common.percent(0.12345) == pytest.approx(12.35, abs=0.011)
    assert scripts.common.percent(1.0) == 100.0
    row = scripts.common.Row("a", "paper", "fusion_true_negative", 97.1, 96.86)
    assert row.difference == pytest.approx(0.24)
    assert row._replace(ours=None).difference is None


def test_seeds_give_their_mean_and_the_worst(scripts: SimpleNamespace) -> None:
    plain = scripts.studies.PLAIN
    models = scripts.common.CASES["a"].models
    held = {(model, plain): guard_record(0.9 + 0.02 * n, [0.01 * n]) for n, model in enumerate(models)}
    rows = {
        (row.case, row.mode, row.quantity): row
        for row in scripts.common.rows_of(scripts.table_2.TABLE, records_of(scripts, held))
    }
    assert rows["a", "paper", "fusion_true_negative"].ours == 92.0
    assert rows["a", "paper", "fusion_true_negative"].paper == 96.86
    assert rows["a", "paper", "fusion_true_negative_worst_seed"].ours == 90.0
    assert rows["a", "calibrated", "fusion_false_negative"].ours == 1.0
    assert rows["a", "calibrated", "fusion_false_negative_worst_seed"].ours == 2.0
    assert rows["a", "lee_2018", "lee_true_negative"][3:] == (None, 87.71)


def test_three_triggers_give_a_value_each(scripts: SimpleNamespace) -> None:
    model = scripts.common.CASES["j"].models[0]
    held = {(model, scripts.studies.PLAIN): guard_record(0.9, [0.1, 0.2, 0.3])}
    rows = scripts.common.rows_of(scripts.table_4.TABLE, records_of(scripts, held))
    found = {row.quantity: row for row in rows if row.case == "j" and row.mode == "paper"}
    assert [found[f"guarded_attack_success_{trigger}"].ours for trigger in ("lipstick", "eyebrows", "sunglasses")] == [
        10.0,
        20.0,
        30.0,
    ]
    assert found["guarded_attack_success_eyebrows"].paper == 0.03
    assert found["guarded_clean_accuracy"].paper == 87.7


def test_strip_of_ours_stands_beside_the_printed_one(scripts: SimpleNamespace) -> None:
    model = scripts.common.CASES["j"].models[0]
    held = {(model, scripts.studies.STRIP): {"strip": {"false_acceptance": [0.1, 0.625, 0.0]}}}
    rows = scripts.common.rows_of(scripts.table_4.TABLE, records_of(scripts, held))
    found = {row.quantity: row[3:] for row in rows if row.case == "j" and row.mode == "strip"}
    assert found == {
        "strip_false_acceptance_lipstick": (10.0, 11.7),
        "strip_false_acceptance_eyebrows": (62.5, 63.7),
        "strip_false_acceptance_sunglasses": (0.0, 5.8),
    }


@pytest.mark.parametrize(("trigger", "accepted"), [(1.0, 0.0), (0.0, 1.0)], ids=["loud", "silent"])
def test_strip_rejects_what_stays_surer_than_clean_images_do(
    scripts: SimpleNamespace, trigger: float, accepted: float
) -> None:
    """Logits (40 x, noise): a bright first pixel outweighs the others, whatever is laid over it."""
    layer = nn.Linear(9, 2, bias=False)
    layer.weight.data = torch.zeros(2, 9)
    layer.weight.data[0, 0], layer.weight.data[1, 1:] = 40.0, 0.5
    images = np.random.default_rng(0).random((80, 1, 3, 3), dtype=np.float32)
    images[..., 0, 0] = 0.0
    triggered = images.copy()
    triggered[..., 0, 0] = trigger
    labels = np.zeros(80, np.int64)
    subject = SimpleNamespace(
        card=SimpleNamespace(seed=1),
        suspect=SuspectModel(nn.Sequential(nn.Flatten(), layer)),
        split=SimpleNamespace(validation=LabelledImages(images, labels)),
        triggered_sets=[SimpleNamespace(images=triggered)],
    )
    record = scripts.studies.study_strip(subject, scripts.studies.STRIP)
    assert record["strip"]["false_acceptance"] == pytest.approx([accepted], abs=0.1)


def test_a_missing_model_is_reported_in_rows_and_text(scripts: SimpleNamespace) -> None:
    held = {("mnist-a-mnist_cnn-1", scripts.studies.PLAIN): guard_record(0.9, [0.1])}
    table = scripts.table_4.TABLE
    rows = scripts.common.rows_of(table, records_of(scripts, held))
    missing = {row.quantity for row in rows if row.mode == "missing"}
    assert {"mnist-a-mnist_cnn-0", "mnist-a-mnist_cnn-2", "yaleb-k-deepid-0"} <= missing
    assert "mnist-a-mnist_cnn-1" not in missing
    assert all(row.ours is None for row in rows if row.case == "c")
    text = scripts.common.as_markdown(table, rows)
    assert "Missing in the zoo" in text
    assert "gtsrb-c-gtsrb_cnn-0" in text


def test_table_files_have_five_columns_and_survive_reading(scripts: SimpleNamespace, tmp_path: Path) -> None:
    rows = scripts.common.rows_of(scripts.table_5.TABLE, records_of(scripts, {}))
    scripts.common.write_rows(tmp_path / "table.csv", rows)
    with (tmp_path / "table.csv").open(encoding="utf-8", newline="") as file:
        assert next(csv.reader(file)) == ["case", "mode", "quantity", "ours", "paper"]
    assert scripts.common.read_rows(tmp_path / "table.csv") == rows


def test_calibrated_rate_is_the_published_guards_on_validation_images(
    scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[GuardConfig, Activations]] = []

    class FakeGuard:
        def __init__(self, config: GuardConfig) -> None:
            self.config = config
            self.realised_false_positive_rate = 0.0375

        @classmethod
        def fit_activations(
            cls, activations: Activations, labels: object, config: GuardConfig, *, noisy: object = None
        ) -> FakeGuard:
            calls.append((config, activations))
            return cls(config)

    class FakeSubject(scripts.subjects.Subject):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            self.card = SimpleNamespace(seed=3)
            labels = np.arange(80) % 4
            self.split = SimpleNamespace(validation=SimpleNamespace(labels=labels))
            self._guards = {}
            self.validation = Activations(np.zeros((80, 4), np.float32), np.zeros((80, 2), np.float32))

        @property
        def clean(self) -> Activations:
            raise AssertionError("test images were looked at while a guard was fitted")

        triggered = clean

    monkeypatch.setattr(scripts.subjects, "Guard", FakeGuard)
    guards = FakeSubject().guards(0.0, 2)
    assert [config.mode for config, _ in calls] == ["paper", "calibrated"]
    assert guards.calibrated.config.false_positive_rate == 0.0375
    assert all(len(activations) == 40 for _, activations in calls)
    assert {config.seed for config, _ in calls} == {3}


def test_calibrated_rate_is_never_below_what_the_images_can_show(
    scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs: list[GuardConfig] = []

    def fit(activations: object, labels: object, config: GuardConfig, *, noisy: object = None) -> SimpleNamespace:
        configs.append(config)
        return SimpleNamespace(realised_false_positive_rate=0.0, config=config)

    monkeypatch.setattr(scripts.subjects.Guard, "fit_activations", fit)
    scripts.subjects.fit_at_same_clean_loss(None, np.zeros(199, np.int64), None, 0.0, 0)
    assert configs[1].false_positive_rate == pytest.approx(1 / 200)


def test_validation_quarters_nest_and_spread_over_classes(scripts: SimpleNamespace) -> None:
    labels = np.repeat(np.arange(5), 12)
    half, more = (scripts.subjects.validation_rows(labels, quarters, 0) for quarters in (2, 3))
    assert len(half) == 30
    assert set(half) < set(more)
    assert np.bincount(labels[half]).tolist() == [6] * 5
    assert len(scripts.subjects.validation_rows(labels, 4, 0)) == 60


@pytest.mark.parametrize("name", [name for name in TABLES if (RESULTS / f"{name}.csv").is_file()])
def test_stored_results_carry_the_printed_values(scripts: SimpleNamespace, name: str) -> None:
    table = table_module(scripts, name).TABLE
    expected = table.expected()
    rows = scripts.common.read_rows(RESULTS / f"{name}.csv")
    for row in rows:
        assert row.paper == expected.get((row.case, row.quantity)), row
    assert {row.case for row in rows} == set(table.cases)


def test_document_holds_the_stored_results(scripts: SimpleNamespace) -> None:
    document = scripts.run_all.DOCUMENT.read_text(encoding="utf-8")
    assert scripts.run_all.with_tables(document, RESULTS) == document, "run benchmarks/fusion/run_all.py"


def test_no_expected_value_is_a_word() -> None:
    for path in SCRIPTS.glob("*.expected.csv"):
        with path.open(encoding="utf-8", newline="") as file:
            assert all(re.fullmatch(r"(\d+(\.\d+)?)?", row["paper"]) for row in csv.DictReader(file)), path.name
