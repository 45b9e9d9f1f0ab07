"""What the lost numbers of the paper could have been: norm orders of the novelty detector, and noise of table 7.

    python benchmarks/fusion/side_studies.py

Every choice is shown with what can be known of it from clean validation images, and with its outcome on poisoned ones.
The tables of the paper use one choice for all cases, made beforehand.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import CASES, parser, percent
from studies import BENIGN_NOISE, NOISE_STUDY, NORM_STUDY, Records, Request

from guard.lab.zoo.collection import Zoo


@dataclass(frozen=True, slots=True)
class SideStudy:
    """One choice, in a few cases.

    Attributes
    ----------
    name : str
        Of the CSV file.
    title, setting : str
        For people; `setting` heads the column of choices.
    request : Request
        Its record has a group per choice.
    measures : mapping of str to str
        Rates of a group and their titles. Those in `PLAIN_NUMBERS` are no rates.
    models : mapping of str to tuple of str
        Zoo models by the name of their line; a line shows their mean.
    """

    name: str
    title: str
    setting: str
    request: Request
    measures: Mapping[str, str]
    models: Mapping[str, tuple[str, ...]]

    def wanted(self) -> dict[str, list[Request]]:
        """Return which records are needed, by model."""
        return {model: [self.request] for models in self.models.values() for model in models}

    def publish(self, records: Records, results: Path) -> None:
        """Write the CSV file and print the table."""
        results.mkdir(parents=True, exist_ok=True)
        with (results / f"{self.name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("case", self.setting.replace(" ", "_"), *self.measures))
            for case, models in self.models.items():
                found = [record for model in models if (record := records.get(model, self.request)) is not None]
                if len(found) < len(models):
                    writer.writerow(
                        (case, f"{len(models) - len(found)} missing in the zoo", *[""] * len(self.measures))
                    )
                for choice in found[0] if found else ():
                    groups = [record[choice] for record in found]
                    writer.writerow((case, choice, *(_mean(measure, groups) for measure in self.measures)))
        print(f"\n{self.title}\n{self.as_markdown(results)}", flush=True)

    def as_markdown(self, results: Path) -> str:
        """Return the table of a CSV file that `publish` wrote."""
        with (results / f"{self.name}.csv").open(encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file))[1:]
        head = ["case", self.setting, *self.measures.values()]
        return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


PLAIN_NUMBERS = ("accepting_classes",)


def _mean(measure: str, groups: Sequence[Mapping[str, float | list[float]]]) -> str:
    values = [value[0] if isinstance(value := group[measure], list) else value for group in groups]
    mean = statistics.mean(values)
    return f"{mean:.2f}" if measure in PLAIN_NUMBERS else f"{percent(mean):.2f}"


NORM_ORDERS = SideStudy(
    name="norm_orders",
    title="Norms that summarise the features, novelty detector alone",
    setting="norms",
    request=NORM_STUDY,
    measures={
        "accepting_classes": "classes that accept a clean validation image",
        "validation_false_positive": "false alarms on validation",
        "true_negative": "TN",
        "false_negative": "FN",
    },
    models={case: CASES[case].models for case in ("b", "d", "f")},
)
NOISE = SideStudy(
    name="noise_std",
    title="Standard deviation of the noise, published rule",
    setting="standard deviation",
    request=NOISE_STUDY,
    measures={
        "noisy_validation_accuracy": "accuracy on noisy validation images",
        "validation_false_positive": "false alarms on validation",
        "clean_accuracy": "clean accuracy",
        "attack_success": "attack success",
    },
    models={case: CASES[case].models[:1] for case in ("b", "e", "f")},
)
BENIGN = SideStudy(
    name="benign_noise",
    title="Accuracy of benign models on validation images with noise",
    setting="standard deviation",
    request=BENIGN_NOISE,
    measures={"clean_accuracy": "clean accuracy", "noisy_accuracy": "with noise", "loss": "loss"},
    models={
        "MNIST (a)": tuple(f"mnist-benign-mnist_cnn-{seed}" for seed in range(3)),
        "MNIST (b)": tuple(f"mnist-benign-mnist_small-{seed}" for seed in range(3)),
        "GTSRB (c)": tuple(f"gtsrb-benign-gtsrb_cnn-{seed}" for seed in range(1)),
        "GTSRB (d, e)": tuple(f"gtsrb-benign-gtsrb_cnn_unpadded-{seed}" for seed in range(1)),
        "CIFAR-10": tuple(f"cifar10-benign-resnet20-{seed}" for seed in range(2)),
        "Yale B": tuple(f"yaleb-benign-deepid-{seed}" for seed in range(2)),
    },
)
SIDE_STUDIES = (NORM_ORDERS, BENIGN, NOISE)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and publish all of them."""
    options = parser("Norm orders and noise: what the lost numbers of the paper could have been.").parse_args(arguments)
    records = Records(options.records, Zoo(options.zoo), options.fresh)
    for study in SIDE_STUDIES:
        records.require(study.wanted(), options.workers)
        study.publish(records, options.results)


if __name__ == "__main__":
    main()
