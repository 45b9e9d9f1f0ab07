"""Table 8: the guards of table 7 after learning from what a person has relabelled among the first test images.

python benchmarks/fusion/table_8.py
"""

from __future__ import annotations

from common import LETTERED, MODES, Column, Panel, Table, both_guards, main
from studies import RETRAINED, SEEN_SHARE

_CONDITIONS = {"not_retrained": "no retraining", "retrained": "retrained"}

TABLE = Table(
    name="table_8",
    title="Table 8: retraining with poisoned inputs that a person has relabelled",
    cases=LETTERED,
    columns=(
        *(
            Column(
                f"{condition}_{measure}",
                mode,
                f"{words} {short}, {in_words}",
                RETRAINED,
                (mode, f"{condition}_{measure}"),
            )
            for condition, words in _CONDITIONS.items()
            for mode, in_words in MODES.items()
            for measure, short in (("clean_accuracy", "clean"), ("attack_success", "attack"))
        ),
        *both_guards(
            "relabelled", "relabelled ", RETRAINED, {"inputs": "inputs", "poisoned_inputs": "poisoned inputs"}
        ),
    ),
    panels=tuple(
        tuple(
            Panel(f"{words}: {title}".capitalize(), f"{condition}_{measure}")
            for condition, words in _CONDITIONS.items()
        )
        for measure, title in (("clean_accuracy", "clean accuracy"), ("attack_success", "attack success"))
    ),
    notes=(
        f"The first {100 * SEEN_SHARE:g} % of the test images, clean and triggered, are seen before retraining; "
        "all rates are of the others.",
    ),
)

if __name__ == "__main__":
    main(TABLE)
