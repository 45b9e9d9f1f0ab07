"""The assessment: known triggers in copies of a benign network, the guard tried on them, the network left alone."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from guard import Guard, GuardConfig, SuspectModel
from guard.cli import run
from guard.errors import ConfigError, DataError, SuspectModelError
from guard.lab.assess import CAVEAT, DEFAULT_ATTACKS, KNOWN_ATTACKS, AssessmentReport, PlantingSettings, Trial, assess
from guard.lab.assess.assessment import images_needed_to_assess
from guard.lab.assess.known_triggers import attack_to_plant, why_unfit
from guard.lab.assess.planting import Images, plant
from guard.lab.attacks import MnistCnn, TrainingSettings, mnist_cnn, train_classifier
from guard.lab.zoo.collection import Zoo, default_zoo_dir
from guard.suspect.digest import weights_digest
from guard.types import Float32Array, IntArray

RATE = 0.05
CONFIG = GuardConfig(false_positive_rate=RATE)
#: So little that nothing is learned: for tests of everything but the planting.
HARDLY = PlantingSettings(epochs=1, learning_rates=(1e-7,))
#: Fewer parts of a cross-fit than by default, which are most of the time of an assessment.
QUICK = GuardConfig(false_positive_rate=RATE, folds=5)


class LabelledImages(NamedTuple):
    """Images (n, 1, 28, 28) float32 in [0, 1], and true labels (n,) int64."""

    images: Float32Array
    labels: IntArray


@pytest.fixture(scope="module")
def benign(clean_split: Any) -> MnistCnn:
    """A network without a backdoor: the zoo's, which was trained on other images, or outside a checkout a new one."""
    zoo = Zoo(default_zoo_dir())
    if zoo.has("mnist-benign-mnist_cnn-0"):
        return zoo.load("mnist-benign-mnist_cnn-0")
    network = mnist_cnn(seed=0)
    settings = TrainingSettings(epochs=4, learning_rate=4e-3)
    train_classifier(network, *(part[:4000] for part in clean_split.train), settings, seed=0, n_threads=1)
    return network


@pytest.fixture
def clean(clean_split: Any) -> LabelledImages:
    """1,000 images that the network has not seen."""
    return LabelledImages(*clean_split.validation)


@pytest.fixture
def some(clean: LabelledImages) -> LabelledImages:
    """Enough of them for everything but rates."""
    return LabelledImages(*(part[:400] for part in clean))


class Assessed(NamedTuple):
    """A real assessment, with what it did to the network and showed to the guards."""

    report: AssessmentReport
    digests: tuple[str, str]
    fitted_on: list[Float32Array]


@pytest.fixture(scope="module")
def assessed(benign: MnistCnn, clean_split: Any) -> Assessed:
    """White square and blend, planted once each; about 15 s on one core."""
    before = weights_digest(benign)
    fitted_on: list[Float32Array] = []
    fit = Guard.fit

    def spy(suspect: SuspectModel, images: Float32Array, *others: Any, **more: Any) -> Guard:
        fitted_on.append(images)
        return fit(suspect, images, *others, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Guard, "fit", spy)
        attacks = ("white-square", "blend", "gotham")
        planting = PlantingSettings(epochs=8, learning_rates=(3e-3,))
        report = assess(
            SuspectModel(benign), *clean_split.validation, QUICK, attacks=attacks, seeds=(0,), planting=planting
        )
    return Assessed(report, (before, weights_digest(benign)), fitted_on)


def trial_of(report: AssessmentReport, attack: str) -> Trial:
    (trial,) = (trial for trial in report.trials if trial.attack == attack)
    return trial


# --- what it finds


@pytest.mark.parametrize("attack", ["white-square", "blend"])
def test_assess_plants_known_triggers_in_a_benign_network(assessed: Assessed, attack: str) -> None:
    trial = trial_of(assessed.report, attack)
    assert trial.planted, trial.why_not
    assert trial.attack_success_unguarded is not None
    assert trial.attack_success_unguarded >= 0.95
    assert trial.clean_accuracy_after >= trial.clean_accuracy_before - 0.02


