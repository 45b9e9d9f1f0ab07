"""Take the pictures of the review page that docs/review.md shows, with real flagged inputs, in a real browser.

Fits a guard for a model of the zoo on clean images, sends it triggered and clean ones, puts what it flags into a queue,
lets two reviewers answer truthfully, retrains, and photographs every page in light, in dark and at phone width.
Verdicts, times per image, answers and retrainings are real; only the clock is not: what takes two minutes is told as an
hour, with the triggered images as a wave in it. Needs chromium, playwright, and the image sets of the zoo
(GUARD_DATA_DIR).

    python benchmarks/review_pictures.py --output build/review        # all pages
    python benchmarks/review_pictures.py --docs                       # those of docs/images/review
"""

from __future__ import annotations

import argparse
import io
import shutil
import time
from collections import defaultdict
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from guard import Guard, GuardConfig, SuspectModel
from guard.lab.zoo.collection import Zoo, default_zoo_dir
from guard.lab.zoo.splits import load_split
from guard.observing.scrape import Series
from guard.relabel.groups import refresh_groups
from guard.relabel.items import FlaggedInput
from guard.relabel.queue import Queue
from guard.relabel.reviewers import Reviewers
from guard.relabel.rounds import Rounds
from guard.retrainer.worker import Retrainer
from guard.review.known_bundles import KnownBundles
from guard.review.occlusion import Occlusion
from guard.review.server import serving_in_thread
from guard.review.status.sampler import Sampler
from guard.review.workspace import CleanImages, Workspace
from guard.serving.bookkeeping import Bookkeeping
from guard.serving.outcomes import Outcome
from guard.storage.bundle import BundleStore
from guard.telemetry import prometheus_names
from guard.types import Activations, Float32Array, IntArray, Verdict

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
#: Pictures of docs/review.md, and which of the pictures each is.
DOCS = {
    "item.png": "looks-light-workspace.png",
    "group.png": "group-dark-workspace.png",
    "phone.png": "review-light-phone.png",
    "status.png": "status-dark-workspace.png",
    "status_phone.png": "status-light-phone.png",
    "progress.png": "progress-light-workspace.png",
}
#: Minutes of the hour in which the triggered images come.
WAVE = (24.0, 32.0)
#: Minutes of the hour at which reviewers answer, and after which a retraining follows.
ANSWERED = (38.0, 50.0)


class Clock:
    """The time that the queue goes by: real, or set to a minute of the hour."""

    def __init__(self) -> None:
        self.begin = datetime.now(UTC) - timedelta(hours=1)
        self.minute: float | None = None

    def __call__(self) -> datetime:
        return datetime.now(UTC) if self.minute is None else self.at(self.minute)

    def at(self, minute: float) -> datetime:
        """Return a minute of the hour as a time."""
        return self.begin + timedelta(minutes=minute)


class Sent(NamedTuple):
    """Images in the order they are sent, what they show, which carry the trigger, and in which minute they come."""

    images: Float32Array
    labels: IntArray
    is_triggered: np.ndarray
    minutes: np.ndarray


class Shop:
    """A served model without the server: judges one image after the other, and counts as a worker does."""

    def __init__(self, guard: Guard, suspect: SuspectModel, model: str) -> None:
        self.guard, self.suspect, self.model = guard, suspect, model
        self.books = Bookkeeping(model)
        self.books.open(guard, ())
        self.counts: dict[Series, float] = defaultdict(float)
        self.sampler = Sampler(["http://127.0.0.1:8082"], read=lambda _: self.read())

    def read(self) -> dict[Series, float]:
        """Return the counters, as a metrics address would show them."""
        labels = {name: names for name, _, names in prometheus_names()}
        for sample in self.books.metrics.drain():
            series = Series.of(sample.name, dict(zip(labels[sample.name], sample.labels, strict=True)))
            self.counts[series] = sample.value if sample.kind == "gauge" else self.counts[series] + sample.value
        return dict(self.counts)

    def judge(self, image: Float32Array) -> tuple[Verdict, Activations]:
        """Return the verdict of one image, shape (channels, height, width), and count it with its times."""
        began = time.perf_counter()
        activations = self.suspect.activations(image[None])
        ran = time.perf_counter()
        (verdict,) = self.guard.decide(activations)
        done = time.perf_counter()
        self.books.stages(done - began, done - ran)
        outcome = Outcome("poisoned" if verdict.is_poisoned else "clean", verdict)
        self.books.request(outcome, 200, self.guard, _NoRequests(), 0)
        return verdict, activations


class _NoRequests:
    def request_id(self, index: int) -> str:
        return "picture"

    def headers(self, index: int) -> dict[str, str]:
        return {}


