"""Table 4: clean accuracy and attack success of the trojaned model, and of the guarded one.

python benchmarks/fusion/table_4.py
"""

from __future__ import annotations

from common import LETTERED, Column, Panel, Table, both_guards
from publishing import main
from studies import PLAIN, STRIP, STRIP_FALSE_REJECTION, STRIP_IMAGES, USUAL_RATE

_MEASURES = {"clean_accuracy": "clean", "attack_success": "attack"}
_OTHERS = {"neural_cleanse": ("Neural Cleanse", ""), "fine_pruning": ("fine-pruning", "fine-pruning")}

TABLE = Table(
    name="table_4",
    title="Table 4: clean accuracy and attack success",
    cases=LETTERED,
    columns=(
        *(
            Column(f"unguarded_{measure}", "unguarded", f"trojaned {short}", PLAIN, ("unguarded", measure))
            for measure, short in _MEASURES.items()
        ),
        *both_guards("guarded", "guarded ", PLAIN, _MEASURES),
        *(
            Column(
                f"guarded_{measure}",
                "calibrated_usual",
                f"guarded {short}, calibrated at {100 * USUAL_RATE:g} %",
                PLAIN,
                ("calibrated_usual", measure),
            )
            for measure, short in _MEASURES.items()
        ),
        *(
            Column(f"{other}_{measure}", other, f"{words} {short}", source=(other, measure), backup=backup)
            for other, (words, backup) in _OTHERS.items()
            for measure, short in _MEASURES.items()
        ),
        Column("strip_false_acceptance", "strip", "STRIP FAR", STRIP, ("strip", "false_acceptance")),
    ),
    panels=tuple(
        (Panel(f"Trojaned model: {title}", f"unguarded_{measure}"), Panel(f"Guarded: {title}", f"guarded_{measure}"))
        for measure, title in (("clean_accuracy", "clean accuracy"), ("attack_success", "attack success"))
    ),
    notes=(
        "Fine-pruning: ours from benchmarks/results/backups.csv, the twin alone, where it has been measured; it pools "
        "the triggers of a model. Neural Cleanse: printed values only, the project has none.",
        f"STRIP: triggered images that are accepted where {100 * STRIP_FALSE_REJECTION:g} % of the clean ones may be "
        f"rejected; 100 overlays, {STRIP_IMAGES} validation images, {STRIP_IMAGES} images of each trigger.",
        'For case a (Neural Cleanse) the paper prints "Fails", for case f "Fail".',
    ),
)

if __name__ == "__main__":
    main(TABLE)
