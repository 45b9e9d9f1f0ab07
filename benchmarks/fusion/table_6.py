"""Table 6: guards that are given 50 % and 75 % of the clean validation images.

python benchmarks/fusion/table_6.py
"""

from __future__ import annotations

from common import Panel, Table, both_guards
from publishing import main
from studies import HALF, THREE_QUARTERS

_MEASURES = {"clean_accuracy": "clean", "attack_success": "attack"}
_SHARES = {"half": ("50 %", HALF), "three_quarters": ("75 %", THREE_QUARTERS)}

TABLE = Table(
    name="table_6",
    title="Table 6: smaller validation set",
    cases=("c", "d", "f", "h", "i"),
    columns=tuple(
        column
        for share, (words, request) in _SHARES.items()
        for column in both_guards(share, f"{words} ", request, _MEASURES)
    ),
    panels=tuple(
        tuple(
            Panel(f"{words} of the validation images: {title}", f"{share}_{measure}")
            for share, (words, _) in _SHARES.items()
        )
        for measure, title in (("clean_accuracy", "clean accuracy"), ("attack_success", "attack success"))
    ),
    notes=("The text has lost both attack success rates of case i.",),
)

if __name__ == "__main__":
    main(TABLE)
