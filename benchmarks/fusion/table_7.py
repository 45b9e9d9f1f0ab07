"""Table 7: guards that also learn from validation images with Gaussian noise.

python benchmarks/fusion/table_7.py
"""

from __future__ import annotations

from common import LETTERED, Panel, Table, both_guards
from publishing import main
from studies import AUGMENTED, NOISE_STD, PLAIN

_MEASURES = {"clean_accuracy": "clean", "attack_success": "attack"}
_CONDITIONS = {"plain": ("no augmentation", PLAIN), "augmented": ("augmented", AUGMENTED)}

TABLE = Table(
    name="table_7",
    title="Table 7: training with augmented validation data",
    cases=LETTERED,
    columns=tuple(
        column
        for condition, (words, request) in _CONDITIONS.items()
        for column in both_guards(condition, f"{words} ", request, _MEASURES)
    ),
    panels=tuple(
        tuple(
            Panel(f"{words}: {title}".capitalize(), f"{condition}_{measure}")
            for condition, (words, _) in _CONDITIONS.items()
        )
        for measure, title in (("clean_accuracy", "clean accuracy"), ("attack_success", "attack success"))
    ),
    notes=(
        f"Standard deviation of the noise: {NOISE_STD:g} for images in [0, 1]; the paper's is lost.",
        "Case a without augmentation: the paper prints 97.6 here and 7.6 in table 4; one of the two is a misprint.",
    ),
)

if __name__ == "__main__":
    main(TABLE)