def send(shop: Shop, sent: Sent, clock: Clock, queue: Queue, begin: float, end: float) -> None:
    """Send everything of some minutes in order, and put what is flagged into the queue."""
    looked = begin
    for row in np.argsort(sent.minutes, kind="stable").tolist():
        if not begin <= sent.minutes[row] < end:
            continue
        while looked <= sent.minutes[row]:
            shop.sampler.look(clock.at(looked).timestamp())
            looked += 0.25
        verdict, activations = shop.judge(sent.images[row])
        if verdict.is_poisoned:
            flagged = flagged_input(shop, sent.images[row], verdict, activations, f"{shop.model}-{row:05d}")
            queue.enqueue([replace(flagged, received_at=clock.at(sent.minutes[row]))])
            shop.books.sent_to_review(["queued"])
    shop.sampler.look(clock.at(end).timestamp())


def flagged_input(
    shop: Shop, image: Float32Array, verdict: Verdict, activations: Activations, request_id: str
) -> FlaggedInput:
    """Return what the guard flagged, as a server would hand it over."""
    guard, names = shop.guard, shop.guard.ensemble.names
    scores = guard.scores(activations)
    backup = np.exp(guard.ensemble.replacement_logits(activations).astype(np.float64))[0]
    backup /= backup.sum()
    return FlaggedInput(
        request_id=request_id,
        model=shop.model,
        bundle_digest=guard.digest or "",
        suspect_label=verdict.label,
        backup_label=int(backup.argmax()),
        backup_confidence=float(backup.max()),
        raw=dict(zip(names, scores.raw[0].tolist(), strict=True)),
        surprise=dict(zip(names, scores.surprise[0].tolist(), strict=True)),
        combined=verdict.score,
        p_value=verdict.p_value,
        reason=verdict.reason,
        content_type="image/png",
        body=_png(image),
        inputs=image,
        activations=activations,
        received_at=datetime.now(UTC),
    )


