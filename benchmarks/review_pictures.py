"""Take the pictures of the review page that docs/review.md shows, with real flagged inputs, in a real browser.

Fits a guard for a model of the zoo on clean images, sends it triggered and clean ones, puts what it flags into a queue,
and photographs every page in light, in dark and at phone width. Needs chromium, playwright, and the image sets of the
zoo (GUARD_DATA_DIR).

    python benchmarks/review_pictures.py --output build/review        # all pages
    python benchmarks/review_pictures.py --docs                       # the three of docs/images/review
"""

from __future__ import annotations

import argparse
import io
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from guard import Guard, GuardConfig, SuspectModel
from guard.bundle import BundleStore
from guard.relabel.groups import refresh_groups
from guard.relabel.items import Answer, FlaggedInput
from guard.relabel.queue import Queue
from guard.relabel.reviewers import Reviewers
from guard.relabel.rounds import Rounds
from guard.review import Desk
from guard.review.desk import CleanImages
from guard.review.known_bundles import KnownBundles
from guard.review.occlusion import Occlusion
from guard.review.server import serving_in_thread
from guard.types import Float32Array, IntArray
from guard.zoo.collection import Zoo, default_zoo_dir
from guard.zoo.splits import load_split

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
DOCS = {"item.png": "looks-light-desk.png", "group.png": "group-dark-desk.png", "phone.png": "review-light-phone.png"}


class Sent(NamedTuple):
    """Images in the order they are sent, what they show, and which carry the trigger."""

    images: Float32Array
    labels: IntArray
    is_triggered: np.ndarray


def flagged_inputs(guard: Guard, suspect: SuspectModel, sent: Sent, model: str) -> tuple[list[FlaggedInput], list[int]]:
    """Return what the guard flags, as a server would hand it over, and which rows these are."""
    activations = suspect.activations(sent.images)
    scores, names = guard.scores(activations), guard.ensemble.names
    verdicts = guard.decide(activations)
    backup = np.exp(guard.ensemble.replacement_logits(activations).astype(np.float64))
    backup /= backup.sum(axis=1, keepdims=True)
    rows = [int(row) for row in np.flatnonzero(scores.is_poisoned)]
    now = datetime.now(UTC)
    found = []
    for place, row in enumerate(rows):
        found.append(
            FlaggedInput(
                request_id=f"{model}-{row:05d}",
                model=model,
                bundle_digest=guard.digest or "",
                suspect_label=verdicts[row].label,
                backup_label=int(backup[row].argmax()),
                backup_confidence=float(backup[row].max()),
                raw=dict(zip(names, scores.raw[row].tolist(), strict=True)),
                surprise=dict(zip(names, scores.surprise[row].tolist(), strict=True)),
                combined=verdicts[row].score,
                p_value=verdicts[row].p_value,
                reason=verdicts[row].reason,
                content_type="image/png",
                body=_png(sent.images[row]),
                inputs=sent.images[row],
                activations=activations[row : row + 1],
                received_at=now - timedelta(seconds=37 * (len(rows) - place)),
            )
        )
    return found, rows