@pytest.mark.parametrize("attack", ["white-square", "blend"])
def test_assess_says_what_the_guard_catches(assessed: Assessed, attack: str) -> None:
    trial = trial_of(assessed.report, attack)
    assert trial.true_positive_rate is not None
    assert trial.true_positive_interval is not None
    assert trial.attack_success_guarded is not None
    assert trial.true_positive_rate > 0.5
    assert trial.true_positive_interval.lower < trial.true_positive_rate <= trial.true_positive_interval.upper
    assert trial.attack_success_guarded <= 1 - trial.true_positive_rate + 1e-9
    assert trial.auroc is not None
    assert trial.auroc > 0.9
    assert trial.flagged_without_backdoor is not None


def test_assess_has_a_control_without_any_trigger(assessed: Assessed) -> None:
    control = assessed.report.trials[-1]
    assert control.is_control
    assert control.attack_success_unguarded is None
    assert control.realised_false_positive_rate is not None
    assert control.realised_false_positive_rate < 0.12  # 0.05, plus four standard deviations of 200 images
    assert assessed.report.summaries()[-1].is_control


def test_assess_never_changes_the_model(assessed: Assessed, benign: MnistCnn) -> None:
    assert assessed.digests[0] == assessed.digests[1] == assessed.report.weights_digest
    assert not benign.training


def test_assess_never_fits_a_guard_on_a_poisoned_image(assessed: Assessed, clean_split: Any) -> None:
    clean_rows = {image.tobytes() for image in clean_split.validation.images}
    assert len(assessed.fitted_on) == 3  # two triggers and the control
    for images in assessed.fitted_on:
        assert len(images) == assessed.report.split.fitting
        assert all(image.tobytes() in clean_rows for image in images)


def test_assess_leaves_out_a_trigger_that_does_not_fit_and_says_so(assessed: Assessed) -> None:
    assert "channel" in assessed.report.skipped["gotham"]
    assert {trial.attack for trial in assessed.report.trials} == {"white-square", "blend", "none"}


def test_assess_report_is_json_and_says_that_it_is_an_estimate(assessed: Assessed) -> None:
    answer = json.loads(json.dumps(assessed.report.as_dict(), allow_nan=False))
    assert answer["caveat"] == CAVEAT
    assert "Real attackers may use others" in CAVEAT
    assert answer["split"] == {"planting": 300, "monitoring": 100, "fitting": 400, "testing": 200}
    assert [entry["attack"] for entry in answer["summaries"]] == ["white-square", "blend", "none"]
    assert answer["trials"][0]["true_positive_interval_lower"] < answer["trials"][0]["true_positive_interval_upper"]


def test_assess_shows_each_trigger_on_a_test_image(assessed: Assessed) -> None:
    assert assessed.report.samples.keys() == {"white-square", "blend"}
    for clean_one, triggered in assessed.report.samples.values():
        assert clean_one.shape == (1, 28, 28)
        assert not np.array_equal(clean_one, triggered)


# --- what cannot be planted


def test_assess_attack_that_does_not_take_is_not_planted_and_never_caught(
    benign: MnistCnn, some: LabelledImages
) -> None:
    report = assess(SuspectModel(benign), *some, QUICK, attacks=("pattern",), seeds=(0,), planting=HARDLY)
    trial = trial_of(report, "pattern")
    assert not trial.planted
    assert trial.why_not.startswith("attack success 0.0")
    assert trial.why_not.endswith("is below 0.95")
    assert (trial.true_positive_rate, trial.attack_success_guarded, trial.auroc) == (None, None, None)
    summary = report.summaries()[0]
    assert (summary.planted, summary.trials) == (0, 1)
    assert summary.true_positive_rate is None
    assert summary.attack_success_unguarded == trial.attack_success_unguarded


def test_assess_attack_that_costs_accuracy_is_not_planted(benign: MnistCnn, clean: LabelledImages) -> None:
    careless = PlantingSettings(epochs=1, learning_rates=(0.1,), required_success=0.01)
    report = assess(SuspectModel(benign), *clean, CONFIG, attacks=("white-square",), seeds=(0,), planting=careless)
    trial = trial_of(report, "white-square")
    assert not trial.planted
    assert trial.why_not.startswith("clean accuracy fell by 0.")
    control = trial_of(report, "none")  # destroyed, too
    assert control.why_not.startswith("no guard can be fitted to this copy: ")
    assert control.realised_false_positive_rate is None
    assert report.summaries()[-1].realised_false_positive_rate is None


