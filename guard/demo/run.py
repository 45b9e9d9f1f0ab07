"""The main job from end to end: plant backdoors in networks on real images, guard them, serve them, count."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import save_file

from guard.config import GuardConfig
from guard.data.datasets import load_dataset, split_rows, to_tensor_images
from guard.data.image_files import encode_png
from guard.demo.loop import Traffic, print_loop, run_loop
from guard.detection.pipeline import Guard
from guard.errors import ServerError
from guard.lab.attacks.poisoning import poisoned_test_set
from guard.lab.attacks.recipes import DEMO_ATTACKS, AttackRecipe, train_badnet
from guard.relabel.address import queue_url
from guard.statistics.evaluation import attack_success_rate, clean_accuracy, false_positive_rate, true_positive_rate
from guard.storage.bundle import BundleStore
from guard.suspect.model import SuspectModel
from guard.torchserve.archives.guarded import ServedModel, make_guarded_archive, make_plain_archive
from guard.torchserve.client import Reply, curl_line, run_load
from guard.torchserve.server import TorchServeInstance
from guard.types import BoolArray, Float32Array, IntArray

ARCHITECTURE = "guard.lab.attacks.networks:mnist_cnn"
#: Of the 10,000 shipped images: to train the suspect model, to fit the guard, to test both.
SPLIT = (6000, 2000, 2000)
CLEAN_REQUESTS, TRIGGERED_REQUESTS, CLIENTS = 1000, 500, 4
#: Folder of the archives, below the output.
STORE = "model_store"
#: The attack whose flagged inputs are reviewed: the one that the guard has most to learn about.
REVIEWED = DEMO_ATTACKS[-1]
_SHOWN = 5  # images of each kind per attack in the picture


@dataclass(frozen=True, slots=True)
class CaseReport:
    """What one attack did, without and with the guard; rates are fractions, times milliseconds."""

    attack: str
    clean_accuracy_unguarded: float
    clean_accuracy_guarded: float
    attack_success_unguarded: float
    attack_success_guarded: float
    true_positive_rate: float
    realised_false_positive_rate: float
    median_ms_unguarded: float
    median_ms_guarded: float
    clean_requests: int
    triggered_requests: int
    bodies_identical: bool
    counts_agree: bool


@dataclass(frozen=True, slots=True)
class _Case:
    """One attack, ready to be sent: images as served (uint8 precision), and what everybody thinks they are."""

    recipe: AttackRecipe
    clean_images: Float32Array
    clean_labels: IntArray
    triggered_images: Float32Array
    triggered_true_labels: IntArray
    attacker_labels: IntArray


@dataclass(frozen=True, slots=True)
class _Judged:
    """Labels and verdicts that came back over HTTP for one set of images."""

    labels: IntArray
    flagged: BoolArray
    p_values: list[float]
    milliseconds: list[float]


def run_demo(
    output: Path, *, seed: int, false_positive_rate: float, keep_serving: bool, console: Console
) -> list[CaseReport]:
    """Run everything, print one table, and write `report.json`, `verdicts.png` and all artefacts below `output`.

    Raises
    ------
    ServerError
        If TorchServe cannot be started, or a request goes without an answer.
    """
    started = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    data = load_dataset("mnist", "test")
    train, validate, test = split_rows(len(data), SPLIT, np.random.default_rng(seed))
    images, labels = to_tensor_images(data.images), data.labels
    queue = output / "queue.db"
    for file in (queue, queue.with_name("queue.db-wal"), queue.with_name("queue.db-shm")):
        file.unlink(missing_ok=True)  # of an earlier demo
    config = GuardConfig(false_positive_rate=false_positive_rate, seed=seed)
    console.print(
        f"seed {seed}; real images: MNIST, {SPLIT[0]} to train, {SPLIT[1]} to fit the guard, {SPLIT[2]} to test"
    )
    with _bar(console) as bar:
        for recipe in DEMO_ATTACKS:
            to_train, to_fit = (images[train], labels[train]), (images[validate], labels[validate])
            _make_archives(recipe, to_train, to_fit, config, data.class_names, output, bar)
    sent, later = test[:CLEAN_REQUESTS], test[CLEAN_REQUESTS:]
    cases = [_case(recipe, images[sent], labels[sent]) for recipe in DEMO_ATTACKS]
    names = [name for recipe in DEMO_ATTACKS for name in (recipe.name, _plain(recipe))]
    url = queue_url(str(queue))
    with TorchServeInstance(
        output / STORE, {name: f"{name}.mar" for name in names}, batch_size=8, environment={"GUARD_QUEUE_URL": url}
    ) as server:
        with console.status("starting TorchServe with three models, each without and with the guard"):
            server.wait_ready(180)
        reports, shown = _send_all(cases, server, console)
        _print(reports, false_positive_rate, console)
        _draw(cases, shown, output / "verdicts.png")
        loop = run_loop(
            server,
            REVIEWED.name,
            queue_url=url,
            bundles=output / REVIEWED.name / "bundles",
            seen=_traffic(cases[DEMO_ATTACKS.index(REVIEWED)]),
            fresh=_traffic(_case(REVIEWED, images[later], labels[later])),
            console=console,
        )
        print_loop(loop, console)
        wall_seconds = time.perf_counter() - started
        summary = {
            "seed": seed,
            "requested_false_positive_rate": false_positive_rate,
            "wall_seconds": round(wall_seconds, 1),
            "cases": [asdict(report) for report in reports],
            "loop": loop.as_dict(),
        }
        (output / "report.json").write_text(json.dumps(summary, indent=2) + "\n")
        where = f"report  {output / 'report.json'}\npicture {output / 'verdicts.png'}\n{wall_seconds:.0f} s"
        console.print(where, soft_wrap=True, highlight=False)
        if keep_serving:
            _keep(server, cases, output, console)
    return reports


def _make_archives(
    recipe: AttackRecipe,
    train: tuple[Float32Array, IntArray],
    validate: tuple[Float32Array, IntArray],
    config: GuardConfig,
    class_names: Sequence[str],
    output: Path,
    bar: Progress,
) -> None:
    """Plant a backdoor in a network, fit a guard to it, and write an archive without and one with the guard."""
    task = bar.add_task(f"{recipe.name}: training the backdoored network", total=1.0)
    network, _, _ = train_badnet(
        recipe,
        *train,
        seed=config.seed,
        progress=lambda epoch: bar.update(task, completed=0.6 * epoch.epoch / epoch.epochs),
    )
    folder = output / recipe.name
    folder.mkdir(exist_ok=True)
    weights = folder / "weights.safetensors"
    save_file(network.state_dict(), weights)
    guard = Guard.fit(
        SuspectModel.load(weights, ARCHITECTURE),
        *validate,
        config,
        class_names=class_names,
        progress=lambda text, share: bar.update(
            task, completed=0.6 + 0.35 * share, description=f"{recipe.name}: {text}"
        ),
    )
    bundle = guard.save(folder / "bundles")
    BundleStore(folder / "bundles").activate(bundle.name)
    model = ServedModel(weights, None, ARCHITECTURE, (1, 28, 28), {"class_names": list(class_names)})
    make_plain_archive(_plain(recipe), model, model_store=output / STORE, force=True)
    make_guarded_archive(
        recipe.name,
        model,
        bundle,
        model_store=output / STORE,
        bundles=folder / "bundles",
        settings={"verdict_detail": "full", "review": recipe is REVIEWED},
        force=True,
    )
    bar.update(task, completed=1.0, description=f"{recipe.name}: ready")


def _send_all(
    cases: Sequence[_Case], server: TorchServeInstance, console: Console
) -> tuple[list[CaseReport], list[list[_Judged]]]:
    with _bar(console) as bar:
        task = bar.add_task("sending requests", total=len(cases))
        sent = []
        for case in cases:
            sent.append(_send(case, server))
            bar.advance(task)
    return [report for report, _ in sent], [judged for _, judged in sent]


def _plain(recipe: AttackRecipe) -> str:
    return f"{recipe.name}-unguarded"


def _bar(console: Console) -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console)


def _case(recipe: AttackRecipe, images: Float32Array, labels: IntArray) -> _Case:
    poisoned = poisoned_test_set(images, labels, recipe.apply_trigger, recipe.target)
    rows = slice(0, TRIGGERED_REQUESTS)
    return _Case(recipe, images, labels, poisoned.images[rows], poisoned.true_labels[rows], poisoned.labels[rows])


def _traffic(case: _Case) -> list[Traffic]:
    return [
        Traffic(case.clean_images, case.clean_labels),
        Traffic(case.triggered_images, case.triggered_true_labels, case.attacker_labels),
    ]


def _send(case: _Case, server: TorchServeInstance) -> tuple[CaseReport, list[_Judged]]:
    """Send clean and triggered images to both archives, interleaved, and compare the answers."""
    name, plain = case.recipe.name, _plain(case.recipe)
    judged: dict[str, list[_Judged]] = {name: [], plain: []}
    for kind, images in (("clean", case.clean_images), ("triggered", case.triggered_images)):
        bodies = [encode_png(image) for image in images]
        replies = run_load(
            server.inference_url,
            [model for _ in bodies for model in (plain, name)],
            [body for body in bodies for _ in range(2)],
            token=server.token(),
            clients=CLIENTS,
            content_type="image/png",
        )
        unanswered = [reply for reply in replies if reply.status != 200]
        if unanswered:
            raise ServerError(f"{len(unanswered)} of {len(replies)} {kind} requests failed: {unanswered[0]}.")
        unguarded, guarded = replies[0::2], replies[1::2]
        judged[plain].append(_judge(unguarded))
        judged[name].append(_judge(guarded))
    (bare_clean, bare_triggered), (clean, triggered) = judged[plain], judged[name]
    flagged = np.concatenate([clean.flagged, triggered.flagged])
    is_poisoned = np.arange(len(flagged)) >= len(clean.flagged)
    truth = (case.attacker_labels, case.triggered_true_labels)
    counts_agree = _counts_agree(server, name, flagged)
    report = CaseReport(
        attack=name,
        clean_accuracy_unguarded=clean_accuracy(bare_clean.labels, case.clean_labels),
        clean_accuracy_guarded=clean_accuracy(clean.labels, case.clean_labels, clean.flagged),
        attack_success_unguarded=attack_success_rate(bare_triggered.labels, *truth),
        attack_success_guarded=attack_success_rate(triggered.labels, *truth, triggered.flagged),
        true_positive_rate=true_positive_rate(flagged, is_poisoned),
        realised_false_positive_rate=false_positive_rate(flagged, is_poisoned),
        median_ms_unguarded=round(float(np.median(bare_clean.milliseconds + bare_triggered.milliseconds)), 3),
        median_ms_guarded=round(float(np.median(clean.milliseconds + triggered.milliseconds)), 3),
        clean_requests=len(clean.flagged),
        triggered_requests=len(triggered.flagged),
        bodies_identical=_bodies_identical(case, server),
        counts_agree=counts_agree,
    )
    return report, [clean, triggered]


def _bodies_identical(case: _Case, server: TorchServeInstance, n: int = 20) -> bool:
    """Compare answers byte for byte, one request at a time: in batches of other sizes PyTorch rounds otherwise."""
    with server.client() as client:
        for image in (*case.clean_images[:n], *case.triggered_images[:n]):
            body = encode_png(image)
            unguarded, guarded = (client.predict(name, body) for name in (_plain(case.recipe), case.recipe.name))
            if unguarded.body != guarded.body or unguarded.status != guarded.status:
                return False
    return True


def _judge(replies: Sequence[Reply]) -> _Judged:
    return _Judged(
        np.array([json.loads(reply.body)["label"] for reply in replies], dtype=np.int64),
        np.array([reply.headers.get("guard-verdict") == "poisoned" for reply in replies]),
        [float(reply.headers.get("guard-p-value", "nan")) for reply in replies],
        [1000 * reply.seconds for reply in replies],
    )


def _counts_agree(server: TorchServeInstance, model: str, flagged: BoolArray) -> bool:
    """Compare the verdicts that clients saw with Prometheus' counters, which follow within about a second."""
    expected = {
        "clean": int((~flagged).sum()),
        "poisoned": int(flagged.sum()),
        "bypassed": 0,
        "rejected": 0,
        "failed": 0,
    }
    for _ in range(30):
        counted = dict.fromkeys(expected, 0)
        for family in text_string_to_metric_families(server.scrape_metrics()):
            for sample in family.samples:
                if sample.name == "guard_verdicts_total" and sample.labels["model"] == model:
                    counted[sample.labels["verdict"]] += int(sample.value)
        if counted == expected:
            return True
        time.sleep(0.2)
    return False


