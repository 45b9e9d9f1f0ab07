"""The command line as a user meets it: own network, own folder of PNG files, every command, every error one line."""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from object_store_helpers import BUCKET, Proxy
from PIL import Image
from safetensors.torch import save_file

from guard.cli import run
from guard.cli.fitting import classes_by_themselves
from guard.torchserve.archives.contents import followed_bundles
from guard.torchserve.client import Client

NETWORK = """
from torch import nn

def make():
    head = [nn.Flatten(), nn.Linear(392, 16), nn.ReLU(), nn.Linear(16, 4)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), *head)

def quits():
    raise SystemExit(0)

def broken():
    raise RuntimeError("first line\\nsecond line")

def fails_when_run():
    class Fails(nn.Module):
        def forward(self, x):
            raise ZeroDivisionError("in the user's network")
    return Fails()

def brighter(images):
    return images * 2

def breaks(images):
    return images.no_such_thing

def none_left(images):
    return images[:0]
"""
HANDLER = """
import io
import numpy as np
import torch
from PIL import Image
from ts.torch_handler.base_handler import BaseHandler

class Mine(BaseHandler):
    def initialize(self, context):
        import cli_network
        self.model = cli_network.make()
        file = context.system_properties["model_dir"] + "/" + context.manifest["model"]["serializedFile"]
        from safetensors.torch import load_file
        self.model.load_state_dict(load_file(file))
        print("a handler prints as it likes")

    def preprocess(self, data):
        images = [np.asarray(Image.open(io.BytesIO(item["body"])).convert("RGB").resize((16, 16))) for item in data]
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
"""
CLASSES = ["stop", "yield", "forty [km]", "sixty"]  # not in the order of the alphabet
Run = Callable[..., tuple[int, str, str]]


