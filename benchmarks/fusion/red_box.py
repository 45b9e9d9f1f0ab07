"""Many classes, few images of each: a red box on CIFAR-100 (100 classes, 15 validation images of each).

Stands in for the paper's ImageNet model (1,000 classes, 25 of each). The text has lost all printed values.

    python benchmarks/fusion/red_box.py
"""

from __future__ import annotations

from common import MODES, Column, Panel, Table, both_guards
from publishing import main
from studies import PLAIN, RETRAINED_PLAIN

_MEASURES = {"clean_accuracy": "clean", "attack_success": "attack"}

TABLE = Table(
    name="red_box",
    title="Large-scale data set (red box; CIFAR-100 part in the place of ImageNet)",
    cases=("red-box",),
    columns=(
        *(
            Column(f"unguarded_{measure}", "unguarded", f"trojaned {short}", PLAIN, ("unguarded", measure))
            for measure, short in _MEASURES.items()
        ),
        *both_guards("guarded", "guarded ", PLAIN, _MEASURES),
        *(
            Column(
                f"retrained_{measure}",
                mode,
                f"retrained {short}, {in_words}",
                RETRAINED_PLAIN,
                (mode, f"retrained_{measure}"),
            )
            for mode, in_words in MODES.items()
            for measure, short in _MEASURES.items()
        ),
    ),
    panels=tuple(
        (
            Panel(f"Trojaned model: {title}", f"unguarded_{measure}"),
            Panel(f"Guarded: {title}", f"guarded_{measure}"),
            Panel(f"Guarded, retrained: {title}", f"retrained_{measure}"),
        )
        for measure, title in (("clean_accuracy", "clean accuracy"), ("attack_success", "attack success"))
    ),
    notes=("The text has lost all printed values.",),
)

if __name__ == "__main__":
    main(TABLE)