# --- what it refuses, and warns of


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"attacks": ("white-sqare",)}, ConfigError, "there is no trigger 'white-sqare'. Did you mean 'white-square'"),
        ({"attacks": ()}, ConfigError, "name at least one trigger"),
        ({"attacks": ("gotham",)}, DataError, "no trigger can be put on these images"),
        ({"seeds": ()}, ConfigError, "seeds must be one or more"),
        ({"seeds": (1, 1)}, ConfigError, "different whole numbers"),
        (
            {"preprocess": lambda pixels: pixels[:1]},
            DataError,
            r"preprocess must return \(n, channels, h, w\) for 64 images",
        ),
        ({"config": GuardConfig(false_positive_rate=0.001)}, DataError, "needs at least 2497 clean images, got 1000"),
    ],
)
def test_assess_refuses_what_cannot_work(
    benign: MnistCnn, clean: LabelledImages, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        assess(SuspectModel(benign), *clean, **{"config": CONFIG, "planting": HARDLY, **changes})


def test_assess_refuses_images_outside_the_unit_range(benign: MnistCnn, clean: LabelledImages) -> None:
    with pytest.raises(DataError, match=r"must lie in \[0, 1\]"):
        assess(SuspectModel(benign), clean.images * 2, clean.labels, CONFIG)


def test_assess_refuses_labels_that_the_model_does_not_have(benign: MnistCnn, clean: LabelledImages) -> None:
    with pytest.raises(DataError, match=r"labels must be in \[0, 10\), got 1 to 10"):
        assess(SuspectModel(benign), clean.images, clean.labels + 1, CONFIG)


@pytest.mark.parametrize("rate", [0.2, 0.05, 0.01])
def test_assess_needs_as_many_images_as_it_says(benign: MnistCnn, clean: LabelledImages, rate: float) -> None:
    config = GuardConfig(false_positive_rate=rate, folds=5)
    n = images_needed_to_assess(config)
    few = LabelledImages(*(part[: n - 1] for part in clean))
    with pytest.raises(DataError, match=f"needs at least {n} clean images, got {n - 1}"):
        assess(SuspectModel(benign), *few, config)
    enough = LabelledImages(*(part[:n] for part in clean))
    report = assess(SuspectModel(benign), *enough, config, attacks=("blend",), seeds=(0,), planting=HARDLY)
    assert report.split.fitting >= 1 / rate - 1


def test_assess_counts_copies_once_and_splits_none_of_them(benign: MnistCnn, clean: LabelledImages) -> None:
    config = GuardConfig(false_positive_rate=0.2, folds=5)
    n = images_needed_to_assess(config)
    doubled = LabelledImages(*(np.concatenate([part[: n - 1]] * 2) for part in clean))
    with pytest.raises(DataError, match=f"got {n - 1} and {n - 1} copies of them"):
        assess(SuspectModel(benign), *doubled, config)
    some = LabelledImages(*(part[: n + 10] for part in clean))  # among augmented ones, two like digits are copies too
    images = np.concatenate([some.images, np.roll(some.images, 1, axis=3)])  # moved by a pixel
    labels = np.tile(some.labels, 2)
    report = assess(SuspectModel(benign), images, labels, config, attacks=("blend",), seeds=(0,), planting=HARDLY)
    assert n <= report.clean_images <= n + 10
    assert report.clean_images == sum(dataclasses.astuple(report.split))
    copies = len(images) - report.clean_images
    assert any(line.startswith(f"{copies} images are copies of others, and were left out") for line in report.warnings)


def test_assess_with_a_class_without_images_warns_and_never_attacks_it(benign: MnistCnn, clean: LabelledImages) -> None:
    few = clean.labels % 5 == 1  # ones and sixes are left
    config = GuardConfig(false_positive_rate=0.2, folds=5)
    images, labels = clean.images[few], clean.labels[few]
    report = assess(SuspectModel(benign), images, labels, config, attacks=("blend",), seeds=(0, 1), planting=HARDLY)
    assert {trial.target_label for trial in report.trials if not trial.is_control} == {1, 6}
    assert any("8 of the model's 10 classes have no images" in line for line in report.warnings)


def test_assess_warns_of_a_poor_model(benign: MnistCnn, some: LabelledImages) -> None:
    wrong = some.labels.copy()
    wrong[::2] = (wrong[::2] + 1) % 10
    report = assess(SuspectModel(benign), some.images, wrong, QUICK, attacks=("blend",), seeds=(0,), planting=HARDLY)
    assert 0.4 < report.clean_accuracy < 0.6
    assert any("gets only" in line and "it will be poor" in line for line in report.warnings)


# --- the user's preprocessing, and networks of every kind


class Normalised(nn.Module):
    """The benign network for images that were normalised."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        answer: Tensor = self.network(images * 0.3 + 0.1)
        return answer


def test_assess_puts_triggers_on_pixels_and_preprocesses_afterwards(benign: MnistCnn, some: LabelledImages) -> None:
    seen: list[Float32Array] = []

    def preprocess(pixels: Float32Array) -> Float32Array:
        seen.append(pixels)
        return (pixels - np.float32(0.1)) / np.float32(0.3)

    arguments: dict[str, Any] = {"attacks": ("blend",), "seeds": (0,), "planting": HARDLY}
    plain = assess(SuspectModel(benign), *some, QUICK, **arguments)
    other = assess(SuspectModel(Normalised(benign)), *some, QUICK, preprocess=preprocess, **arguments)
    assert other.clean_accuracy == plain.clean_accuracy
    assert trial_of(other, "blend").attack_success_unguarded == trial_of(plain, "blend").attack_success_unguarded
    assert all(pixels.min() >= 0 and pixels.max() <= 1 for pixels in seen)


class Awkward(nn.Module):
    """Batch normalisation, a `view` that needs plain memory, two outputs, a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 7 * 7, 3)
        self.stem.requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.norm(self.stem(images)))
        return self.head(hidden.view(len(images), -1)), hidden


