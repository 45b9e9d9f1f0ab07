"""Table 8: the guards of table 7 after learning in service from what a person relabels among the first test images.

    python benchmarks/fusion/table_8.py

A real TorchServe serves each model behind both guards; what they flag goes through the queue to a simulated reviewer,
then the retrainer holds a round. Takes half an hour on two cores, so `run_all.py` shows what was measured last.
"""

from __future__ import annotations

from common import LETTERED, MODES, Column, Panel, Table, both_guards
from publishing import main
from studies import ONLINE

_CONDITIONS = {
    "not_retrained": ("no retraining", "not_retrained"),
    "retrained10": ("after 10 %", "retrained_10percent"),
    "retrained": ("after 20 %", "retrained_20percent"),
}

TABLE = Table(
    name="table_8",
    title="Table 8: retraining in service with inputs that a person has relabelled",
    cases=LETTERED,
    columns=(
        *(
            Column(
                f"{condition}_{measure}", mode, f"{words} {short}, {in_words}", ONLINE, (mode, f"{source}_{measure}")
            )
            for condition, (words, source) in _CONDITIONS.items()
            for mode, in_words in MODES.items()
            for measure, short in (("clean_accuracy", "clean"), ("attack_success", "attack"))
        ),
        *both_guards("relabelled", "relabelled ", ONLINE, {"inputs": "inputs"}),
        *(
            Column("promoted_rounds", mode, f"promoted rounds, {words}", ONLINE, (mode, "promoted_rounds"))
            for mode, words in MODES.items()
        ),
    ),
    panels=tuple(
        tuple(
            Panel(f"{words}: {title}".capitalize(), f"{condition}_{measure}")
            for condition, (words, _) in _CONDITIONS.items()
        )
        for measure, title in (("clean_accuracy", "clean accuracy"), ("attack_success", "attack success"))
    ),
    notes=(
        "Served and relabelled: the first 10 and 20 % of the test images, clean and triggered; all rates are of the "
        "other 80 %, printed values after 20 %. Two rounds were held; the gate promotes a candidate or refuses it.",
    ),
)

if __name__ == "__main__":
    main(TABLE)
