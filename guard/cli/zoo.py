"""`guard zoo`: train, list, show and verify the suspect models that the guard is measured on."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from guard.cli.output import plain_table, print_error, print_table, print_warning, progress_bar, say, tell, write
from guard.errors import ZooError

if TYPE_CHECKING:
    from guard.lab.zoo.card import ZooCard
    from guard.lab.zoo.plan import ZooEntry

zoo_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Small suspect models on real images. Backdoored ones, and benign twins to compare them with.",
)

Folder = Annotated[
    Path | None,
    typer.Option(help="Folder of the zoo; default: benchmarks/zoo of a checkout, or benchmarks/test_zoo of that plan."),
]
PlanName = Annotated[
    Literal["development", "test"],
    typer.Option(help="test: the models that no setting was chosen on; they are trained for a frozen method only."),
]
DataDir = Annotated[Path | None, typer.Option(help="Folder of the image sets; default GUARD_DATA_DIR.")]
Names = Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Names; * may be used. All if left out.")]


@zoo_app.command("train")
def train(
    names: Names = None,
    missing: Annotated[bool, typer.Option("--missing", help="Pass over models that are there already.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Models trained at a time, one core each.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    plan: PlanName = "development",
    folder: Folder = None,
    data_dir: DataDir = None,
    work_dir: Annotated[Path, typer.Option(help="Folder for checkpoints; an interrupted training goes on.")] = Path(
        "build/zoo"
    ),
) -> None:
    """Train models of the plan and write weights and cards.

    Benign ones first, as others are compared with them or start from them.
    """
    from guard.lab.zoo.collection import Zoo
    from guard.lab.zoo.freeze import check_frozen
    from guard.lab.zoo.plan import BENIGN, find_entries

    if plan == "test":
        check_frozen()
    zoo = Zoo(_folder(folder, plan))
    zoo.folder.mkdir(parents=True, exist_ok=True)
    chosen = [entry for entry in find_entries(names or [], _entries(plan)) if not (missing and zoo.has(entry.name))]
    tell(f"{len(chosen)} models to train")
    weak = []
    for stage in (True, False):
        entries = [entry for entry in chosen if (entry.attack_name == BENIGN) is stage]
        for card in _train_all(entries, plan, zoo.folder, work_dir, data_dir, device, jobs):
            success = "" if card.attack_success is None else f"  attack success {card.attack_success:.4f}"
            say(
                f"{card.name}  clean accuracy {card.clean_accuracy:.4f}{success}  "
                f"{card.epochs_run} epochs, {card.training_seconds:.0f} s"
            )
            weak += [f"{card.name}: {problem}" for problem in card.shortcomings()]
    for line in weak:
        print_warning(line)


def _train_all(
    entries: list[ZooEntry], plan: str, folder: Path, work_dir: Path, data_dir: Path | None, device: str, jobs: int
) -> Iterator[ZooCard]:
    if jobs == 1 or len(entries) < 2:
        for entry in entries:
            yield _train_one(entry, plan, folder, work_dir, data_dir, device)
        return
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(min(jobs, len(entries)), mp_context=context) as pool:
        futures = [pool.submit(_train_one, entry, plan, folder, work_dir, data_dir, device) for entry in entries]
        for future in as_completed(futures):
            yield future.result()


def _train_one(entry: ZooEntry, plan: str, folder: Path, work_dir: Path, data_dir: Path | None, device: str) -> ZooCard:
    from guard.lab.zoo.collection import Zoo, default_zoo_dir
    from guard.lab.zoo.model_training import train_entry

    with progress_bar(entry.name) as report:
        return train_entry(
            entry,
            Zoo(folder),
            work_dir=work_dir,
            data_dir=data_dir,
            device=device,
            twins=Zoo(default_zoo_dir()) if plan == "test" else None,
            command="guard zoo train --plan test" if plan == "test" else "guard zoo train",
            progress=lambda epoch: report(
                f"{entry.name}  loss {epoch.loss:.3f}  "
                + "  ".join(f"{name} {rate:.3f}" for name, rate in epoch.reached.items()),
                epoch.epoch / epoch.epochs,
            ),
        )


@zoo_app.command("list")
def list_models(plan: PlanName = "development", folder: Folder = None) -> None:
    """List the models, and say how many of the plan are missing."""
    from guard.lab.zoo.collection import Zoo

    zoo = Zoo(_folder(folder, plan))
    cards = zoo.cards()
    table = plain_table("model", "target", "clean accuracy", "benign twin", "attack success", "MB")
    for card in cards:
        benign, success = card.benign_clean_accuracy, card.attack_success
        path = zoo.weights_path(card.name)
        table.add_row(
            card.name,
            "" if card.target_label is None else str(card.target_label),
            f"{card.clean_accuracy:.4f}",
            "" if benign is None else f"{benign:.4f}",
            "" if success is None else f"{success:.4f}",
            f"{path.stat().st_size / 1e6:.2f}" if path.is_file() else "missing",
        )
    if cards:
        print_table(table)
    missing = [entry.name for entry in _entries(plan) if not zoo.has(entry.name)]
    tell(f"{len(cards)} models in {zoo.folder}; {len(missing)} of the plan missing")
    for name in missing:
        tell(f"  missing: {name}")


@zoo_app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="Name of the model.")],
    plan: PlanName = "development",
    folder: Folder = None,
) -> None:
    """Print the card of a model as JSON."""
    from guard.lab.zoo.collection import Zoo

    write(json.dumps(Zoo(_folder(folder, plan)).card(name).model_dump(mode="json"), indent=2) + "\n")


@zoo_app.command("verify")
def verify(
    names: Names = None, plan: PlanName = "development", folder: Folder = None, data_dir: DataDir = None
) -> None:
    """Measure every model again and compare with its card.

    Status 1 if a card does not agree to 0.2 points, or an attack is not a real one.
    """
    import fnmatch

    from guard.lab.zoo.collection import Zoo

    zoo = Zoo(_folder(folder, plan))
    known = [card.name for card in zoo.cards()]
    chosen = [name for name in known if not names or any(fnmatch.fnmatchcase(name, pattern) for pattern in names)]
    if not chosen:
        raise ZooError(f"there is no such model in {zoo.folder}. `guard zoo list` shows what there is.")
    bad = 0
    for name in chosen:
        found = zoo.verify(name, data_dir)
        success = "" if found.attack_success is None else f"  attack success {found.attack_success:.4f}"
        say(f"{'BAD' if found.problems else 'ok '} {name}  clean accuracy {found.clean_accuracy:.4f}{success}")
        for problem in found.problems:
            say(f"    {problem}")
        bad += bool(found.problems)
    if bad:
        print_error(f"{bad} of {len(chosen)} models are not what their cards say, or no real attacks.")
        raise typer.Exit(1)


def _entries(plan: str) -> tuple[ZooEntry, ...]:
    from guard.lab.zoo import held_out_plan
    from guard.lab.zoo import plan as development

    return held_out_plan.TEST_PLAN if plan == "test" else development.PLAN


def _folder(folder: Path | None, plan: str) -> Path:
    from guard.lab.zoo.collection import default_zoo_dir

    return folder if folder is not None else default_zoo_dir("test_zoo" if plan == "test" else "zoo")
