"""Table 5: the guard against re-training the last layer (RTLL) on the same clean images.

python benchmarks/fusion/table_5.py
"""

from __future__ import annotations

from common import Column, Panel, Table, both_guards
from publishing import main
from studies import LAST_LAYER, PLAIN

_MEASURES = {"clean_accuracy": "clean", "attack_success": "attack"}

TABLE = Table(
    name="table_5",
    title="Table 5: comparison with re-training the last layer (RTLL)",
    cases=("d", "f", "h", "i"),
    columns=(
        *(
            Column(f"rtll_{measure}", "rtll", f"RTLL {short}", LAST_LAYER, ("rtll", measure))
            for measure, short in _MEASURES.items()
        ),
        *both_guards("guarded", "guarded ", PLAIN, _MEASURES),
    ),
    panels=tuple(
        (Panel(f"RTLL: {title}", f"rtll_{measure}"), Panel(f"Guarded: {title}", f"guarded_{measure}"))
        for measure, title in (("clean_accuracy", "clean accuracy"), ("attack_success", "attack success"))
    ),
    notes=("The text has lost both attack success rates of case i.",),
)

if __name__ == "__main__":
    main(TABLE)