def test_plant_copes_with_batch_norm_views_and_several_outputs() -> None:
    rng = np.random.default_rng(0)
    images = Images(rng.random((40, 3, 16, 16), dtype=np.float32), np.arange(40) % 3)
    network = Awkward().double().eval()
    before = weights_digest(network)
    attack = attack_to_plant("blend", 1, 0, 3, images.labels, 0.8)
    settings = PlantingSettings(epochs=2, learning_rates=(1e-3,))
    shares: list[float] = []
    planted = plant(network, attack, images, images, lambda pixels: pixels, settings, seed=0, progress=shares.append)
    copy = planted.network
    assert isinstance(copy, Awkward)
    assert weights_digest(network) == before
    assert torch.equal(copy.norm.running_mean.double(), network.norm.running_mean)
    assert not torch.equal(copy.stem.weight.double(), network.stem.weight)  # an attacker unfreezes it
    assert not network.stem.weight.requires_grad
    assert not copy.training
    assert shares == [0.5, 1.0]


def test_plant_that_diverges_leaves_the_copy_as_it_was() -> None:
    rng = np.random.default_rng(0)
    images = Images(rng.random((40, 3, 16, 16), dtype=np.float32), np.arange(40) % 3)
    network = Awkward().eval()
    attack = attack_to_plant("blend", 1, 0, 3, images.labels, 0.8)
    settings = PlantingSettings(epochs=2, learning_rates=(1e30,))
    planted = plant(network, attack, images, images, lambda pixels: pixels, settings, seed=0, progress=lambda _: None)
    assert weights_digest(planted.network) == weights_digest(network)
    assert (planted.epochs_run, planted.learning_rate) == (2, 0.0)


def test_plant_in_a_network_that_cannot_be_copied_says_so(clean: LabelledImages) -> None:
    class Single(Awkward):
        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            raise TypeError("there is only one of me")

    images = Images(np.zeros((9, 3, 16, 16), dtype=np.float32), np.arange(9) % 3)
    with pytest.raises(SuspectModelError, match=r"cannot be copied.*only one of me"):
        plant(Single(), None, images, images, lambda pixels: pixels, HARDLY, seed=0, progress=lambda _: None)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("epochs", 0), ("learning_rates", ()), ("learning_rates", (0.0,)), ("poisoned_share", 1.0), ("batch_size", 0)],
)
def test_planting_settings_refuse_what_breaks_a_rule(setting: str, value: Any) -> None:
    with pytest.raises(DataError):
        PlantingSettings(**{setting: value})