def _png(image: Float32Array) -> bytes:
    pixels = np.rint(255 * image.clip(0, 1)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def prepare(zoo_model: str, folder: Path, n_clean: int) -> tuple[Workspace, Shop, Sent, Clock, str]:
    """Return a workspace with a filled queue, what serves, what was sent, the clock, and the token of ada."""
    zoo = Zoo(default_zoo_dir())
    card = zoo.card(zoo_model)
    split = load_split(card.data_set)
    suspect = SuspectModel(zoo.load(zoo_model))
    clean, labels = split.validation.images[:n_clean], split.validation.labels[:n_clean]
    shutil.rmtree(folder / "bundles", ignore_errors=True)
    store = BundleStore(folder / "bundles")
    fitted = Guard.fit(suspect, clean, labels, GuardConfig(false_positive_rate=0.02), class_names=split.class_names)
    store.activate(fitted.save(folder / "bundles").name)
    guard = Guard.load(store.active_path(), suspect)
    attack = card.restore_attack()
    triggered = attack.test_sets(split.test.images[:120], split.test.labels[:120])[0]
    rng = np.random.default_rng(0)
    images = np.concatenate([triggered.images, split.test.images[200:3200]])
    true_labels = np.concatenate([triggered.true_labels, split.test.labels[200:3200]])
    is_triggered = np.arange(len(images)) < len(triggered.images)
    minutes = np.where(is_triggered, rng.uniform(*WAVE, len(images)), rng.uniform(0, 60, len(images)))
    sent = Sent(images, true_labels, is_triggered, minutes)
    for file in folder.glob("queue.db*"):
        file.unlink()
    clock = Clock()
    queue = Queue.open(f"sqlite:///{folder / 'queue.db'}", clock=clock)
    shop = Shop(guard, suspect, card.data_set)
    send(shop, sent, clock, queue, 0, 52)
    reviewers = Reviewers(queue)
    token = reviewers.add("ada", "admin")
    reviewers.add("bo")
    bundles = KnownBundles(folder / "bundles")
    parts = (CleanImages(clean, labels), Occlusion(suspect))
    return Workspace(queue, reviewers, Rounds(queue), bundles, *parts, metrics=shop.sampler), shop, sent, clock, token


def answer_some(workspace: Workspace, sent: Sent, clock: Clock, shares: dict[str, int]) -> None:
    """Let reviewers answer truthfully, one item after the other, and retrain twice: midway, and at the end."""
    total, given = sum(shares.values()), 0
    retrain_at = {total // 4, total}
    left = dict(shares)
    while any(left.values()):
        for reviewer in [name for name, count in left.items() if count]:
            clock.minute = ANSWERED[0] + (ANSWERED[1] - ANSWERED[0]) * given / total
            (item,) = workspace.queue.claim(reviewer, 1, order="age")
            row = int(item.input.request_id[-5:])
            is_poisoned, label = bool(sent.is_triggered[row]), int(sent.labels[row])
            workspace.queue.decide(reviewer, item.id, is_poisoned=is_poisoned, true_label=label)
            left[reviewer] -= 1
            given += 1
            if given in retrain_at:
                retrain(workspace, item.input.model)
    clock.minute = None
    refresh_groups(workspace.queue, workspace.models()[0])


def retrain(workspace: Workspace, model: str) -> None:
    """Run one round, as the button on the page asks for it."""
    store = workspace.bundles.store
    assert store is not None
    workspace.rounds.request(model, "ada")
    with Retrainer(workspace.queue, store.root, model) as retrainer:
        finished = retrainer.step()
    print(finished.line if finished is not None else "no round")


def photograph(workspace: Workspace, token: str, output: Path, widths: dict[str, tuple[int, int]]) -> None:
    """Take every page in every theme and width."""
    from playwright.sync_api import sync_playwright

    output.mkdir(parents=True, exist_ok=True)
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    with serving_in_thread(workspace) as url, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=executable, args=CHROMIUM_FLAGS)
        for theme in ("light", "dark"):
            for width, (across, down) in widths.items():
                context = browser.new_context(viewport={"width": across, "height": down}, color_scheme=theme)
                walk_through(context.new_page(), url, token, output, f"{theme}-{width}")
                context.close()
        browser.close()


def walk_through(page: Page, url: str, token: str, output: Path, ending: str) -> None:
    """Log in and visit every page."""

    def shoot(name: str) -> None:
        page.wait_for_load_state("networkidle")
        page.screenshot(path=output / f"{name}-{ending}.png")

    page.goto(f"{url}/login")
    shoot("login")
    page.fill("#name", "ada")
    page.fill("#token", token)
    page.get_by_role("button", name="Log in").click()
    page.wait_for_selector("#picture")
    shoot("review")
    page.keyboard.press("o")
    page.locator("#overlay img").evaluate("picture => picture.decode()")
    shoot("looks")
    for name in ("groups", "answers", "progress", "admin"):
        page.goto(f"{url}/{name}")
        shoot(name)
    page.goto(f"{url}/status")
    page.wait_for_selector(".plot canvas")
    page.wait_for_load_state("networkidle")
    page.screenshot(path=output / f"status-{ending}.png", full_page=ending.endswith("workspace"))
    page.goto(f"{url}/groups")
    page.locator(".group a").first.click()
    page.wait_for_selector(".tile")
    shoot("group")
    page.get_by_role("button", name="Leave").click()
    page.wait_for_url(f"{url}/groups")
    page.goto(f"{url}/review")
    page.keyboard.press("?")
    shoot("keys")


def main() -> None:
    """Make the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gtsrb-c-gtsrb_cnn-0", help="model of the zoo")
    parser.add_argument("--clean-images", type=int, default=2500, help="clean images to fit the guard on")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "review")
    parser.add_argument("--docs", action="store_true", help="only the pictures of docs/images/review")
    arguments = parser.parse_args()
    folder = arguments.output / arguments.model
    folder.mkdir(parents=True, exist_ok=True)
    workspace, shop, sent, clock, token = prepare(arguments.model, folder, arguments.clean_images)
    answer_some(workspace, sent, clock, {"ada": 50, "bo": 30})
    store = BundleStore(folder / "bundles")
    if store.active_digest() != shop.guard.digest:  # as every worker does within two seconds
        learned = Guard.load(store.active_path(), shop.suspect)
        shop.books.swapped(shop.guard, learned)
        shop.guard = learned
    left = (datetime.now(UTC) - clock.at(52)).total_seconds() / 60
    late = sent.minutes > 52
    stretched = np.where(late, 52 + (sent.minutes - 52) * left / 8, sent.minutes)  # up to now
    send(shop, sent._replace(minutes=stretched), clock, workspace.queue, 52, 52 + left)
    shop.sampler.look(time.time())
    widths = {"workspace": (1440, 900), "phone": (390, 1560)}  # the phone is tall enough for all of an item
    pictures = folder / "pictures"
    photograph(workspace, token, pictures, widths)
    workspace.queue.close()
    if arguments.docs:
        for name, picture in DOCS.items():
            with Image.open(pictures / picture) as image:  # 256 colours: a third of the bytes
                image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(ROOT / "docs/images/review" / name)
    print(f"pictures in {ROOT / 'docs/images/review' if arguments.docs else pictures}")


if __name__ == "__main__":
    main()
