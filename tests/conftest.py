"""Session fixtures that every test file may use: real MNIST images, one backdoored network, and a guard fitted to it.

Nothing here is changed by a test: arrays are read-only, and a test that needs another guard makes a copy.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pytest
from browser_helpers import EXPECTED, FLAGS, PATIENCE, PLAIN_SETTINGS, OpenPage, chromium, forget, set_plain
from filelock import FileLock
from java_helpers import QUICK_START
from object_store_helpers import Proxy, S3Server
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright
from prepared_process import PreparedProcess
from queue_helpers import PostgresServer, empty_postgresql_queue, postgresql_folder
from safetensors.torch import save_file

from guard import Activations, Guard, GuardConfig, SuspectModel
from guard.cli import run
from guard.data.datasets import load_dataset, split_rows, to_tensor_images
from guard.lab.attacks import DEMO_ATTACKS, AttackRecipe, MnistCnn, Poisoned, poisoned_test_set, train_badnet
from guard.relabel.queue import Queue
from guard.relabel.settings import TIMEOUT_VARIABLE
from guard.storage.bundle import BundleStore
from guard.types import Float32Array, IntArray


def keep_freed_memory() -> None:
    """Let glibc keep what torch frees, for the next step: a fourth of the time of a training is to ask for it again."""
    trim_threshold, mmap_threshold = -1, -3
    with suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 512 << 20)


keep_freed_memory()
#: Rows of the shipped MNIST images: to train the network, to fit the guard, to test.
SPLIT = (6000, 1000, 1000)


Made = TypeVar("Made")
Once = Callable[[str, Callable[[], Made]], Made]


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one folder that all processes of this run have."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def once(run_folder: Path) -> Once:
    """Make something once for all processes of this run: the first to ask makes it, the others read its pickle."""

    def made(name: str, make: Callable[[], Made]) -> Made:
        path = run_folder / f"{name}.pickle"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                path.write_bytes(pickle.dumps(make()))
            result: Made = pickle.loads(path.read_bytes())
        return result

    return made


class LabelledImages(NamedTuple):
    """Images as the network takes them, (n, 1, 28, 28) float32 in [0, 1], and true labels (n,) int64."""

    images: Float32Array
    labels: IntArray


class CleanSplit(NamedTuple):
    """Clean MNIST images in three parts without an image in common."""

    train: LabelledImages
    validation: LabelledImages
    test: LabelledImages


@pytest.fixture(scope="session")
def clean_split() -> CleanSplit:
    data = load_dataset("mnist", "test")
    images = to_tensor_images(data.images)
    parts = []
    for rows in split_rows(len(data), SPLIT, np.random.default_rng(0)):
        part = LabelledImages(images[rows], data.labels[rows])
        for array in part:
            array.setflags(write=False)
        parts.append(part)
    return CleanSplit(*parts)


@pytest.fixture(scope="session")
def recipe() -> AttackRecipe:
    """A pixel pattern in the corner; every triggered image is to become a 7."""
    return next(demo_attack for demo_attack in DEMO_ATTACKS if demo_attack.name == "pattern")


@pytest.fixture(scope="session")
def badnet(recipe: AttackRecipe, clean_split: CleanSplit, once: Once) -> MnistCnn:
    """A network that carries the recipe's backdoor; about 6 s on one core."""
    return once("badnet", lambda: train_badnet(recipe, *clean_split.train, seed=0)[0])


@pytest.fixture(scope="session")
def suspect(badnet: MnistCnn) -> SuspectModel:
    return SuspectModel(badnet)


@pytest.fixture(scope="session")
def triggered(recipe: AttackRecipe, clean_split: CleanSplit) -> Poisoned:
    """The test images with the trigger, without those whose true label is the attacker's."""
    return poisoned_test_set(*clean_split.test, recipe.apply_trigger, recipe.target)


@pytest.fixture(scope="session")
def fitted_guard(suspect: SuspectModel, clean_split: CleanSplit, once: Once) -> Guard:
    """A guard in `calibrated` mode at a false-positive rate of 0.05, fitted on the 1,000 validation images."""
    suspect.locate(*clean_split.validation)
    config = GuardConfig(false_positive_rate=0.05)
    fitted = once("guard", lambda: replace(Guard.fit(suspect, *clean_split.validation, config), suspect=None))
    return replace(fitted, suspect=suspect)


@pytest.fixture(scope="session")
def second_guard(suspect: SuspectModel, clean_split: CleanSplit, once: Once) -> Guard:
    """A guard beside it: other folds, twice its false-positive rate."""
    suspect.locate(*clean_split.validation)
    config = GuardConfig(false_positive_rate=0.1, seed=1, folds=5)
    fitted = once("second-guard", lambda: replace(Guard.fit(suspect, *clean_split.validation, config), suspect=None))
    return replace(fitted, suspect=suspect)


class Exported(NamedTuple):
    """What `guard export` wrote of the backdoored network, and what it needed for that."""

    folder: Path
    bundles: Path
    weights: Path


