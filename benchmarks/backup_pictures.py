"""Draw and tabulate what the benchmarks of backups measured, for docs/backups.md.

    python benchmarks/backup_pictures.py

Reads `backups.csv`, `backups_curves.csv`, `anp.csv`, `defective.csv`, `anytime.csv` and `anytime_depths.csv`, as far
as they are there; writes pictures to `docs/images/`, and puts tables between the marks in the documents. Measures
nothing.
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
BACKUPS = ("head", "defective", "norm-pruning", "fine-pruning", "anp", "rtll")
COLOURS = dict(zip(BACKUPS, ("#8c8c8c", "#0072b2", "#009e73", "#56b4e9", "#d55e00", "#cc79a7"), strict=True))
#: Of adversarial neuron pruning: epsilon and iterations; where pruned.
PAPER_SETTINGS, PAPER_THRESHOLD = ("0.4", "2000"), 0.2
#: What `relabel` should reach of a backup's own clean accuracy.
AIM = 0.9

#: Of networks that are not dead neuron by neuron at the bottom.
MARKERS = {"standard": "*", "top": "^", "channels": "s", "shared": "D"}

Rows = list[dict[str, str]]

#: Name of a table -> the picture below it, and what it shows.
PICTURES = {"backups": "backups.png", "anp": "anp_curves.png", "defective": "defective.png"}
ALTERNATIVES = {
    "backups": "Recovery accuracy, and attack success after relabel, of every backup on every model",
    "anp": "What is left of the attack over clean accuracy, a line of thresholds per setting",
    "defective": "Defence against transferred PGD over clean accuracy, and accuracy under noise",
}


def read(file: Path) -> Rows:
    """Return the rows of a table; none if it is not there."""
    if not file.exists():
        return []
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def draw_backups(rows: Rows, file: Path) -> None:
    """Draw recovery accuracy and guarded attack success of every model and backup."""
    rows = [row for row in rows if row["recovery_accuracy"]]
    models = sorted({row["model"] for row in rows}, reverse=True)
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.8 + 0.24 * len(models)), sharey=True, layout="constrained")
    panels = (
        ("recovery_accuracy", "true label found, % of triggered images"),
        ("guarded_attack_success", "attack success after relabel, %"),
    )
    for axis, (column, title) in zip(axes, panels, strict=True):
        for backup in BACKUPS:
            selected = [row for row in rows if row["backup"] == backup]
            axis.plot(
                [100 * float(row[column]) for row in selected],
                [models.index(row["model"]) for row in selected],
                "o",
                color=COLOURS[backup],
                markersize=5,
                alpha=0.85,
                label="replacement head" if backup == "head" else backup,
            )
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlim(-2, 102)
        axis.set_ylim(-0.8, len(models) - 0.2)
        axis.set_yticks(range(len(models)), models, fontsize=8)
        axis.grid(axis="both", color="#e5e5e5", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(BACKUPS), frameon=False, fontsize=9)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def pruning_curves(curves: Rows, gentler: Rows) -> dict[tuple[str, str, str], Rows]:
    """Return the curves of adversarial neuron pruning on CIFAR-10's BadNets and Blend by model, epsilon, iterations."""
    paper = [dict(zip(("epsilon", "iterations"), PAPER_SETTINGS, strict=True)) | row for row in curves]
    rows = [row for row in paper if row["backup"] == "anp"] + gentler
    found: dict[tuple[str, str, str], Rows] = {}
    for row in sorted(rows, key=lambda row: (row["model"], -int(row["iterations"]), -float(row["epsilon"]))):
        if re.match("cifar10-(badnets|blend)", row["model"]):
            found.setdefault((row["model"], row["epsilon"], row["iterations"]), []).append(row)
    return found


