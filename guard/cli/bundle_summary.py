"""What a bundle holds, told on one screen."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guard.storage.bundle import StoredBundle

_WIDTH, _INDENT = 80, 16
_MOST_CLASSES = 150  # characters of their names; a model may have a thousand classes


def in_utc(seconds: float) -> datetime:
    """Return a time since 1970 in UTC and whole seconds."""
    return datetime.fromtimestamp(int(seconds), UTC)


def local_time(moment: datetime) -> str:
    """Return a moment as people read it: this machine's own time, in minutes."""
    return f"{moment.astimezone():%Y-%m-%d %H:%M}"


def summary(stored: StoredBundle, written: datetime, *, is_active: bool) -> str:
    """Return what a bundle holds as lines of `name  value`, at most 80 columns wide where a value has spaces."""
    head = {"bundle": stored.digest, "active": "yes" if is_active else "no", "written": local_time(written)}
    lines = (*head.items(), *_lines(stored.document))
    wrapped = textwrap.TextWrapper(
        _WIDTH, subsequent_indent=" " * _INDENT, break_long_words=False, break_on_hyphens=False
    )
    return "".join(f"{wrapped.fill(f'{name:<{_INDENT}}{value}')}\n" for name, value in lines)


def _lines(about: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    from guard.config import PLACES, GuardConfig
    from guard.detection.contradictions import Contradictions

    settings = about["settings"]
    yield "action", f"{settings['action']}; of what cannot be scored: {settings['failure_mode']}"
    yield (
        "false positives",
        f"{about['realised_false_positive_rate']:.4f} of clean images "
        f"(asked for {settings['false_positive_rate']:g}, measured out of fold)",
    )
    right = about.get("reference_accuracy")
    accuracy = "" if right is None else f", of which the suspect model gets {100 * right:.1f} % right"
    yield "clean images", f"{about['clean_images']}{accuracy}"
    if (found := Contradictions.from_document(about)) is not None:
        warning = ". NOTICED: see docs/detection.md, Attack on calibration" if found.is_noticed else ""
        yield "contradictions", f"{found.told}{warning}"
    if about.get("images_from"):
        yield "images from", about["images_from"]
    names = about["class_names"]
    listed = f": {textwrap.shorten(', '.join(names), _MOST_CLASSES, placeholder=' ...')}" if names else ""
    yield "classes", f"{about['n_classes']}{listed}"
    if about["input_shape"]:
        yield "input", " x ".join(map(str, about["input_shape"]))
    if about["preprocessing"]:
        yield "preprocessing", about["preprocessing"]
    yield "weights", about["weights_digest"]
    if points := about["split_points"]:
        yield "split", f"{points['split']}; earlier depths: {', '.join(about['depths']) or 'none'}"
    yield "detectors", ", ".join(entry["name"] for entry in about["detectors"])
    if backup := about.get("backup"):
        recovered = ", ".join(f"{name} {100 * share:.0f} %" for name, share in (about.get("recovery") or {}).items())
        yield "backup", f"{backup['kind']}{f'; recovered of planted triggers: {recovered}' if recovered else ''}"
    if lineage := about.get("lineage"):
        yield "retrained from", lineage["retrained_from"]
    shown = {"action", "failure_mode", "false_positive_rate", *PLACES}
    usual = GuardConfig().portable()
    others = [f"{name} = {value}" for name, value in settings.items() if name not in shown and usual.get(name) != value]
    if others:
        yield "other settings", ", ".join(others)
