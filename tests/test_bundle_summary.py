"""What `guard bundle show` tells of bundles that are large, old, retrained, or have settings of their own."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from guard import GuardConfig
from guard.cli.bundle_summary import summary
from guard.storage.bundle import StoredBundle

WRITTEN = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)


def document(**changes: Any) -> dict[str, Any]:
    """What a bundle of an older version says: nothing but what every version has."""
    return {
        "settings": GuardConfig().portable(),
        "class_names": None,
        "input_shape": None,
        "preprocessing": None,
        "n_classes": 10,
        "weights_digest": "a" * 64,
        "split_points": None,
        "depths": [],
        "detectors": [{"name": "lof", "kind": "lof", "settings": {}}],
        "clean_images": 500,
        "realised_false_positive_rate": 0.0123,
        **changes,
    }


def lines_of(**changes: Any) -> dict[str, str]:
    shown = summary(StoredBundle("b" * 64, document(**changes), {}), WRITTEN, is_active=False)
    assert len(shown.splitlines()) <= 24
    assert all(len(line) <= 80 for line in shown.splitlines())
    lines: dict[str, str] = {}
    for line in shown.splitlines():
        name = line[:16].strip() or next(reversed(lines))
        lines[name] = " ".join([*lines.get(name, "").split(), *line[16:].split()])
    return lines


def test_summary_of_an_older_bundle_leaves_out_what_it_does_not_say() -> None:
    lines = lines_of()
    assert [*lines] == [
        "bundle", "active", "written", "action", "false positives", "clean images", "classes", "weights", "detectors",
    ]  # fmt: skip
    assert (lines["active"], lines["clean images"], lines["classes"]) == ("no", "500", "10")
    assert lines["written"] == f"{WRITTEN.astimezone():%Y-%m-%d %H:%M}"
    assert lines["false positives"] == "0.0123 of clean images (asked for 0.01, measured out of fold)"


def test_summary_of_a_large_retrained_bundle_still_fits_a_screen() -> None:
    detectors = [{"name": f"disagreement of layer{depth}.conv2", "kind": "x", "settings": {}} for depth in range(9)]
    lines = lines_of(
        settings=GuardConfig(mode="paper", folds=3, action="block", review=False).portable(),
        class_names=[f"class of a thousand {number}" for number in range(1000)],
        n_classes=1000,
        input_shape=[3, 224, 224],
        preprocessing="my_net:prepare",
        split_points={"split": "avgpool"},
        depths=["layer1", "layer2"],
        detectors=detectors,
        reference_accuracy=0.9876,
        backup={"kind": "anp"},
        recovery={"pattern": 0.91, "blend": 0.5},
        lineage={"retrained_from": "c" * 64},
    )
    assert lines["classes"].startswith("1000: class of a thousand 0, class of a thousand 1, ")
    assert lines["classes"].endswith(" ...")
    assert lines["detectors"] == ", ".join(entry["name"] for entry in detectors)
    assert lines["clean images"] == "500, of which the suspect model gets 98.8 % right"
    assert lines["split"] == "avgpool; earlier depths: layer1, layer2"
    assert lines["backup"] == "anp; recovered of planted triggers: pattern 91 %, blend 50 %"
    assert lines["retrained from"] == "c" * 64
    assert lines["action"] == "block; of what cannot be scored: closed"
    assert set(lines["other settings"].split(", ")) == {"mode = paper", "folds = 3", "review = False"}