def _png(image: Float32Array) -> bytes:
    pixels = np.rint(255 * image.clip(0, 1)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def prepare(zoo_model: str, folder: Path, n_clean: int) -> tuple[Desk, Sent, list[int], str]:
    """Return a desk with a filled queue, what was sent, the flagged rows, and the token of ada."""
    zoo = Zoo(default_zoo_dir())
    card = zoo.card(zoo_model)
    split = load_split(card.data_set)
    suspect = SuspectModel(zoo.load(zoo_model))
    clean, labels = split.validation.images[:n_clean], split.validation.labels[:n_clean]
    store = BundleStore(folder / "bundles")
    if store.active_digest() is None:
        fitted = Guard.fit(suspect, clean, labels, GuardConfig(false_positive_rate=0.02), class_names=split.class_names)
        store.activate(fitted.save(folder / "bundles").name)
    guard = Guard.load(store.active_path(), suspect)
    attack = card.restore_attack()
    triggered = attack.test_sets(split.test.images[:120], split.test.labels[:120])[0]
    rng = np.random.default_rng(0)
    images = np.concatenate([triggered.images, split.test.images[200:1700]])
    true_labels = np.concatenate([triggered.true_labels, split.test.labels[200:1700]])
    order = rng.permutation(len(images))
    is_triggered = (np.arange(len(images)) < len(triggered.images))[order]
    sent = Sent(images[order], true_labels[order], is_triggered)
    found, rows = flagged_inputs(guard, suspect, sent, card.data_set)
    database = folder / "queue.db"
    for file in folder.glob("queue.db*"):
        file.unlink()
    queue = Queue.open(f"sqlite:///{database}")
    queue.enqueue(found)
    refresh_groups(queue, card.data_set)
    reviewers = Reviewers(queue)
    token = reviewers.add("ada", "admin")
    reviewers.add("bo")
    bundles = KnownBundles(folder / "bundles")
    desk = Desk(queue, reviewers, Rounds(queue), bundles, CleanImages(clean, labels), Occlusion(suspect))
    return desk, sent, rows, token


def answer_some(desk: Desk, sent: Sent, rows: Sequence[int], n: int) -> None:
    """Let both reviewers answer a few items truthfully, and note two retrainings, so that no page is empty."""
    by_request = {f"-{row:05d}": row for row in rows}
    for reviewer, count in (("ada", n), ("bo", n // 2)):
        items = desk.queue.claim(reviewer, count, order="age")
        known = [by_request[item.input.request_id[-6:]] for item in items]
        desk.queue.decide_many(
            reviewer,
            [
                Answer(item_id=item.id, is_poisoned=bool(sent.is_triggered[row]), true_label=int(sent.labels[row]))
                for item, row in zip(items, known, strict=True)
            ],
        )
    # Figures as a gate reports them; of no measurement, for the picture only.
    report = {
        "before": {"clean accuracy": 0.9702, "attack success rate": 0.081, "false alarms": 0.0204},
        "after": {"clean accuracy": 0.9711, "attack success rate": 0.012, "false alarms": 0.0198},
        "reasons": ["all hold-outs passed"],
    }
    model = desk.models()[0]
    refused = {**report, "after": {**report["after"], "clean accuracy": 0.951}}
    refused["reasons"] = ["clean accuracy fell by 0.0192, more than the 0.005 allowed"]
    desk.rounds.finish(desk.rounds.begin(model, 12), "refused", refused)
    desk.rounds.finish(desk.rounds.begin(model, n), "promoted", report)


def photograph(desk: Desk, token: str, output: Path, widths: dict[str, tuple[int, int]]) -> None:
    """Take every page in every theme and width."""
    from playwright.sync_api import sync_playwright

    output.mkdir(parents=True, exist_ok=True)
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    with serving_in_thread(desk) as url, sync_playwright() as play:
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
    parser.add_argument("--docs", action="store_true", help="only the three pictures of docs/images/review")
    arguments = parser.parse_args()
    folder = arguments.output / arguments.model
    folder.mkdir(parents=True, exist_ok=True)
    desk, sent, rows, token = prepare(arguments.model, folder, arguments.clean_images)
    answer_some(desk, sent, rows, 24)
    widths = {"desk": (1440, 900), "phone": (390, 1560)}  # the phone is tall enough for all of an item
    pictures = folder / "pictures"
    photograph(desk, token, pictures, widths)
    desk.queue.close()
    if arguments.docs:
        for name, picture in DOCS.items():
            with Image.open(pictures / picture) as image:  # 256 colours: a third of the bytes
                image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(ROOT / "docs/images/review" / name)
    print(f"pictures in {ROOT / 'docs/images/review' if arguments.docs else pictures}")


if __name__ == "__main__":
    main()
