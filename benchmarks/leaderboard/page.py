"""From records to CSV files, the tables of docs/leaderboard.md, and pictures."""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from measuring import FIXED_RATE
from records import PROJECT, Records

from guard.lab.rivals import Rival
from guard.lab.zoo.collection import Zoo

RESULTS = PROJECT / "benchmarks" / "results"
DOCUMENT = PROJECT / "docs" / "leaderboard.md"
PICTURES = PROJECT / "docs" / "images" / "leaderboard"
#: Two-sided 95 % quantile of Student's distribution, by the number of seeds.
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
FIELDS = (
    *("detector", "model", "data_set", "attack", "protocol", "seed", "auroc", "tpr_at_fpr_0_01", "tpr_at_fpr_0_05"),
    *("realised_false_positive_rate", "passes", "milliseconds"),
)
Row = dict[str, Any]


def publish(
    records: Records,
    zoo: Zoo,
    contestants: Mapping[str, type[Rival]],
    seeds: Iterable[int],
    curve: tuple[Sequence[str], Sequence[str], Sequence[int]],
) -> None:
    """Write everything from the records that are there."""
    models = [card.name for card in zoo.cards()]
    found = [
        {"detector": name, "model": model, "seed": seed, **figures}
        for name in contestants
        for model in models
        for seed in seeds
        if (figures := records.read(model, name, seed)) is not None
    ]
    rows = list(tidy_rows(found))
    write_csv(RESULTS / "leaderboard.csv", FIELDS, rows)
    after = [
        {"model": entry["model"], "seed": entry["seed"], **entry["after"]}
        for entry in found
        if "after" in entry
        if entry["detector"] == "guard"
    ]
    after_fields = ("clean_accuracy_before", "clean_accuracy", "attack_success_before", "attack_success", "recovered")
    write_csv(RESULTS / "leaderboard_guard.csv", ("model", "seed", *after_fields), after)
    by_images = [
        {"detector": name, "model": model, "images": n, **figures["all"], "seed": 0}
        for name in curve[0]
        for model in curve[1]
        for n in curve[2]
        if (figures := records.read(model, name, 0, n)) is not None and "all" in figures
    ]
    curve_fields = ("detector", "model", "images", "seed", "auroc", "tpr_at_fpr_0_01", "tpr_at_fpr_0_05")
    write_csv(RESULTS / "leaderboard_images.csv", curve_fields, by_images)
    titles = {name: rival.title for name, rival in contestants.items()}
    not_applicable = [entry for entry in found if "not_applicable" in entry]
    _draw(rows, titles, by_images)
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, markdown in (
        ("detectors", _detectors(rows, titles, not_applicable)),
        ("models", _models(rows, titles)),
        ("benign", _benign(rows, titles)),
        ("after", _after(after)),
        ("images", _by_images(by_images, titles)),
    ):
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = pattern.sub(lambda match, table=markdown: f"{match[1]}{table}\n{match[2]}", text)
    DOCUMENT.write_text(text, encoding="utf-8")


def tidy_rows(found: list[Row]) -> Iterable[Row]:
    """Return a row per record and protocol: all, hits, or benign."""
    for entry in found:
        if "not_applicable" in entry:
            continue
        shared = {name: entry[name] for name in FIELDS if name in entry}
        for protocol in ("all", "hits"):
            if protocol in entry:
                yield shared | {"protocol": protocol} | entry[protocol]
        if "all" not in entry:
            yield shared | {"protocol": "benign"}