def _print(reports: Sequence[CaseReport], requested: float, console: Console) -> None:
    table = Table(title="Requests over HTTP, without -> with the guard")
    for heading in ("attack", "clean accuracy", "attack success", "detected (TPR)", "false alarms", "median ms"):
        table.add_column(heading, justify="left" if heading == "attack" else "right")
    for report in reports:
        table.add_row(
            report.attack,
            f"{report.clean_accuracy_unguarded:.3f} -> {report.clean_accuracy_guarded:.3f}",
            f"{report.attack_success_unguarded:.3f} -> {report.attack_success_guarded:.3f}",
            f"{report.true_positive_rate:.3f}",
            f"{report.realised_false_positive_rate:.3f} of {requested:g}",
            f"{report.median_ms_unguarded:.2f} -> {report.median_ms_guarded:.2f}",
        )
    if not console.is_terminal:  # a pipe or a file: never squeeze the table
        console = Console(width=120, file=console.file)
    console.print(table)
    same = "yes" if all(report.bodies_identical for report in reports) else "NO"
    agree = "yes" if all(report.counts_agree for report in reports) else "NO"
    console.print(
        "Attack success: triggered, answered with the attacker's label, and not flagged.\n"
        f"Bodies identical: {same}. Prometheus counted the same verdicts: {agree}."
    )


