"""BadNets, figure 6: errors against the share of backdoored images in the training set.

    python benchmarks/badnets/poison_rate.py

Pattern trigger, all-to-all (the attack that the paper is discussing where it shows the figure; its caption is lost in
the text that we have), copies added to all 60,000 training images, three seeds. A fixed number of epochs: every clean
image is seen as often at every share. A run that is interrupted goes on where it was.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from drawings import draw_shares
from trials import GrowingCsv, error, load_mnist, parser, train

from guard.lab.attacks.poisoning import Backdoor, poison, poisoned_test_set
from guard.lab.attacks.targets import AllToAll
from guard.lab.attacks.triggers import make_trigger
from guard.lab.zoo.splits import LabelledImages

SEEDS = (0, 1, 2)
EPOCHS = 4
#: Backdoored copies as a share of the whole training set; the paper's text names 10 %. The last is one half as nearly
#: as poisoning allows, which takes fewer copies than there are images.
SHARES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.33, 0.4999)


def copies_per_clean_image(share: float) -> float:
    """Return the rate at which copies must be added to make up a share of the whole."""
    return share / (1.0 - share)


def train_share(data: LabelledImages, test: LabelledImages, share: float, seed: int) -> dict[str, float]:
    """Train with a share of backdoored images, none if it is 0, and measure both errors."""
    trigger, target = make_trigger("pixel_pattern"), AllToAll(10)
    images, labels = data.images, data.labels
    if share > 0:
        backdoor = Backdoor(trigger, target, copies_per_clean_image(share))
        poisoned = poison(images, labels, backdoor, np.random.default_rng(seed))
        images, labels = poisoned.images, poisoned.labels
    network, seconds = train(images, labels, epochs=EPOCHS, seed=seed)
    triggered = poisoned_test_set(test.images, test.labels, trigger, target)
    return {
        "clean_images": len(data),
        "backdoored_images": len(labels) - len(data),
        "clean_error": error(network, test.images, test.labels),
        "backdoor_error": error(network, triggered.images, triggered.labels),
        "training_seconds": seconds,
    }


def summary(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """Return a line per share: mean of both errors and their range over seeds, in percent."""
    lines = [f"{'share':>8}{'copies':>9}{'clean error':>24}{'backdoor error':>26}"]
    for share in sorted({row["share"] for row in rows}):
        selected = [row for row in rows if row["share"] == share]
        clean, backdoor = ([100 * row[name] for row in selected] for name in ("clean_error", "backdoor_error"))
        lines.append(
            f"{100 * share:7.4g}%{selected[0]['backdoored_images']:>9g}"
            f"{f'{statistics.mean(clean):.2f} ({min(clean):.2f} - {max(clean):.2f})':>24}"
            f"{f'{statistics.mean(backdoor):.2f} ({min(backdoor):.2f} - {max(backdoor):.2f})':>26}"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, print the table, and draw the figure."""
    options = parser(__doc__).parse_args(arguments)
    results = GrowingCsv(
        options.results / "poison_rate.csv",
        ("share", "seed"),
        ("clean_images", "backdoored_images", "clean_error", "backdoor_error", "training_seconds"),
        fresh=options.fresh,
    )
    data, test = load_mnist("train"), load_mnist("test")
    print(f"seeds {SEEDS}, {EPOCHS} epochs; percent, mean (lowest - highest) over seeds", flush=True)
    for seed in SEEDS:
        for share in (0.0, *SHARES):
            if not results.has(share, seed):
                measured = train_share(data, test, share, seed)
                results.append(share=share, seed=seed, **measured)
                print(
                    f"share {share:g}, seed {seed}: clean error {measured['clean_error']:.2%}, "
                    f"backdoor error {measured['backdoor_error']:.2%}, {measured['training_seconds']:.0f} s",
                    flush=True,
                )
    print("\n".join(summary(results.rows)))
    draw_shares(results.rows, options.images / "figure_6.png")


if __name__ == "__main__":
    main()