def write_csv(path: Path, fields: Sequence[str], rows: Iterable[Row]) -> None:
    """Write rows with five significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {name: f"{value:.5g}" if isinstance(value, float) else value for name, value in row.items()}
            )


def seed_means(rows: Iterable[Row], quantity: str) -> dict[str, float]:
    """Return the mean over detector seeds by model."""
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row["model"], []).append(row[quantity])
    return {model: statistics.fmean(of_model) for model, of_model in values.items()}


def _interval(rows: Sequence[Row], quantity: str) -> str:
    """Return half the width of the 95 % interval, over seeds, of the mean over the models that all seeds share."""
    by_seed: dict[int, dict[str, float]] = {}
    for row in rows:
        by_seed.setdefault(row["seed"], {})[row["model"]] = row[quantity]
    if len(by_seed) < 2:
        return ""
    shared = set.intersection(*(set(values) for values in by_seed.values()))
    if not shared:
        return ""
    means = [statistics.fmean(values[model] for model in shared) for values in by_seed.values()]
    half = STUDENT.get(len(means), 1.96) * statistics.stdev(means) / len(means) ** 0.5
    return f" ± {half:.3f}"


def _detectors(rows: list[Row], titles: Mapping[str, str], not_applicable: list[Row]) -> str:
    lines = [
        "| detector | models (seeds) | AUROC mean | worst | TPR at FPR 0.01 mean | worst | at 0.05 mean | worst "
        "| hits only: AUROC, TPR at 0.01 | realised FPR, mean, worst | passes | ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    ranked = []
    for name, title in titles.items():
        of_all = [row for row in rows if row["detector"] == name and row["protocol"] == "all"]
        if not of_all:
            continue
        area, one, five = (seed_means(of_all, key) for key in ("auroc", "tpr_at_fpr_0_01", "tpr_at_fpr_0_05"))
        hits = [row for row in rows if row["detector"] == name and row["protocol"] == "hits"]
        mine = [row for row in rows if row["detector"] == name and row["protocol"] != "hits"]
        realised = [row["realised_false_positive_rate"] for row in mine]
        mean = statistics.fmean(one.values())
        seeds = len({row["seed"] for row in of_all})
        none = len({entry["model"] for entry in not_applicable if entry["detector"] == name})
        ranked.append(
            (
                mean,
                f"| {title} | {len(one)} ({seeds}){f', {none} not applicable' if none else ''} "
                f"| {statistics.fmean(area.values()):.4f}{_interval(of_all, 'auroc')} | {min(area.values()):.3f} "
                f"| {mean:.3f}{_interval(of_all, 'tpr_at_fpr_0_01')} | {min(one.values()):.3f} "
                f"| {statistics.fmean(five.values()):.3f} | {min(five.values()):.3f} "
                f"| {statistics.fmean(seed_means(hits, 'auroc').values()):.4f}, "
                f"{statistics.fmean(seed_means(hits, 'tpr_at_fpr_0_01').values()):.3f} "
                f"| {statistics.fmean(realised):.3f}, {max(realised):.3f} "
                f"| {statistics.median(row['passes'] for row in mine):.3g} "
                f"| {statistics.median(row['milliseconds'] for row in mine):.2g} |",
            )
        )
    return "\n".join([*lines, *(line for _, line in sorted(ranked, reverse=True))])


def _models(rows: list[Row], titles: Mapping[str, str]) -> str:
    of_all = [row for row in rows if row["protocol"] == "all"]
    columns = [name for name in titles if any(row["detector"] == name for row in of_all)]
    lines = [
        "| model | " + " | ".join(titles[name] for name in columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    table = {
        name: seed_means([row for row in of_all if row["detector"] == name], "tpr_at_fpr_0_01") for name in columns
    }
    for model in sorted({row["model"] for row in of_all}):
        best = max(table[name].get(model, -1.0) for name in columns)
        cells = []
        for name in columns:
            value = table[name].get(model)
            cells.append("–" if value is None else f"**{value:.2f}**" if value >= best - 0.005 else f"{value:.2f}")
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _benign(rows: list[Row], titles: Mapping[str, str]) -> str:
    lines = [
        f"| detector | benign models | flagged of {FIXED_RATE:g} asked, mean | least | most |",
        "|---|---|---|---|---|",
    ]
    for name, title in titles.items():
        mine = [row for row in rows if row["detector"] == name and row["protocol"] == "benign"]
        if mine:
            rates = [row["realised_false_positive_rate"] for row in mine]
            n = len({row["model"] for row in mine})
            lines.append(f"| {title} | {n} | {statistics.fmean(rates):.3f} | {min(rates):.3f} | {max(rates):.3f} |")
    return "\n".join(lines)


def _after(after: list[Row]) -> str:
    lines = [
        "| model | clean accuracy before | after | attack success before | after | true label of triggered images |",
        "|---|---|---|---|---|---|",
    ]
    for model in sorted({row["model"] for row in after}):
        mine = [row for row in after if row["model"] == model]
        cells = [
            f"{statistics.fmean(row[key] for row in mine):.3f}" if key in mine[0] else "–"
            for key in (
                "clean_accuracy_before",
                "clean_accuracy",
                "attack_success_before",
                "attack_success",
                "recovered",
            )
        ]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _by_images(by_images: list[Row], titles: Mapping[str, str]) -> str:
    lines = [
        "| detector | clean images | AUROC mean | TPR at FPR 0.01 mean | worst | models |",
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["detector"] for row in by_images):
        for n in sorted({row["images"] for row in by_images}):
            mine = [row for row in by_images if row["detector"] == name and row["images"] == n]
            if mine:
                caught = [row["tpr_at_fpr_0_01"] for row in mine]
                area, mean = statistics.fmean(row["auroc"] for row in mine), statistics.fmean(caught)
                lines.append(f"| {titles[name]} | {n} | {area:.4f} | {mean:.3f} | {min(caught):.3f} | {len(mine)} |")
    return "\n".join(lines)


def _draw(rows: list[Row], titles: Mapping[str, str], by_images: list[Row]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    PICTURES.mkdir(parents=True, exist_ok=True)
    of_all = [row for row in rows if row["protocol"] == "all"]
    names = [name for name in titles if any(row["detector"] == name for row in of_all)]
    caught = {
        name: list(seed_means([row for row in of_all if row["detector"] == name], "tpr_at_fpr_0_01").values())
        for name in names
    }
    names.sort(key=lambda name: statistics.fmean(caught[name]))
    figure, axes = pyplot.subplots(figsize=(7.5, 0.4 * len(names) + 1.4), layout="constrained")
    for place, name in enumerate(names):
        axes.plot(caught[name], [place] * len(caught[name]), "|", color="tab:blue", markersize=14)
        axes.plot(statistics.fmean(caught[name]), place, "o", color="tab:orange")
    axes.set_yticks(range(len(names)), [titles[name] for name in names])
    axes.set_xlabel(
        "share of all triggered inputs caught at a false-positive rate of 0.01\n(a line per model, the dot is the mean)"
    )
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlim(-0.02, 1.02)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(PICTURES / "caught.png", dpi=110)
    pyplot.close(figure)
    if not by_images:
        return
    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for name in dict.fromkeys(row["detector"] for row in by_images):
        sizes = sorted({row["images"] for row in by_images if row["detector"] == name})
        means = [
            statistics.fmean(
                row["tpr_at_fpr_0_01"] for row in by_images if row["detector"] == name and row["images"] == n
            )
            for n in sizes
        ]
        axes.plot(sizes, means, "o-", label=titles[name])
    axes.set_xscale("log")
    axes.set_xticks([100, 500, 2000, 5000], ["100", "500", "2,000", "5,000"])
    axes.set_xlabel("clean images")
    axes.set_ylabel("caught at a false-positive rate of 0.01")
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(PICTURES / "clean_images.png", dpi=110)
    pyplot.close(figure)