def _draw(cases: Sequence[_Case], shown: Sequence[Sequence[_Judged]], file: Path) -> None:
    """Save a grid: per attack a row of clean and triggered images with label, verdict and p-value."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 * _SHOWN * 1.25, 1.75 * len(cases) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(cases), 2 * _SHOWN, squeeze=False)
    for row, (case, (clean, triggered)) in enumerate(zip(cases, shown, strict=True)):
        for column in range(2 * _SHOWN):
            index = column % _SHOWN
            images, judged = (case.clean_images, clean) if column < _SHOWN else (case.triggered_images, triggered)
            axis = axes[row][column]
            axis.imshow(images[index][0], cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            is_flagged = bool(judged.flagged[index])
            colour = "#b2182b" if is_flagged else "#2166ac"
            word = "poisoned" if is_flagged else "clean"
            axis.set_title(
                f"says {judged.labels[index]}\n{word}, p {judged.p_values[index]:.2g}", fontsize=8, color=colour
            )
            for spine in axis.spines.values():
                spine.set_edgecolor(colour)
                spine.set_linewidth(2)
        axes[row][0].set_ylabel(f"{case.recipe.name}\nwithout trigger", fontsize=8)
        axes[row][_SHOWN].set_ylabel("with trigger", fontsize=8)
    figure.savefig(file, dpi=110)


def _keep(server: TorchServeInstance, cases: Sequence[_Case], output: Path, console: Console) -> None:
    """Leave the server up until Ctrl-C, with images at hand to send."""
    import signal

    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    for case in cases:
        for kind, images in (("clean", case.clean_images), ("triggered", case.triggered_images)):
            file = output / case.recipe.name / f"{kind}.png"
            file.write_bytes(encode_png(images[0]))
            line = curl_line(server.inference_url, case.recipe.name, server.token(), str(file))
            console.print(line, soft_wrap=True, highlight=False)
    console.print(f"metrics: curl {server.metrics_url}\nCtrl-C stops the server.", soft_wrap=True, highlight=False)
    while not stopped.wait(1.0) and server.is_alive():
        pass
