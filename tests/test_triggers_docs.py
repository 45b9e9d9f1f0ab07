"""`docs/attacks.md` names every trigger and parameter, and its example runs."""

import re
from pathlib import Path

import numpy as np
import pytest

from guard.lab.attacks.triggers import TRIGGERS, make_trigger

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "attacks.md").read_text(encoding="utf-8")


def table_rows():
    return {line.split("`")[1]: line for line in TEXT.splitlines() if line.startswith("| `")}


def test_docs_table_has_every_trigger():
    assert sorted(table_rows()) == sorted(TRIGGERS)


@pytest.mark.parametrize("name", TRIGGERS)
def test_docs_row_names_exactly_the_parameters(name):
    parameters = table_rows()[name].split("|")[4]
    assert re.findall(r"`(\w+)`", parameters) == list(make_trigger(name).full_parameters())


def test_docs_examples_run():
    images = np.random.default_rng(0).random((40, 1, 28, 28), dtype=np.float32)
    names = {"images": images, "labels": np.arange(40, dtype=np.int64) % 10}
    for block in re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL):
        exec(block, names)
    assert names["poisoned"].is_poisoned.sum() == 4
    assert names["trigger"].full_parameters() == {"size": 3, "margin": 0, "value": 1.0}


def test_docs_picture_is_there_and_small():
    assert "(triggers.png)" in TEXT
    assert 10_000 < (DOCS / "triggers.png").stat().st_size < 1_000_000
