"""Table 2: what each detector, both together, and the calibrated combination let through.

python benchmarks/fusion/table_2.py
"""

from __future__ import annotations

from common import LETTERED, Column, Panel, Table, both_guards
from publishing import main
from studies import PLAIN

_MEASURES = {"true_negative": "TN", "false_negative": "FN"}
_ALONE = {"novelty": "novelty detector", "head": "new head"}

TABLE = Table(
    name="table_2",
    title="Table 2: true negatives and false negatives",
    cases=LETTERED,
    columns=(
        *(
            Column(f"{part}_{measure}", "paper", f"{words} {short}", PLAIN, (part, measure))
            for part, words in _ALONE.items()
            for measure, short in _MEASURES.items()
        ),
        *both_guards("fusion", "", PLAIN, _MEASURES),
        *both_guards("fusion", "", PLAIN, {"validation_false_positive": "false alarms on validation"}),
        *(Column(f"lee_{measure}", "lee_2018", f"Lee et al. {short}") for measure, short in _MEASURES.items()),
    ),
    panels=tuple(
        tuple(
            Panel(f"{words}: {title}", f"{part}_{measure}")
            for part, words in {**_ALONE, "fusion": "both together"}.items()
        )
        for measure, title in (
            ("true_negative", "clean inputs that pass (higher is better)"),
            ("false_negative", "poisoned inputs that pass (lower is better)"),
        )
    ),
    notes=('Lee et al. is not implemented here; for cases c, d and e the paper prints "Fail".',),
)

if __name__ == "__main__":
    main(TABLE)