def pictures(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Coloured bands, one place and colour per class, on noise; (n, 16, 16, 3) uint8 with labels."""
    labels = np.arange(n) % len(CLASSES)
    images = np.random.default_rng(seed).integers(0, 90, (n, 16, 16, 3))
    for image, label in zip(images, labels, strict=True):
        image[4 * label : 4 * label + 4, :, label % 3] += 150
    return images.astype(np.uint8), labels


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: network, weights, labelled clean images, images to inspect, and one fitted bundle."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "cli_network.py").write_text(NETWORK)
    (folder / "my_handler.py").write_text(HANDLER)
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    images, labels = pictures(240, seed=0)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(NETWORK, names)
    network = names["make"]()  # type: ignore[operator]
    x, y = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(labels)
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    save_file(network.state_dict(), folder / "weights.safetensors")
    for row, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = folder / "clean" / CLASSES[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{row:03}.png")
    (folder / "new").mkdir()
    fresh, _ = pictures(8, seed=1)
    fresh[6:] = 255 - fresh[6:]  # nothing like a clean image
    for row, image in enumerate(fresh):
        Image.fromarray(image).save(folder / "new" / f"a rather long name of an image [{row}].png")
    np.savez(folder / "clean.npz", images=images, labels=labels)
    return folder


MODEL = ["--weights", "weights.safetensors", "--architecture", "cli_network:make"]
FIT = ["fit", *MODEL, "--images", "clean", "--class-names", "classes.txt", "--false-positive-rate", "0.05"]


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


@pytest.fixture
def fitted(guard: Run, work: Path) -> Path:
    if not (work / "bundles" / "ACTIVE").exists():
        status, _, problem = guard(*FIT)
        assert status == 0, problem
    return work


def error_line(printed: str) -> str:
    """The one line of an error, after what else was told on stderr."""
    assert "Traceback" not in printed
    lines = printed.splitlines()
    assert lines[-1].startswith("error: "), printed
    assert sum(line.startswith("error: ") for line in lines) == 1
    return lines[-1]


# --- help and usage


@pytest.mark.parametrize("command", ["fit", "inspect", "assess", "archive", "serve", "demo", "doctor", "bundle"])
def test_help_names_every_option_in_full_at_80_columns(
    guard: Run, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    status, shown, _ = guard(command, "--help")
    assert status == 0
    assert "…" not in shown
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_guard_without_a_command_prints_the_help_and_fails(guard: Run) -> None:
    status, _, shown = guard()
    assert status == 2
    for command in ("fit", "inspect", "assess", "archive", "serve", "bundle", "demo", "doctor"):
        assert f"  {command} " in shown


def test_version_is_printed(guard: Run) -> None:
    assert guard("--version")[1].startswith("backdoor-guard ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "No such command 'nonsense'. See `guard --help`."),
        (["inspect"], "Missing argument 'images'. See `guard inspect --help`."),
        (["fit", "--images", "clean"], "Missing option '--weights'"),
        (["inspect", "new", *MODEL, "--format", "xml"], "'xml' is not one of"),
        (["fit", "--weights", "w", "--images", "clean"], "either --architecture or --handler"),
        ([*FIT, "--handler", "my_handler.py"], "either --architecture or --handler"),
        ([*FIT, "--model-file", "x.py"], "go with --handler only"),
        ([*FIT, "--mode", "magic"], "mode: input should be 'calibrated' or 'paper', got 'magic'"),
        ([*FIT, "--false-positive-rate", "1.5"], "false_positive_rate must be in (0, 1), got 1.5"),
        ([*FIT, "--false-positive-rate-scope", "label"], "should be 'all' or 'class', got 'label'"),
        ([*FIT, "--false-positive-rate-scope", "class", "--mode", "paper"], "'class' goes with mode 'calibrated'"),
        ([*FIT, "--device", "toaster"], "--device 'toaster' cannot be used"),
        (
            [*FIT, "--false-positive-rate", "5%"],
            "'5%' is no number. Write a share: 0.05 for 5 %. See `guard fit --help`.",
        ),
        (["inspect", "new", *MODEL, "--false-positive-rate", "0,05"], "'0,05' is no number. Write a share"),
        (["demo", "--false-positive-rate", "one"], "'one' is no number. Write a share"),
        ([*FIT, "--settings", "none.toml"], "settings file none.toml does not exist"),
        (["serve", "a", "a=b.mar"], "model 'a' is named twice. Give each its own name: NAME=FILE."),
        ([*FIT, "--settings", "clean"], "settings file clean is a folder. Name another"),
        ([*FIT, "--preprocess", "cli_network:none"], "--preprocess 'cli_network:none' must be module:function"),
        (["inspect", "new", *MODEL, "--output", "no/such/folder.csv"], "there is no folder no/such"),
        (["archive", "m", "--weights", "weights.safetensors"], "give --architecture"),
        (["archive", "m", *MODEL, "--mean", "0.5,x"], "--mean must be one number, or one per channel"),
    ],
)
def test_wrong_command_or_setting_is_one_line_and_status_2(guard: Run, arguments: list[str], message: str) -> None:
    status, out, printed = guard(*arguments)
    assert message in error_line(printed)
    assert (status, out) == (2, "")


def test_cli_loads_torch_late() -> None:
    rooms = "archive", "assess", "offline", "serving"
    modules = ", ".join(["guard.cli", *(f"guard.cli.{room}" for room in rooms), "guard.review.server"])
    late = f"import sys, {modules}; assert not {{'torch', 'ts', 'sklearn'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", late], check=True)


@pytest.mark.parametrize("columns", ["80", "160"])
def test_cli_error_with_a_long_path_stays_one_line(guard: Run, columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    path = "/".join(["a folder with [brackets]"] * 10)
    status, _, printed = guard("inspect", path, *MODEL, "--bundles", path)
    assert status == 1
    assert printed.count("\n") == 1
    assert path in printed


# --- fit


def test_fit_takes_the_class_list_in_the_models_order(fitted: Path, guard: Run) -> None:
    status, shown, _ = guard("bundle", "show", "--json")
    assert status == 0
    about = json.loads(shown)
    assert about["class_names"] == CLASSES
    assert about["clean_images"] == 240
    assert about["realised_false_positive_rate"] <= 0.1


def test_fit_with_a_rate_per_class_says_where_it_holds_and_warns(guard: Run) -> None:
    chosen = ["--false-positive-rate-scope", "class", "--bundles", "per-class", "--no-activate"]
    status, shown, problem = guard(*FIT, *chosen)
    assert status == 0, problem
    assert "rate holds in   each of 4 classes that the model answers\n" in shown
    assert "the class that an attacker aims at sets a threshold of its own" in problem
    digest = Path(shown.split()[1]).name
    about = guard("bundle", "show", digest[:12], "--bundles", "per-class")[1]
    assert "false_positive_rate_scope = class" in about
    is_shared = np.array([False, True, False, True])
    others = "and in the other 2 together ('b', 'd': too few clean images are answered so)"
    assert classes_by_themselves(is_shared, list("abcd")) == f"each of 2 classes that the model answers, {others}"


def test_fit_remembers_where_its_images_are(fitted: Path, guard: Run, work: Path) -> None:
    about = json.loads(guard("bundle", "show", "--json")[1])
    assert about["images_from"] == str(work / "clean")  # the path was given relative to the folder it ran in
    assert "batch_dependence" not in about


def test_fit_says_what_it_did_in_lines_that_can_be_copied(guard: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    status, shown, problem = guard(*FIT, "--class-names", ",".join(CLASSES), "--bundles", "said", "--no-activate")
    assert status == 0, problem
    assert not {"warning", "error"} & {line.partition(":")[0] for line in problem.splitlines()}  # progress at most
    digest = shown.split()[1]
    assert Path(digest).is_dir()
    assert "100.0 % right" in shown
    assert "(asked for 0.05, measured out of fold)" in shown
    assert not Path("said/ACTIVE").exists()


def test_fit_inspect_and_archive_work_below_a_url(guard: Run, work: Path, s3: Proxy) -> None:
    bundles = ["--bundles", f"s3://{BUCKET}/fitted"]
    status, shown, problem = guard(*FIT, *bundles)
    assert status == 0, problem
    place, _, digest = shown.split()[1].rpartition("/")
    assert place == bundles[1]
    status, shown, _ = guard("inspect", "new", *MODEL, *bundles, "--format", "csv")
    assert status == 0
    assert shown.count("clean") + shown.count("poisoned") >= 8
    assert guard("archive", "remote", *MODEL, *bundles, "--no-check")[0] == 0
    archive = work / "model_store" / "remote.mar"
    assert followed_bundles(archive) == place
    with zipfile.ZipFile(archive) as packed:
        assert f"{digest}/guard.json" in packed.namelist()
        assert not [name for name in packed.namelist() if b"hush-hush" in packed.read(name)]
    s3.go_down()
    for command in ((*FIT, *bundles), ("inspect", "new", *MODEL, *bundles), ("bundle", "show", *bundles)):
        status, _, problem = guard(*command)  # before the long work
        assert status == 1
        assert "no connection. Check the network and AWS_ENDPOINT_URL." in error_line(problem)


def test_fit_refuses_another_order_of_the_classes_and_names_the_one_that_the_answers_suggest(
    guard: Run, work: Path
) -> None:
    arguments = [*MODEL, "--images", "clean", "--false-positive-rate", "0.05", "--bundles", "wrong-order"]
    status, _, printed = guard("fit", *arguments)  # sub-folders counted in sorted order: not the model's
    assert status == 1
    assert "the network gets only 0.0 % of these labels right, and 100.0 %" in printed
    order = (work / "classes.txt").read_text().split("\n")
    assert f"--class-names {shlex.quote(','.join(name for name in order if name))}" in printed
    assert not (work / "wrong-order").exists()
    status, _, printed = guard("fit", *arguments, "--fit-anyway")
    assert status == 0
    assert "warning: the suspect model gets only 0.0 %" in printed


def test_fit_on_npz_equals_fit_on_folders(fitted: Path, guard: Run) -> None:
    status, _, problem = guard(*FIT, "--images", "clean.npz", "--bundles", "npz", "--class-names", "classes.txt")
    assert status == 0, problem
    ours, second = (json.loads(guard("bundle", "show", "--json", "--bundles", name)[1]) for name in ("bundles", "npz"))
    for about in (ours, second):
        assert about["clean_images"] == 240
    assert ours["weights_digest"] == second["weights_digest"]
    assert ours["input_shape"] == second["input_shape"] == [3, 16, 16]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "nowhere"], "nowhere does not exist"),
        (["--images", "https://example.org/clean.zip"], "is an address, and images are read from this machine. Fetch"),
        (["--images", "new"], "new has no labels: use one sub-folder per class"),
        (["--class-names", "stop,yield"], "sub-folder 'forty [km]' is not in the class list"),
        (["--class-names", "a,b", "--images", "clean.npz"], "has 4 classes, got 2 class names"),
        (["--false-positive-rate", "0.0001"], "needs at least 9999 clean images, got 240"),
        (["--weights", "classes.txt"], "neither safetensors nor a PyTorch state dict"),
        (["--weights", "missing.pt"], "cannot read weights file missing.pt"),
        (["--architecture", "cli_network:broken"], "RuntimeError: first line second line"),
        (["--architecture", "cli_network:quits"], "your code failed with SystemExit: 0 (cli_network.py, line "),
        (["--architecture", "cli_network:fails_when_run"], "does not fit cli_network:fails_when_run"),
        (["--preprocess", "cli_network:breaks"], "(cli_network.py, line "),
        (["--preprocess", "cli_network:none_left"], "must return (n, channels, h, w) for"),
        (["--split", "no.such.layer"], "no.such.layer"),
    ],
)
def test_fit_that_cannot_work_is_one_line_and_status_1(guard: Run, arguments: list[str], message: str) -> None:
    status, out, printed = guard(*FIT, "--bundles", "never", *arguments)
    assert message in error_line(printed)
    assert (status, out) == (1, "")
    assert not Path("never").exists()


def test_fit_names_the_users_line_where_the_network_fails(guard: Run, tmp_path: Path) -> None:
    save_file({}, tmp_path / "none.safetensors")
    torch.save({"unused": torch.zeros(1)}, tmp_path / "none.pt")
    (tmp_path / "fails_network.py").write_text(
        "from torch import nn\n\nclass Fails(nn.Linear):\n    def forward(self, x):\n        return x / {}\n\n"
        "def make():\n    return Fails(1, 1)\n"
    )
    sys.path.insert(0, str(tmp_path))
    torch.save(torch.nn.Linear(1, 1).state_dict(), tmp_path / "linear.pt")
    model = ["--weights", str(tmp_path / "linear.pt"), "--architecture", "fails_network:make"]
    status, _, printed = guard("fit", *model, "--images", "clean.npz", "--false-positive-rate", "0.05")
    assert status == 1
    assert "fails on images of shape (3, 16, 16): your code failed with TypeError" in error_line(printed)
    assert "(fails_network.py, line 5, in forward)" in printed
    sys.path.remove(str(tmp_path))


def test_fit_refuses_an_unreadable_image_and_names_it(guard: Run, tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "torn.png").write_bytes(b"\x89PNG no")
    status, _, printed = guard(*FIT, "--images", str(tmp_path), "--class-names", "0,1,2,3")
    assert status == 1
    assert "image 0/torn.png: " in error_line(printed)


# --- settings


def test_settings_flag_over_environment_over_file_over_default(
    fitted: Path, guard: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("false_positive_rate = 0.11\nseed = 1\nfolds = 3\n")
    monkeypatch.setenv("GUARD_FALSE_POSITIVE_RATE", "0.12")
    monkeypatch.setenv("GUARD_SEED", "2")
    arguments = [*MODEL, "--images", "clean.npz", "--settings", str(file), "--bundles", str(tmp_path / "b")]
    assert guard("fit", *arguments, "--seed", "3")[0] == 0
    chosen = json.loads(guard("bundle", "show", "--json", "--bundles", str(tmp_path / "b"))[1])["settings"]
    assert chosen["seed"] == 3  # flag
    assert chosen["false_positive_rate"] == 0.12  # environment
    assert chosen["folds"] == 3  # file
    assert chosen["n_neighbors"] == 20  # default


def test_settings_guard_toml_of_the_working_folder_is_read(
    fitted: Path, guard: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("guard.toml").write_text("false_positive_rates = 0.05\n")
    model = ["--weights", str(fitted / "weights.safetensors"), "--architecture", "cli_network:make"]
    status, _, printed = guard("fit", *model, "--images", str(fitted / "clean.npz"))
    assert status == 2
    assert error_line(printed) == ("error: unknown setting 'false_positive_rates'. Did you mean 'false_positive_rate'?")
    Path("guard.toml").write_text("false_positive_rate = [\n")
    assert "settings cannot be read" in error_line(guard("fit", *model, "--images", "x")[2])


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("models/resnet.py:make", "resnet:make"),
        ("cli_network.py:make", "cli_network:make"),
        ("./cli_network:make", "cli_network:make"),
        ("C:\\nets\\net.py", "net:factory"),
    ],
)
def test_architecture_that_names_a_file_is_refused_with_the_name_of_its_module(
    guard: Run, name: str, module: str
) -> None:
    for command in (["fit", "--images", "clean"], ["archive", "mine"], ["inspect", "new"]):
        status, _, printed = guard(*command, "--weights", "weights.safetensors", "--architecture", name)
        assert status == 2
        assert error_line(printed).startswith(f"error: --architecture {name} names a file. Name its module")
        assert error_line(printed).endswith(f" {module}.")


def test_settings_unknown_environment_variable_is_refused(guard: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUARD_MODES", "paper")
    status, _, printed = guard(*FIT)
    assert status == 2
    assert "environment variable GUARD_MODES: unknown setting 'modes'. Did you mean 'mode'?" in error_line(printed)


# --- inspect


def test_inspect_formats_agree_and_go_to_a_file_unchanged(fitted: Path, guard: Run, tmp_path: Path) -> None:
    status, text, answer = guard("inspect", "new", *MODEL, "--format", "json")
    rows = json.loads(text)
    assert status == 0
    assert len(rows) == 8
    assert [row["is_poisoned"] for row in rows[6:]] == [True, True]
    flagged = sum(row["is_poisoned"] for row in rows)
    assert answer.strip() == f"8 images: {8 - flagged} clean, {flagged} poisoned, 0 failed"
    _, text, _ = guard("inspect", "new", *MODEL, "--format", "csv")
    table = list(csv.DictReader(io.StringIO(text)))
    assert [row["image"] for row in table] == [row["image"] for row in rows]
    assert [float(row["p_value"]) for row in table] == [row["p_value"] for row in rows]
    expected = ["flag" if row["is_poisoned"] else "none" for row in rows]  # as Guard-Action says when served
    assert [row["action"] for row in rows] == [row["action"] for row in table] == expected
    assert {f"score:{name}" for name in rows[0]["detector_scores"]} <= set(table[0])
    described = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()
    columns = [column for column in (*table[0], *rows[0]) if not column.startswith("score:")]
    assert all(f"`{column}`" in described for column in columns)
    _, shown, _ = guard("inspect", "new", *MODEL)
    lines = shown.splitlines()
    for row in rows:  # whole names, one line each, although stdout is no terminal
        (line,) = [line for line in lines if line.startswith(row["image"])]
        assert row["verdict"] in line
        assert CLASSES[row["label"]] in line
    for name in ("table", "csv", "json"):
        _, printed, _ = guard("inspect", "new", *MODEL, "--format", name)
        _, nothing, _ = guard("inspect", "new", *MODEL, "--format", name, "--output", str(tmp_path / name))
        assert nothing == ""
        assert (tmp_path / name).read_text() == printed


def test_inspect_some_unreadable_keeps_the_other_verdicts(fitted: Path, guard: Run, tmp_path: Path) -> None:
    for file in (fitted / "new").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    whole = (fitted / "new" / "a rather long name of an image [0].png").read_bytes()
    (tmp_path / "0 torn.png").write_bytes(whole[:100])
    (tmp_path / "b text.png").write_text("hello")
    Image.new("RGB", (5, 5)).save(tmp_path / "c small.png")
    (tmp_path / "notes.txt").write_text("passed over")
    expected = {row["image"]: row for row in json.loads(guard("inspect", "new", *MODEL, "--format", "json")[1])}
    status, text, answer = guard("inspect", str(tmp_path), *MODEL, "--format", "json")
    rows = {row["image"]: row for row in json.loads(text)}
    assert status == 1
    for name in ("0 torn.png", "b text.png", "c small.png"):
        failed = rows.pop(name)
        assert failed["verdict"] == "failed"
        assert failed["is_poisoned"] is failed["p_value"] is None
        assert failed["reason"]
    assert rows.keys() == expected.keys()
    for name, row in rows.items():
        assert row["verdict"] == expected[name]["verdict"]
        assert row["p_value"] == pytest.approx(expected[name]["p_value"])
    assert "3 failed" in answer
    assert "1 file(s) passed over" in answer
    assert "3 of 11 images have no verdict; the first: 0 torn.png: " in error_line(answer)


def test_inspect_fail_if_poisoned_is_status_3_and_a_failed_image_stays_1(
    fitted: Path, guard: Run, tmp_path: Path
) -> None:
    usual, asked = (guard("inspect", "new", *MODEL, *flag) for flag in ((), ("--fail-if-poisoned",)))
    assert (usual[0], asked[0]) == (0, 3)
    assert usual[1:] == asked[1:]
    rows = json.loads(guard("inspect", "new", *MODEL, "--format", "json")[1])
    clean = next(row["image"] for row in rows if not row["is_poisoned"])
    assert guard("inspect", f"new/{clean}", *MODEL, "--fail-if-poisoned")[0] == 0
    for file in (fitted / "new").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "torn.png").write_bytes(b"torn")
    assert guard("inspect", str(tmp_path), *MODEL, "--fail-if-poisoned")[0] == 1


def test_inspect_npz_with_one_image_that_is_not_finite_fails_that_one(fitted: Path, guard: Run, tmp_path: Path) -> None:
    images = np.moveaxis(pictures(5, seed=2)[0], 3, 1).astype(np.float32) / 255
    images[3, 0, 0, 0] = np.nan
    np.savez(tmp_path / "some.npz", x=images)
    status, text, _ = guard("inspect", str(tmp_path / "some.npz"), *MODEL, "--format", "csv")
    verdicts = [row["verdict"] for row in csv.DictReader(io.StringIO(text))]
    assert status == 1
    assert verdicts[3] == "failed"
    assert "failed" not in verdicts[:3] + verdicts[4:]


def test_inspect_preprocess_is_applied_and_its_failure_fails_every_image(fitted: Path, guard: Run) -> None:
    plain = json.loads(guard("inspect", "new", *MODEL, "--format", "json")[1])
    other = json.loads(guard("inspect", "new", *MODEL, "--format", "json", "--preprocess", "cli_network:brighter")[1])
    assert [row["score"] for row in plain] != [row["score"] for row in other]
    status, text, answer = guard("inspect", "new", *MODEL, "--format", "csv", "--preprocess", "cli_network:breaks")
    assert status == 1
    assert text.count(",failed,") == 8
    assert "your code failed with AttributeError" in error_line(answer)


def test_inspect_grey_image_suits_a_model_for_colour(fitted: Path, guard: Run, tmp_path: Path) -> None:
    Image.new("L", (16, 16), 40).save(tmp_path / "grey.png")
    assert guard("inspect", str(tmp_path / "grey.png"), *MODEL)[0] == 0


def test_inspect_takes_another_rate_and_another_bundle(fitted: Path, guard: Run) -> None:
    digest = json.loads(guard("bundle", "show", "--json")[1])["digest"]
    arguments = ["inspect", "new", *MODEL, "--format", "json", "--digest", digest[:8]]
    few = json.loads(guard(*arguments, "--false-positive-rate", "0.01")[1])
    many = json.loads(guard(*arguments, "--false-positive-rate", "0.9")[1])
    assert sum(row["is_poisoned"] for row in few) < sum(row["is_poisoned"] for row in many)
    of_class = json.loads(guard(*arguments, "--false-positive-rate-scope", "class")[1])
    flagged = [row["reason"] for row in of_class if row["is_poisoned"]]
    assert flagged
    assert all("of the clean images that its answer is compared with" in reason for reason in flagged)
    status, _, printed = guard("inspect", "new", *MODEL, "--digest", "0" * 12)
    assert status == 1
    assert "0 bundles in bundles start with" in error_line(printed)


def test_inspect_and_fit_with_the_users_own_handler_equal_the_architecture(fitted: Path, guard: Run) -> None:
    claimed = ["--weights", "weights.safetensors", "--handler", "my_handler.py", "--extra-file", "cli_network.py"]
    arguments = ["--images", "clean", "--class-names", "classes.txt", "--false-positive-rate", "0.05"]
    status, shown, problem = guard("fit", *claimed, *arguments, "--bundles", "handled")
    assert status == 0, problem
    assert "prints as it likes" not in shown
    bundles = ["--bundles", "handled", "--format", "json"]
    status, text, _ = guard("inspect", "new", *claimed, *bundles)
    assert status == 0
    _, expected, _ = guard("inspect", "new", *MODEL, *bundles)
    for ours, second in zip(json.loads(text), json.loads(expected), strict=True):
        assert ours["verdict"] == second["verdict"]
        assert ours["score"] == pytest.approx(second["score"], rel=1e-3)


# --- bundle


def test_bundle_list_show_activate_and_roll_back(fitted: Path, guard: Run, tmp_path: Path) -> None:
    bundles = ["--bundles", str(tmp_path)]
    digests = []
    for seed in ("0", "1"):
        _, shown, _ = guard("fit", *MODEL, "--images", "clean.npz", *bundles, "--seed", seed)
        digests.append(Path(shown.split()[1]).name)
    _, shown, _ = guard("bundle", "list", *bundles)
    assert all(digest[:12] in shown for digest in digests)
    assert next(line for line in shown.splitlines() if " yes " in line).startswith(digests[1][:12])
    assert shown.count(f" {datetime.now():%Y-%m-%d} ") == 2
    assert all(len(line) <= 80 for line in shown.splitlines())
    listed = json.loads(guard("bundle", "list", "--json", *bundles)[1])
    assert [(row["digest"], row["active"]) for row in listed] == [(digests[1], True), (digests[0], False)]
    written = [datetime.fromisoformat(row["written"]) for row in listed]
    assert written == sorted(written, reverse=True)
    assert abs(written[0] - datetime.now(UTC)) < timedelta(minutes=5)
    assert guard("bundle", "rollback", *bundles)[1] == f"active: {digests[0]}\n"
    assert guard("bundle", "activate", digests[1][:7], *bundles)[1] == f"active: {digests[1]}\n"
    status, _, printed = guard("bundle", "activate", "12", *bundles)
    assert status == 1
    assert "at least 6 hex digits" in error_line(printed)
    (tmp_path / digests[0] / "guard.json").write_text("{}")
    status, shown, printed = guard("bundle", "list", *bundles)
    assert status == 0
    assert digests[0][:12] not in shown
    assert f"bundle {digests[0][:12]} is damaged" in printed
    status, _, printed = guard("bundle", "show", digests[0][:12], *bundles)
    assert status == 1
    assert "is damaged: guard.json" in error_line(printed)


def test_bundle_show_fits_a_screen_and_json_has_the_whole(fitted: Path, guard: Run) -> None:
    status, shown, _ = guard("bundle", "show")
    about = json.loads(guard("bundle", "show", "--json")[1])
    lines = shown.splitlines()
    assert status == 0
    assert len(lines) <= 20
    assert all(len(line) <= 80 or "images from" in line for line in lines)  # a path is not broken
    assert lines[:2] == [f"bundle          {about['digest']}", "active          yes"]
    assert f"classes         4: {', '.join(CLASSES)}" in lines
    assert "clean images    240, of which the suspect model gets 100.0 % right" in lines
    assert "input           3 x 16 x 16" in lines
    assert f"{about['realised_false_positive_rate']:.4f} of clean images (asked for 0.05" in shown
    assert all(entry["name"] in " ".join(shown.split()) for entry in about["detectors"])
    assert about["split_points"]["split"] in shown
    assert "other settings" not in shown


@pytest.mark.parametrize("command", [["list"], ["show"], ["rollback"]])
def test_bundle_of_a_folder_without_any_says_so(guard: Run, command: list[str]) -> None:
    status, out, printed = guard("bundle", *command, "--bundles", "no-such-folder")
    assert (status, out) == (1, "")
    assert "no-such-folder" in error_line(printed)


# --- archive, serve, doctor


def test_archive_refuses_weights_that_the_bundle_was_not_fitted_for(fitted: Path, guard: Run, tmp_path: Path) -> None:
    names: dict[str, object] = {}
    exec(NETWORK, names)
    other = names["make"]()  # type: ignore[operator]
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    arguments = ["--weights", str(tmp_path / "other.safetensors"), "--architecture", "cli_network:make"]
    status, _, printed = guard("archive", "m", *arguments, "--model-store", str(tmp_path / "store"))
    assert status == 1
    assert "Fit again for these weights" in error_line(printed)
    assert not (tmp_path / "store").exists()


@pytest.mark.usefixtures("quick_checks")
def test_archive_twice_needs_force(fitted: Path, guard: Run, tmp_path: Path) -> None:
    arguments = ["archive", "m", *MODEL, "--model-store", str(tmp_path)]
    assert guard(*arguments)[:2] == (0, f"{tmp_path / 'm.mar'}\n")
    assert "exists already" in error_line(guard(*arguments)[2])
    assert guard(*arguments, "--no-check", "--force")[0] == 0


def test_serve_without_archives_says_how_to_make_one(guard: Run, tmp_path: Path) -> None:
    status, _, printed = guard("serve", "--model-store", str(tmp_path))
    assert status == 1
    assert error_line(printed).endswith("Make one with `guard archive`.")


def test_doctor_prints_what_it_looked_at(guard: Run) -> None:
    status, shown, _ = guard("doctor")
    assert shown.startswith("ok  Python: ")
    assert status == (1 if "BAD" in shown else 0)  # a taken port is no fault of ours


def test_doctor_json_has_every_check_with_its_remedy(guard: Run) -> None:
    status, shown, _ = guard("doctor", "--json")
    found = json.loads(shown)
    assert found[0].keys() == {"name", "ok", "detail", "remedy"}
    assert found[0]["name"] == "Python"
    assert status == (0 if all(check["ok"] for check in found) else 1)
    assert all(check["ok"] or check["remedy"] for check in found)


@pytest.fixture
def served(fitted: Path, guard: Run) -> Path:
    if not (fitted / "model_store" / "signs.mar").exists():
        assert guard("archive", "signs", *MODEL, "--no-check")[0] == 0
    return fitted


def start(work: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "guard.cli", "serve", *arguments],
        cwd=work,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def nobody_left(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=10)[1]


@pytest.mark.torchserve
def test_serve_answers_with_a_verdict_and_stops_on_ctrl_c(served: Path) -> None:
    server = start(served, "signs", "--port", "0", "--work-dir", "run")
    try:
        assert server.stdout is not None
        ready = server.stdout.readline()
        assert ready.startswith("ready after "), ready + str(server.stderr and server.stderr.read())
        url = ready.split()[5].rstrip(";")
        key_file = Path(server.stdout.readline().removeprefix("keys in ").strip())
        key = json.loads(key_file.read_text())["inference"]["key"]
        assert server.stdout.readline() == (
            f'curl -i -H "Authorization: Bearer {key}" {url}/predictions/signs -T image.png\n'
        )
        body = (served / "new" / "a rather long name of an image [0].png").read_bytes()
        with Client(url, token=key) as client:
            reply = client.predict("signs", body)
            assert reply.status == 200
            assert reply.headers["guard-verdict"] in ("clean", "poisoned")
            assert json.loads(reply.body)["class_name"] == "stop"
        with Client(url) as stranger:
            assert stranger.predict("signs", body).status == 400
        children = psutil.Process(server.pid).children(recursive=True)
        assert len(children) >= 3  # supervisor, Java, worker
        server.send_signal(signal.SIGINT)
        out, printed = server.communicate(timeout=30)
    finally:
        server.kill()
        server.wait()
    assert server.returncode == 0
    assert "the next start has the same keys, kept in run/keys.json; --rotate-keys makes new ones\n" in printed
    assert "error" not in printed
    assert out.endswith("stopped\n")
    assert nobody_left(children)
    assert not key_file.exists()


@pytest.mark.torchserve
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_serve_stopped_while_it_starts_leaves_nothing(served: Path, number: int, status: int) -> None:
    server = start(served, "--port", "0")
    try:
        children: list[psutil.Process] = []
        while len(children) < 2 and server.poll() is None:  # supervisor and Java
            time.sleep(0.05)
            children = psutil.Process(server.pid).children(recursive=True)
        server.send_signal(number)
        out, printed = server.communicate(timeout=30)
    finally:
        server.kill()
        server.wait()
    assert (server.returncode, out) == (status, "")
    assert printed in ("", "starting TorchServe\n")
    assert nobody_left(children)


@pytest.mark.torchserve
def test_serve_on_a_taken_port_is_one_line(served: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = start(served, "--port", str(taken.getsockname()[1]))
        out, printed = server.communicate(timeout=30)
    assert (server.returncode, out) == (1, "")
    assert "is taken" in error_line(printed) or "in use" in printed
