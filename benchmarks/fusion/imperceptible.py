"""Robustness to an imperceptible trigger: one pixel at each corner. The text has lost all printed values.

python benchmarks/fusion/imperceptible.py
"""

from __future__ import annotations

from common import Column, Panel, Table, both_guards
from publishing import main
from studies import PLAIN

_MEASURES = {"clean_accuracy": "clean", "attack_success": "attack"}

TABLE = Table(
    name="imperceptible",
    title="Imperceptible trigger (one pixel at each corner, CIFAR-10)",
    cases=("imperceptible",),
    columns=(
        *(
            Column(f"unguarded_{measure}", "unguarded", f"trojaned {short}", PLAIN, ("unguarded", measure))
            for measure, short in _MEASURES.items()
        ),
        *both_guards("guarded", "guarded ", PLAIN, _MEASURES),
    ),
    panels=tuple(
        (Panel(f"Trojaned model: {title}", f"unguarded_{measure}"), Panel(f"Guarded: {title}", f"guarded_{measure}"))
        for measure, title in (("clean_accuracy", "clean accuracy"), ("attack_success", "attack success"))
    ),
    notes=("The text has lost all printed values.",),
)

if __name__ == "__main__":
    main(TABLE)