def draw_curves(curves: dict[tuple[str, str, str], Rows], file: Path) -> None:
    """Draw what is left of the attack over clean accuracy, a line of thresholds per setting."""
    models = list(dict.fromkeys(model for model, *_ in curves))
    if not models:
        return
    figure, axes = plt.subplots(
        1, len(models), figsize=(5 * len(models), 3.6), sharey=True, layout="constrained", squeeze=False
    )
    for axis, model in zip(axes[0], models, strict=True):
        for (name, epsilon, iterations), selected in curves.items():
            if name != model:
                continue
            selected = sorted(selected, key=lambda row: float(row["at"]))
            is_papers = (epsilon, iterations) == PAPER_SETTINGS
            x, y = ([100 * float(row[column]) for row in selected] for column in ("test_accuracy", "attack_success"))
            colour = "#303030" if is_papers else {0.4: "#d55e00", 0.2: "#0072b2", 0.1: "#009e73"}[float(epsilon)]
            label = f"epsilon {float(epsilon):g}, {iterations} iterations" + " (the paper's)" * is_papers
            axis.plot(x, y, "o-", markersize=3, color=colour, label=label, alpha=0.85)
            at = next(place for place, row in enumerate(selected) if float(row["at"]) == PAPER_THRESHOLD)
            axis.plot(x[at], y[at], "o", markersize=9, color=colour, markerfacecolor="none")
        axis.axhline(1.0, color="#8c8c8c", linewidth=0.8, linestyle=":")
        axis.set_title(model, fontsize=10, loc="left")
        axis.set_xlabel("clean accuracy, %; ringed: threshold 0.2")
        axis.set_xlim(60, 92)
        axis.set_yscale("symlog", linthresh=1)
        axis.set_ylim(0, 110)
        axis.set_yticks([0, 1, 3, 10, 30, 100], ["0", "1", "3", "10", "30", "100"])
        axis.grid(color="#e5e5e5", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("attack success, %")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_defective(rows: Rows, file: Path) -> None:
    """Draw defence against transferred PGD over clean accuracy, and accuracy under noise, per data set."""
    data_sets = sorted({row["data_set"] for row in rows}, reverse=True)
    if not data_sets:
        return
    figure, axes = plt.subplots(
        len(data_sets), 2, figsize=(10, 3.6 * len(data_sets)), layout="constrained", squeeze=False
    )
    for (left, right), data_set in zip(axes, data_sets, strict=True):
        selected = [row for row in rows if row["data_set"] == data_set]
        values = {(row["network"], row["measure"]): 100 * float(row["value"]) for row in selected}
        for network in dict.fromkeys(row["network"] for row in selected):
            colour = _colour_of(network)
            x, y = values[network, "clean_accuracy"], values[network, "pgd_defence"]
            marker = next((entry for word, entry in MARKERS.items() if word in network), "o")
            left.plot(x, y, marker, color=colour, markersize=7, linestyle="none", label=network)
            if network in ("standard", "0.5 bottom", "0.1 bottom", "0.5 top", "0.5 bottom, channels"):
                levels = sorted(
                    int(entry.removeprefix("noise_"))
                    for name, entry in values
                    if name == network and entry.startswith("noise_")
                )
                right.plot(
                    levels,
                    [values[network, f"noise_{level}"] for level in levels],
                    "o-",
                    markersize=3,
                    color=colour,
                    label=network,
                )
        left.set_title(f"{data_set}: keeps its label under transferred PGD, %", fontsize=10, loc="left")
        left.set_xlabel("clean accuracy, %")
        left.margins(x=0.08, y=0.12)
        left.legend(frameon=False, fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
        right.set_title(f"{data_set}: accuracy under Gaussian noise, %", fontsize=10, loc="left")
        right.set_xlabel("standard deviation, of 255")
        right.legend(frameon=False, fontsize=8)
        for axis in (left, right):
            axis.grid(color="#e5e5e5", linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _colour_of(network: str) -> str:
    for word, colour in (("top", "#d55e00"), ("channels", "#cc79a7"), ("shared", "#009e73"), ("bottom", "#0072b2")):
        if word in network:
            shades = {"0.7": 0.45, "0.5": 0.65, "0.3": 0.8, "0.1": 1.0}
            red, green, blue = mpl.colors.to_rgb(colour)
            strength = shades[network[:3]]
            return mpl.colors.to_hex([1 - strength * (1 - entry) for entry in (red, green, blue)])
    return "#303030"


def backups_table(rows: Rows) -> str:
    """Return one line per model: recovery and clean accuracy of every backup, and attack success after `relabel`."""
    lines = [
        "| model | " + " | ".join("replacement head" if entry == "head" else f"`{entry}`" for entry in BACKUPS) + " |",
        "|---" * (len(BACKUPS) + 1) + "|",
    ]
    for model in sorted({row["model"] for row in rows if row["recovery_accuracy"]}):
        cells = []
        for backup in BACKUPS:
            found = [row for row in rows if (row["model"], row["backup"]) == (model, backup)]
            cells.append(_cell(found[0]) if found else "")
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, str]) -> str:
    recovery, clean, guarded = (
        100 * float(row[name]) for name in ("recovery_accuracy", "clean_accuracy", "guarded_attack_success")
    )
    shown = f"{recovery:.1f}"
    return f"{f'**{shown}**' if recovery >= 100 * AIM * clean / 100 else shown} / {clean:.1f} / {guarded:.1f}"


def fine_pruning_table(rows: Rows) -> str:
    """Return fine-pruning on the Fusion paper's cases beside that paper's figures; of several triggers the mean."""
    paper: dict[tuple[str, str], list[float]] = {}
    for row in read(ROOT / "benchmarks/fusion/table_4.expected.csv"):
        for kind in ("clean_accuracy", "attack_success"):
            if row["quantity"].startswith(f"fine_pruning_{kind}") and row["paper"]:
                paper.setdefault((row["case"], kind), []).append(float(row["paper"]))
    lines = ["| model | clean accuracy (paper) | attack success (paper) |", "|---|---|---|"]
    for row in rows:
        case = row["model"].split("-")[1]
        if row["backup"] == "fine-pruning" and (case, "attack_success") in paper:
            cells = [
                f"{100 * float(row[kind]):.1f} ({statistics.mean(paper[case, kind]):.1f})"
                for kind in ("clean_accuracy", "attack_success")
            ]
            lines.append(f"| {row['model']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def anp_table(curves: dict[tuple[str, str, str], Rows]) -> str:
    """Return clean accuracy and attack success at some thresholds."""
    at = ("0.0", "0.1", "0.2", "0.3", "0.4", "0.5", "0.7", "0.9")
    lines = [
        "| model | epsilon, iterations | " + " | ".join(f"at {point}" for point in at) + " |",
        "|---" * (len(at) + 2) + "|",
    ]
    for (model, epsilon, iterations), rows in curves.items():
        by_point = {row["at"]: row for row in rows}
        cells = [
            f"{100 * float(row['test_accuracy']):.1f} / {100 * float(row['attack_success']):.1f}"
            for row in map(by_point.__getitem__, at)
        ]
        lines.append(f"| {model} | {float(epsilon):g}, {iterations} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def costs_table(rows: Rows) -> str:
    """Return training seconds, size and milliseconds of every backup: the median over the models of a data set."""
    data_sets = sorted({row["model"].partition("-")[0] for row in rows})
    lines = ["| backup | " + " | ".join(data_sets) + " |", "|---" * (len(data_sets) + 1) + "|"]
    for backup in BACKUPS:
        cells = []
        for data_set in data_sets:
            selected = [row for row in rows if row["backup"] == backup and row["model"].startswith(f"{data_set}-")]
            middle = [
                statistics.median(float(row[name]) for row in selected)
                for name in ("training_seconds", "megabytes", "milliseconds")
                if selected
            ]
            cells.append(f"{middle[0]:.0f} s, {middle[1]:.2f} MB, {middle[2]:.2f} ms" if selected else "")
        lines.append(f"| {backup} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def defective_table(rows: Rows) -> str:
    """Return a line per network: accuracy, defence rates and the other measures, with the paper's where it has any."""
    measures = ("clean_accuracy", "fgsm_defence", "pgd_defence", "noise_16", "shuffled_2x2", "boundary_distance")
    titles = ("clean", "FGSM", "PGD", "noise 16", "shuffled 2 x 2", "boundary distance")
    lines = ["| images | network | " + " | ".join(titles) + " |", "|---" * (len(titles) + 2) + "|"]
    for data_set, network in dict.fromkeys((row["data_set"], row["network"]) for row in rows):
        cells = []
        for measure in measures:
            found = [r for r in rows if (r["data_set"], r["network"], r["measure"]) == (data_set, network, measure)]
            cells.append(_with_paper(found[0], measure) if found else "")
        lines.append(f"| {data_set} | {network} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _with_paper(row: dict[str, str], measure: str) -> str:
    def shown(text: str) -> str:
        return f"{float(text):.1e}" if measure == "boundary_distance" else f"{100 * float(text):.1f}"

    return shown(row["value"]) + (f" ({shown(row['paper'])})" if row["paper"] else "")


def anytime_table(rows: Rows) -> str:
    """Return the mean relative increase in error over OPT per weighting and part of the cost."""
    parts = list(dict.fromkeys(row["part_of_cost"] for row in rows))
    lines = [
        "| weights | " + " | ".join(f"{part} of the cost" for part in parts) + " |",
        "|---" * (len(parts) + 1) + "|",
    ]
    for weights in dict.fromkeys(row["weights"] for row in rows):
        cells = []
        for part in parts:
            selected = [row for row in rows if (row["weights"], row["part_of_cost"]) == (weights, part)]
            ours = statistics.mean(float(row["increase_percent"]) for row in selected)
            cells.append(f"{ours:.1f} ({float(selected[0]['paper_increase_percent']):.1f})")
        lines.append(f"| {weights} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def depths_table(rows: Rows) -> str:
    """Return what is flagged at every depth."""
    lines = ["| model | depth | clean flagged | triggered flagged | time |", "|---|---|---|---|---|"]
    for row in rows:
        clean, caught = (100 * float(row[name]) for name in ("false_positive_rate", "true_positive_rate"))
        time = f"{float(row['microseconds']):.0f} µs"
        lines.append(f"| {row['model']} | {row['depth']} | {clean:.1f} % | {caught:.1f} % | {time} |")
    return "\n".join(lines)


def put(document: Path, name: str, table: str) -> None:
    """Put a table between the marks of its name."""
    text = document.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: benchmarks/backup_pictures.py -->", f"<!-- end of {name} -->"
    before, found, rest = text.partition(begin)
    if found:
        _, _, after = rest.partition(end)
        document.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the pictures and fill the tables in."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    chosen = parser.parse_args(arguments)
    images: Path = chosen.docs / "images"
    backups, curves = read(chosen.results / "backups.csv"), read(chosen.results / "backups_curves.csv")
    defective = read(chosen.results / "defective.csv")
    pruning = pruning_curves(curves, read(chosen.results / "anp.csv"))
    if backups:
        draw_backups(backups, images / "backups.png")
    draw_curves(pruning, images / "anp_curves.png")
    draw_defective(defective, images / "defective.png")
    tables = [
        ("backups.md", "backups", backups_table(backups)),
        ("backups.md", "costs", costs_table(backups)),
        ("backups.md", "fine-pruning", fine_pruning_table(backups)),
        ("backups.md", "anp", anp_table(pruning)),
        ("backups.md", "defective", defective_table(defective)),
        ("detection.md", "anytime", anytime_table(read(chosen.results / "anytime.csv"))),
        ("detection.md", "depths", depths_table(read(chosen.results / "anytime_depths.csv"))),
    ]
    for document, name, table in tables:
        if len(table.splitlines()) > 2:  # more than the heading
            picture = f"\n\n![{ALTERNATIVES[name]}](images/{PICTURES[name]})" if name in PICTURES else ""
            put(chosen.docs / document, name, table + picture)


if __name__ == "__main__":
    main()
