"""`guard review` as people type it: reviewers, files, and the server itself."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from review_helpers import picture, small_bundle, workspace_of
from safetensors.torch import save_file

from guard import Activations
from guard.cli import run
from guard.cli.review_sources import networks_of, open_workspace
from guard.errors import DataError, ServerError
from guard.processes.ports import listening_socket
from guard.relabel.address import queue_url
from guard.relabel.items import State
from guard.relabel.queue import Queue
from guard.relabel.reviewers import Reviewers
from guard.relabel.settings import QueueSettings
from guard.review import housekeeping
from guard.review.housekeeping import Housekeeping
from guard.review.known_bundles import KnownBundles
from guard.storage.bundle import BundleStore
from guard.torchserve.archives.guarded import ServedModel, make_guarded_archive


@pytest.fixture
def database(tmp_path: Path, sqlite_template: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    shutil.copy(sqlite_template, tmp_path / "queue.db")
    monkeypatch.delenv("GUARD_QUEUE_URL", raising=False)
    with Queue.open(queue_url("queue.db")) as queue:
        queue.enqueue([picture(0), picture(1)])
    return "queue.db"


def test_add_user_prints_the_token_alone(database, capsys):
    assert run(["review", "--queue", database, "add-user", "ada", "--role", "admin"]) == 0
    message = capsys.readouterr()
    with Queue.open(queue_url(database)) as queue:
        reviewer = Reviewers(queue).check_token(message.out.strip())
    assert (reviewer.name, reviewer.role) == ("ada", "admin")
    assert "shown this once" in message.err
    assert run(["review", "add-user", "ada", "--queue", database]) == 1  # the option may come last
    assert "there is a reviewer 'ada' already" in capsys.readouterr().err
    assert run(["review", "add-user", "bob", "--role", "boss", "--queue", database]) == 2
    assert run(["review", "--queue", database, "users"]) == 0
    assert capsys.readouterr().out == "ada (admin)\n"
    assert run(["review", "--queue", database, "disable-user", "ada"]) == 0


def test_queue_from_the_environment_or_an_error_that_says_how(database, capsys, monkeypatch):
    assert run(["review", "users"]) == 2
    assert "--queue queue.db, or GUARD_QUEUE_URL" in capsys.readouterr().err
    monkeypatch.setenv("GUARD_QUEUE_URL", database)
    assert run(["review", "users"]) == 0


@pytest.mark.parametrize(("file_format", "name"), [("csv", "items.csv"), ("label-studio", "items.json")])
def test_items_go_out_and_answers_come_back(database, capsys, file_format, name):
    run(["review", "--queue", database, "add-user", "ada"])
    assert run(["review", "--queue", database, "export", "--format", file_format, "--output", name]) == 0
    Path("answers.csv").write_text("item,verdict,true_label\n1,poisoned,4\n2,,\n")
    arguments = ["review", "--queue", database, "import", "answers.csv", "--reviewer"]
    capsys.readouterr()
    assert run([*arguments, "eve"]) == 1
    assert "there is no reviewer 'eve'" in capsys.readouterr().err
    assert run([*arguments, "ada"]) == 0
    assert capsys.readouterr().out == "1 answers saved, 0 there already, 1 rows unanswered\n"
    assert run(["review", "--queue", database, "export", "--what", "answered", "--format", "csv"]) == 0
    assert "poisoned,4,ada" in capsys.readouterr().out


def test_labelling_config_goes_to_the_terminal(database, capsys):
    assert run(["review", "--queue", database, "export", "--format", "labelling-config"]) == 0
    assert capsys.readouterr().out.startswith("<View>\n")


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["export", "--format", "xml"], "--format must be"),
        (["export", "--what", "some"], "--what must be"),
        (["import", "nowhere.csv", "--reviewer", "ada"], "cannot be read"),
    ],
)
def test_wrong_arguments_are_one_line(database, capsys, arguments, answer):
    assert run(["review", "--queue", database, *arguments]) in (1, 2)
    assert answer in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("option", ["--certificate", "--weights"])
def test_options_that_go_together(database, capsys, option):
    assert run(["review", "--queue", database, option, "x.pem"]) == 2
    assert "go together" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--metrics-url", "--prometheus"])
def test_address_for_the_status_page_that_is_none_is_one_line(database, capsys, option):
    assert run(["review", "--queue", database, option, "localhost"]) == 2
    assert f"{option} must be an http or https address, got 'localhost'" in " ".join(capsys.readouterr().err.split())


def test_settings_of_the_queue_are_shown_and_changed_and_an_import_keeps_to_them(
    database, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    command = ["review", "--queue", database, "settings"]
    assert run([*command, "--quorum", "2", "--lease-minutes", "5", "--max-items", "5000"]) == 0
    assert run(command) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines.count(["quorum", "2", "1"]) == lines.count(["max_items", "5,000", "100,000"]) == 2
    assert lines.count(["lease_s", "300.0", "600.0"]) == lines.count(["max_held", "100"]) == 2
    assert run([*command, "--quorum", "0"]) == 2
    assert "quorum must be above 0 and finite, got 0." in capsys.readouterr().err
    with Queue.open(queue_url(database)) as queue:
        (item_id,) = queue.enqueue([picture(1)]).ids
        Reviewers(queue).add("ada")
        Reviewers(queue).add("bob")
    Path("answers.csv").write_text(f"item,verdict,true_label\n{item_id},poisoned,3\n")
    command = ["review", "--queue", database, "import", "answers.csv", "--reviewer", "ada"]
    assert run([*command, "--quorum", "1"]) == 2  # as before this was a setting of the queue
    assert "the queue's quorum is 2, got --quorum 1." in " ".join(capsys.readouterr().err.split())
    for name, state in (("ada", State.PENDING), ("bob", State.DECIDED)):
        assert run(["review", "--queue", database, "import", "answers.csv", "--reviewer", name]) == 0
        with Queue.open(queue_url(database)) as queue:
            assert queue.get(item_id).state is state


def test_port_in_use_is_a_clear_error():
    with listening_socket("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"cannot listen on 127.0.0.1, port {port}"):
            listening_socket("127.0.0.1", port)


def test_review_serves_until_it_is_stopped(database):
    command = [sys.executable, "-m", "guard.cli", "review", "--queue", database, "--port", "0"]
    command += ["--metrics-url", "http://127.0.0.1:9"]  # nothing is there, which is no reason not to start
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        watchdog = threading.Timer(60, process.kill)
        watchdog.start()
        line = process.stdout.readline()
        assert line.startswith("review page on http://127.0.0.1:")
        with urllib.request.urlopen(f"{line.split()[3].rstrip(';')}/login", timeout=30) as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, 128 + signal.SIGTERM)
        watchdog.cancel()


def test_housekeeping_returns_ended_leases_and_finds_groups(database, monkeypatch):
    monkeypatch.setattr(housekeeping, "SWEEP_S", 0.05)
    with Queue.open(queue_url(database), QueueSettings(lease_s=0.01, retention_days=36_500)) as queue:
        same = picture(5).activations
        queue.enqueue([picture(number, activations=same) for number in range(10, 16)])
        workspace = workspace_of(queue)
        queue.claim("ada", 1)
        with Housekeeping(workspace):
            for _ in range(200):
                if queue.get(1).state is State.PENDING and queue.groups():
                    break
                threading.Event().wait(0.05)
    assert [group.size for group in workspace.queue.groups()] == [6]


def picture_folder(folder: Path, names: list[str], per_class: int = 2) -> None:
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            side = 8 + number  # pictures of several sizes
            Image.new("L", (side, side), 20 * label + number).save(folder / name / f"{number}.png")


def test_page_compares_with_the_images_that_the_bundle_remembers(database, tmp_path, capsys):
    names = ["yield", "stop"]  # not in sorted order
    picture_folder(tmp_path / "clean", names)
    labels = np.array([1, 1, 0, 0])  # files are read in sorted order
    more = {"images_from": str(tmp_path / "clean")}
    fitted = small_bundle(tmp_path / "bundles", names, np.eye(4, 6), labels, **more)
    part = {**more, "lineage": {"retrained_from": fitted}}
    retrained = small_bundle(tmp_path / "bundles", names, np.eye(3, 6), labels[1:], **part)
    store = BundleStore(tmp_path / "bundles")
    with Queue.open(queue_url(database)) as queue:
        wide = Activations(np.eye(2, dtype=np.float32)[:1], np.zeros((1, 6), dtype=np.float32))
        (item_id,) = queue.enqueue(
            [picture(7, activations=wide, suspect_label=0, backup_label=1, bundle_digest=retrained)]
        ).ids
        for digest in (fitted, retrained):
            store.activate(digest)
            workspace = open_workspace(queue, store.root)
            view = workspace.view(queue.get(item_id))
            assert [(group.name, group.rows) for group in view.neighbours] == [("yield", [2, 3]), ("stop", [0, 1])]
            assert workspace.clean.images[3].shape == (1, 9, 9)
        (tmp_path / "clean").rename(tmp_path / "moved")
        assert open_workspace(queue, store.root).clean is None
        assert open_workspace(queue, store.root, tmp_path / "moved").clean is not None
        (tmp_path / "clean").mkdir()  # there, and empty: a warning, and a page
        assert open_workspace(queue, store.root).clean is None
        assert "the page shows no clean images." in capsys.readouterr().err
        with pytest.raises(DataError, match="holds no images"):
            open_workspace(queue, store.root, tmp_path / "clean")


def test_page_compares_with_the_images_of_sub_folders_that_are_one_class(database, tmp_path):
    picture_folder(tmp_path / "clean", ["cat", "dog", "kitty"], 1)
    more = {"images_from": str(tmp_path / "clean")}
    digest = small_bundle(tmp_path / "bundles", ["puss", "dog"], np.eye(3, 6), np.array([0, 1, 0]), **more)
    BundleStore(tmp_path / "bundles").activate(digest)
    with Queue.open(queue_url(database)) as queue:
        for images in (None, tmp_path / "clean"):
            workspace = open_workspace(queue, tmp_path / "bundles", images)
            assert workspace.clean.labels.tolist() == [0, 1, 0]
            assert workspace.clean.are_of(workspace.bundles.find(digest))
        (tmp_path / "clean").rename(tmp_path / "moved")  # now nothing but the number of images tells
        assert open_workspace(queue, tmp_path / "bundles", tmp_path / "moved").clean.labels.tolist() == [0, 1, 2]


def test_page_starts_without_maps_where_the_archive_does_not_start(tmp_path, capsys):
    (tmp_path / "broken.mar").write_bytes(b"no archive")
    with ExitStack() as beside:
        assert networks_of([str(tmp_path / "broken.mar")], tmp_path, "cpu", beside) == {}
        assert networks_of([f"digits={tmp_path / 'broken.mar'}"], tmp_path, "cpu", beside) == {}
    printed = capsys.readouterr().err
    assert "the page shows no maps of where the model looks." in printed
    assert "the page shows no maps of where digits looks." in printed


def test_page_has_the_network_of_every_model_for_its_maps(tmp_path, fitted_guard, badnet):
    bundle = fitted_guard.save(tmp_path / "bundles")
    save_file(badnet.state_dict(), tmp_path / "weights.safetensors")
    model = ServedModel(tmp_path / "weights.safetensors", None, "guard.lab.attacks.networks:mnist_cnn", (1, 28, 28))
    for name in ("digits", "others"):
        make_guarded_archive(name, model, bundle, model_store=tmp_path, bundles=tmp_path / "bundles")
    with ExitStack() as beside:
        archives = [f"{name}={tmp_path / name}.mar" for name in ("digits", "others")]
        served = networks_of(archives, tmp_path, "cpu", beside)
        queue = beside.enter_context(Queue.open(f"sqlite:///{tmp_path / 'queue.db'}"))
        workspace = open_workspace(queue, tmp_path / "bundles", served=served)
        maps = {name: workspace.occlusion_of(picture(0, model=name)) for name in ("digits", "others", "third")}
        assert maps["digits"] is not maps["others"]
        assert maps["third"] is None
        image = np.zeros((1, 28, 28), np.float32)
        assert maps["digits"].of(1, image).label == maps["others"].of(1, image).label
        everybody = open_workspace(queue, tmp_path, served={"": served["digits"]})
        assert everybody.occlusion_of(picture(0, model="third")) is not None


def test_page_knows_the_bundles_of_its_folder(tmp_path):
    digest = small_bundle(tmp_path, ["cat", "dog"], np.eye(2), np.arange(2))
    bundles = KnownBundles(tmp_path)
    assert bundles.find(digest).class_names == ("cat", "dog")
    assert bundles.find("../x") is None
    assert bundles.find("0" * 64) is None
    assert bundles.class_names("0" * 64) is None
    BundleStore(tmp_path).activate(digest)
    assert bundles.class_names("0" * 64) == ("cat", "dog")  # that one is gone: the active one's
    assert KnownBundles(None).find(digest) is None