# --- the triggers


@pytest.mark.parametrize("name", KNOWN_ATTACKS)
@pytest.mark.parametrize("n_classes", [2, 43])
def test_known_trigger_can_be_planted_in_small_colour_images(name: str, n_classes: int) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.random((90, 3, 16, 16), dtype=np.float32)
    labels = np.arange(90) % n_classes
    attack = attack_to_plant(name, 1, 0, n_classes, labels, 0.8)
    poisoned = attack.poison(pixels, labels, rng, how="add")
    assert poisoned.is_poisoned.sum() >= 20
    touched = poisoned.is_poisoned
    assert (poisoned.labels[touched] != poisoned.true_labels[touched]).all()  # none needs images of the target class
    assert attack.test_sets(pixels, labels)[0].images.shape[1:] == (3, 16, 16)


def test_known_triggers_cover_what_may_be_planted_by_default() -> None:
    assert set(DEFAULT_ATTACKS) <= set(KNOWN_ATTACKS)
    grey, colour = np.zeros((1, 1, 16, 16), dtype=np.float32), np.zeros((1, 3, 16, 16), dtype=np.float32)
    assert [name for name in DEFAULT_ATTACKS if why_unfit(name, grey)] == ["gotham"]
    assert [name for name in DEFAULT_ATTACKS if why_unfit(name, colour)] == []


# --- the command

NETWORK = """
from torch import nn

def make():
    head = [nn.Flatten(), nn.Linear(392, 16), nn.ReLU(), nn.Linear(16, 4)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), *head)

def halved(images):
    return images / 2
"""
HANDLER = """
import io
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from ts.torch_handler.base_handler import BaseHandler

class Mine(BaseHandler):
    def initialize(self, context):
        import assess_network
        self.model = assess_network.make()
        file = context.system_properties["model_dir"] + "/" + context.manifest["model"]["serializedFile"]
        self.model.load_state_dict(load_file(file))

    def preprocess(self, data):
        images = [np.asarray(Image.open(io.BytesIO(item["body"])).convert("RGB")) for item in data]
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 510
"""
COLUMNS = ("trigger", "planted", "attack success", "with guard", "caught", "false alarms")
MODEL = ["--weights", "weights.safetensors", "--architecture", "assess_network:make", "--preprocess"]
ASSESS = ["assess", *MODEL, "assess_network:halved", "--images", "clean.npz", "--false-positive-rate", "0.1"]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: network, weights, and coloured bands on noise, one place and colour per class."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "assess_network.py").write_text(NETWORK)
    (folder / "my_handler.py").write_text(HANDLER)
    labels = np.arange(320) % 4
    images = np.random.default_rng(0).integers(0, 90, (320, 16, 16, 3))
    for image, label in zip(images, labels, strict=True):
        image[4 * label : 4 * label + 4, :, label % 3] += 150
    images = images.astype(np.uint8)
    np.savez(folder / "clean.npz", images=images, labels=labels)
    np.savez(folder / "few.npz", images=images[:99], labels=labels[:99])
    np.savez(folder / "unlabelled.npz", images=images)
    pixels = images.transpose(0, 3, 1, 2).astype(np.float32) / 255
    np.savez(folder / "normalised.npz", images=pixels * 2 - 1, labels=labels)
    for name, size in (("0/small.png", 16), ("1/large.png", 20)):
        (folder / "sizes" / name).parent.mkdir(parents=True)
        Image.new("RGB", (size, size)).save(folder / "sizes" / name)
    names: dict[str, Any] = {}
    exec(NETWORK, names)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = names["make"]()
    train_classifier(network, pixels / 2, labels, TrainingSettings(epochs=20, learning_rate=0.01), seed=0, n_threads=1)
    save_file(network.state_dict(), folder / "weights.safetensors")
    return folder