@pytest.fixture(scope="session")
def exported(
    badnet: MnistCnn,
    fitted_guard: Guard,
    once: Callable[..., dict[str, bytes]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Exported:
    """The network as `digits`, for Triton, MLServer and KServe; some 6 s on one core."""
    base = tmp_path_factory.mktemp("exported")
    where = Exported(base / "models" / "digits", base / "bundles", base / "weights.safetensors")
    save_file(badnet.state_dict(), where.weights)
    BundleStore(where.bundles).activate(fitted_guard.save(where.bundles).name)

    def make() -> dict[str, bytes]:
        given = ["--weights", str(where.weights), "--architecture", "guard.lab.attacks.networks:mnist_cnn"]
        places = ["--bundles", str(where.bundles), "--to", str(where.folder.parent)]
        assert run(["export", "digits", *given, *places]) == 0
        return {
            str(file.relative_to(where.folder)): file.read_bytes() for file in where.folder.rglob("*") if file.is_file()
        }

    for name, content in once("exported", make).items():
        (where.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (where.folder / name).write_bytes(content)
    return where


@pytest.fixture(scope="session")
def prepared_process() -> Iterator[PreparedProcess]:
    process = PreparedProcess()
    yield process
    process.close()


@pytest.fixture
def quick_checks(prepared_process: PreparedProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check archives in forks of one process: for tests of what a check says, not of how it starts."""
    monkeypatch.setattr("guard.torchserve.check.subprocess", prepared_process)


@pytest.fixture(scope="module")
def quick_workers(prepared_process: PreparedProcess) -> Iterator[None]:
    """Let the workers of TorchServe be forks of one process: for tests of what they do, not of how they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("guard.torchserve.server.java_command", prepared_process.java_command)
        yield


@pytest.fixture
def few_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cross-fit few images in five parts, not in twenty: for tests that fit, and are not about how well."""
    monkeypatch.setattr("guard.detection.cross_fitting._FOLDS_OF_FEW", 5)


@pytest.fixture(scope="session")
def clean_activations(fitted_guard: Guard, suspect: SuspectModel, clean_split: CleanSplit) -> Activations:
    """Of the 1,000 clean test images."""
    return suspect.activations(clean_split.test.images)


@pytest.fixture(scope="session")
def triggered_activations(fitted_guard: Guard, suspect: SuspectModel, triggered: Poisoned) -> Activations:
    return suspect.activations(triggered.images)


#: Test files that wait for servers, browsers and processes most of their time, the longest first.
_WAITING_FILES = (
    "test_serving_torchserve",
    "test_serve_together",
    "test_demo",
    "test_cli",
    "test_wrap",
    "test_check",
    "test_review_browser",
    "test_secrets",
    "test_torchserve_server",
    "test_review_legible",
    "test_ray_engine",
    "test_local_engine",
    "test_proxy_kserve",
    "test_examples",
    "test_keys",
    "test_deploy",
    "test_review_cli",
    "test_acceptance",
    "test_observe",
    "test_wheel",
    "test_status_browser",
    "test_object_store",
    "test_object_store_serving",
)
#: Test files that train networks, or take more than five seconds for another reason, the longest first.
_WORKING_FILES = (
    "test_assess",
    "test_soundness",
    "test_training",
    "test_retrainer",
    "test_zoo",
    "test_calibration",
    "test_guard_handler",
    "test_rivals_contract",
    "test_pipeline",
    "test_retraining",
    "test_batches",
    "test_guard_backup",
    "test_review_page",
    "test_anytime",
    "test_review_hostile",
    "test_copies",
    "test_queue_processes",
    "test_readme",
    "test_gold",
    "test_networks",
    "test_snapshot",
    "test_lying_reviewers",
    "test_membership",
    "test_runtime",
    "test_review_queue",
    "test_proxy",
    "test_export",
    "test_v2_rest",
    "test_v2_grpc",
    "test_guarded_model",
    "test_fusion_tables",
    "test_queue_trouble",
    "test_purify",
    "test_defective",
    "test_badnets_benchmark",
    "test_wrap_hostile",
    "test_purify_cli",
    "test_companion",
    "test_guarded_archive",
)
#: Fixtures behind which a database server or a browser starts.
_SLOW_FIXTURES = frozenset(("postgresql_server", "postgresql_url", "browser", "s3"))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Let each process of a run read the test files from another one on.

    To rewrite the assertions of all files takes longer than to read them. What one process has written, the others
    read, so no two of them shall begin with the same files.
    """
    report = yield
    if isinstance(collector, pytest.Directory) and report.passed:
        number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
        first = len(report.result) * number // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
        report.result = report.result[first:] + report.result[:first]
    return report


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Let the garbage collector never look at what is imported and collected, a million objects that stay to the end.

    It would go through all of them every now and then: a tenth of the time of many tests.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make test-quick` leaves out, and put it first: processes of a run end together then.

    Files that wait and files that work take turns, so that cores do not wait with the first ones.
    """
    turns = itertools.chain.from_iterable(itertools.zip_longest(_WAITING_FILES, _WORKING_FILES))
    position = {name: number for number, name in enumerate(name for name in turns if name)}
    items.sort(key=lambda item: (position.get(item.path.stem, len(position)), item.path))
    for item in items:
        starts = _SLOW_FIXTURES & set(getattr(item, "fixturenames", ())) or "postgresql" in item.name
        if starts or item.path.stem in position:
            item.add_marker("slow")


@pytest.fixture(scope="session", autouse=True)
def patience() -> None:
    """Let queues wait as long as a busy test machine needs; a server's quarter of a second is a test's own choice."""
    os.environ[TIMEOUT_VARIABLE] = "20"


@pytest.fixture(scope="session", autouse=True)
def quick_java(request: pytest.FixtureRequest, run_folder: Path) -> Iterator[None]:
    """Let Java start with half of the work; with a fourth of it, where many servers make up for a shared archive.

    The archive is made in the meantime, by the first process of the run to come here: a server does without until then.
    """
    os.environ["JAVA_TOOL_OPTIONS"] = " ".join(QUICK_START)
    if sum(item.get_closest_marker("torchserve") is not None for item in request.session.items) < 40:
        yield
        return
    os.environ["JAVA_TOOL_OPTIONS"] += f' "-XX:SharedArchiveFile={run_folder / "torchserve.jsa"}"'
    try:
        (run_folder / "java").mkdir()
    except FileExistsError:
        yield
        return
    script = Path(__file__).with_name("java_helpers.py")
    command = [sys.executable, str(script), str(run_folder / "java"), str(run_folder / "torchserve.jsa")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        yield


@pytest.fixture(scope="session", autouse=True)
def loop_of_clients() -> Iterator[None]:
    """Close the event loop that clients of the review page share, where there are any."""
    yield
    if "review_helpers" in sys.modules:
        sys.modules["review_helpers"].LOOP.close()


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[PostgresServer]:
    """A real PostgreSQL, started once; without the flushes to disk that only a power cut would miss."""
    programs = postgresql_folder()
    if programs is None:
        pytest.skip("there is no PostgreSQL here: install Debian's postgresql, or put its programs on PATH")
    server = PostgresServer(programs, "fsync=off")
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 server, started once, with an empty bucket."""
    server = S3Server()
    yield server
    server.close()


@pytest.fixture
def s3(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before that server, which the environment names, with credentials and a folder for copies."""
    proxy = Proxy(s3_server.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAOFTESTS")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("GUARD_CACHE_DIR", str(tmp_path / "copies"))
    yield proxy
    proxy.go_down()


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty queue with its tables, to be copied: quicker than to build them for every test."""
    path = tmp_path_factory.mktemp("queue") / "template.db"
    Queue.open(f"sqlite:///{path}").close()
    return path


@pytest.fixture(scope="session")
def postgresql_url(postgresql_server: PostgresServer) -> str:
    """A database with the tables of a queue; a test that takes it empties it first."""
    url = postgresql_server.create_database()
    Queue.open(url).close()
    return url


@pytest.fixture(params=["sqlite", "postgresql"])
def queue_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty queue whose tables are built; every test that asks for it runs with both databases."""
    if request.param == "sqlite":
        shutil.copy(request.getfixturevalue("sqlite_template"), tmp_path / "queue.db")
        return f"sqlite:///{tmp_path / 'queue.db'}"
    url: str = request.getfixturevalue("postgresql_url")
    empty_postgresql_queue(url)
    return url


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A real Chromium, started once."""
    program = chromium()
    if program is None:
        pytest.skip("there is no chromium here: install Debian's package chromium")
    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=program, args=list(FLAGS))
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def used_pages() -> list[Page]:
    """Pages that were made to forget all: a new one takes Chromium longer than most tests need a page for."""
    return []


@pytest.fixture
def open_page(browser: Browser, used_pages: list[Page]) -> Iterator[OpenPage]:
    """Open pages, each as a browser of its own; at the end no script may have failed or been stopped by the policy."""
    opened: list[tuple[Page, bool]] = []
    problems: list[str] = []

    def note(message: ConsoleMessage) -> None:
        if message.type == "error" and not EXPECTED.search(message.text):
            problems.append(message.text)

    listeners: dict[str, Callable[[Any], object]] = {
        "console": note,
        "pageerror": lambda error: problems.append(str(error)),
        "dialog": lambda dialog: (problems.append(f"dialog: {dialog.message}"), dialog.dismiss()),
    }

    def open_it(url: str, **settings: Any) -> Page:
        plain = settings.keys() <= PLAIN_SETTINGS.keys()
        page = used_pages.pop() if plain and used_pages else browser.new_context(**settings).new_page()
        opened.append((page, plain))
        if plain:
            set_plain(page, **settings)
        page.set_default_timeout(PATIENCE)
        for event, listener in listeners.items():
            page.on(event, listener)
        page.goto(url)
        return page

    yield open_it
    for page, plain in opened:
        for event, listener in listeners.items():
            page.remove_listener(event, listener)
        if plain and not problems and not page.is_closed():
            forget(page)
            used_pages.append(page)
        else:
            page.context.close()
    assert problems == []