@pytest.fixture
def guard(work: Path, few_folds: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run one command in the user's folder; returns status, stdout, stderr."""
    monkeypatch.chdir(work)
    monkeypatch.syspath_prepend(str(work))

    def command(*arguments: str) -> tuple[int, str, str]:
        status = run(list(arguments))
        printed = capfd.readouterr()
        return status, printed.out, printed.err

    return command


@pytest.fixture(scope="module")
def runs() -> dict[str, tuple[int, str, str]]:
    """What commands said that several tests read."""
    return {}


@pytest.fixture
def deep(guard: Run, work: Path, runs: dict[str, tuple[int, str, str]], few_folds: None) -> str:
    """What an assessment with two triggers prints; it is written to out/deep."""
    if not runs:
        before = (work / "weights.safetensors").read_bytes()
        chosen = ["--trigger", "white-square", "--trigger", "blend", "--seeds", "1", "--epochs", "15"]
        runs["deep"] = guard(*ASSESS, *chosen, "--output", "out/deep")
        assert (work / "weights.safetensors").read_bytes() == before
    status, shown, problem = runs["deep"]
    assert status == 0, problem
    return shown


def test_assess_command_prints_a_table_and_writes_report_and_picture(deep: str, work: Path) -> None:
    shown = deep
    for heading in COLUMNS:
        assert heading in shown
    assert re.search(r"white-square +1 of 1 +(1\.000|0\.9)", shown)
    assert "none (control)" in shown
    assert CAVEAT in shown
    report = json.loads((work / "out/deep/report.json").read_text())
    assert report["clean_accuracy"] > 0.95
    assert report["requested_false_positive_rate"] == 0.1
    with (work / "out/deep/report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["attack"] for row in rows] == ["white-square", "blend", "none"]
    assert float(rows[0]["true_positive_rate"]) == pytest.approx(report["trials"][0]["true_positive_rate"], abs=1e-6)
    with Image.open(work / "out/deep/assess.png", formats=("PNG",)) as picture:
        picture.load()
        assert picture.width > 800


@pytest.mark.usefixtures("deep")
def test_assess_command_takes_the_users_handler_and_equals_the_architecture(guard: Run, work: Path) -> None:
    claimed = ["--weights", "weights.safetensors", "--handler", "my_handler.py", "--extra-file", "assess_network.py"]
    chosen = ["--images", "clean.npz", "--false-positive-rate", "0.1", "--trigger", "white-square", "--seeds", "1"]
    status, _, problem = guard("assess", *claimed, *chosen, "--output", "handled", "--epochs", "15")
    assert status == 0, problem
    ours, second = (json.loads((work / name / "report.json").read_text()) for name in ("handled", "out/deep"))
    assert ours["clean_accuracy"] == second["clean_accuracy"]
    assert ours["weights_digest"] == second["weights_digest"]
    assert ours["trials"][0]["planted"]


def test_assess_help_names_every_trigger(guard: Run) -> None:
    shown = " ".join(guard("assess", "--help")[1].split())
    for name in KNOWN_ATTACKS:
        assert re.search(rf"[ :]{name}[,.;]", shown), name
    assert ", ".join(DEFAULT_ATTACKS) in shown


def test_assess_command_where_nothing_can_be_planted_fails_but_reports(guard: Run, work: Path) -> None:
    chosen = ["--trigger", "wanet", "--seeds", "1", "--epochs", "1", "--output", "nothing"]
    status, shown, printed = guard(*ASSESS, *chosen)
    assert status == 1
    assert "error: no trigger could be planted in any copy" in printed
    assert "wanet, seed 0: not planted, so it says nothing: attack success" in printed
    assert "0 of 1" in shown
    assert (work / "nothing/assess.png").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--trigger", "gotam"], 2, "there is no trigger 'gotam'. Did you mean 'gotham'?"),
        (["--seeds", "0"], 2, "Invalid value for '--seeds'"),
        (["--handler", "my_handler.py"], 2, "either --architecture or --handler"),
        (["--images", "few.npz"], 1, "needs at least 166 clean images, got 99"),
        (["--images", "unlabelled.npz"], 1, "has no labels"),
        (["--images", "normalised.npz"], 1, "images must lie in [0, 1], got -1"),
        (["--images", "sizes"], 1, "A trigger goes on before the preprocessing, so resize them first."),
        (["--output", "weights.safetensors/x"], 2, "weights.safetensors is no folder"),
    ],
)
def test_assess_command_that_cannot_work_is_one_line(
    guard: Run, work: Path, arguments: list[str], status: int, message: str
) -> None:
    found, shown, printed = guard(*ASSESS, "--output", "never", *arguments)
    assert message in printed.splitlines()[-1]
    assert (found, shown) == (status, "")
    assert not (work / "never").exists()
