"""Numbers and names of the guard in plain words, for somebody who looks at images all day."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from guard.config import GuardConfig
from guard.relabel.items import FlaggedInput
from guard.relabel.rounds import MEASURES
from guard.statistics.calibration import fired

#: Keys with a meaning of their own on the page; they are no class's key.
RESERVED_KEYS = "pfsuoxv"

#: Confidence from which on a second opinion is taken for many inputs at once.
SURE = 0.7

_FEATURES = "the last layer"
_USUAL_RATE: float = GuardConfig.model_fields["false_positive_rate"].default
#: Kind of a detector -> what it says when it fires, given the suspect's answer.
_FIRED = {
    "lof": "Unlike any clean image that the model calls {label}",
    "disagreement": "A second head, trained on clean images only, does not say {label}",
    "anytime": "Heads at several depths, trained on clean images only, do not say {label}",
    "backup": "The backup, a network beside the model, does not say {label}",
    "demarcation": "On the poisoned side of the line drawn between earlier traffic and clean images",
}
_QUIET = {
    "lof": "Looks like clean images of {label}",
    "disagreement": "The second head agrees on {label}",
    "anytime": "The heads at several depths agree on {label}",
    "backup": "The backup agrees on {label}",
    "demarcation": "On the clean side of the line drawn between earlier traffic and clean images",
}


_IN_WORDS = {name: text for text, name in MEASURES}
#: What comes before the text of a check of the gate.
_PASSED = {True: "passed: ", False: "failed: ", None: "not measured: "}


@dataclass(frozen=True, slots=True)
class Sign:
    """What the detectors of one kind say together.

    Attributes
    ----------
    text : str
        One sentence.
    fired : bool
    places : list of (str, str, bool)
        Per layer: its name, how unusual in words, and whether it fired there; most unusual first.
    share : float
        How unusual the strongest is, in [0, 1]: 1 from one clean image in 10,000 on.
    """

    text: str
    fired: bool
    places: list[tuple[str, str, bool]]
    share: float


def signs(flagged: FlaggedInput, label_name: str, mode: str | None, rate: float | None) -> list[Sign]:
    """Return what each kind of detector says of a flagged input, those that fired first.

    Parameters
    ----------
    flagged : FlaggedInput
    label_name : str
        Of the suspect's answer.
    mode : str or None
        Of the bundle. In `paper` mode a detector fires above its own threshold; else surprise is -log of a p-value.
    rate : float or None
        At which the server flagged it; None: the usual one. A detector counts as fired by `fusion.fired`, as in the
        server's metrics.
    """
    by_kind: dict[str, list[tuple[str, float]]] = {}
    for name, surprise in flagged.surprise.items():
        kind, _, place = name.partition(":")
        by_kind.setdefault(kind, []).append((place, float(surprise)))
    found = []
    for kind, places in by_kind.items():
        places.sort(key=lambda entry: -entry[1])
        beyond = fired(np.array([surprise for _, surprise in places]), mode or "calibrated", rate or _USUAL_RATE)
        depths = [
            (_place(place), _unusual(surprise, mode), bool(is_fired))
            for (place, surprise), is_fired in zip(places, beyond, strict=True)
        ]
        any_fired = bool(beyond.any())
        words = (_FIRED if any_fired else _QUIET).get(kind, f"{kind} {'fired' if any_fired else 'did not fire'}")
        share = min(1.0, max(0.0, places[0][1] / (math.log(10_000) if mode != "paper" else 2.0)))
        found.append(Sign(words.format(label=label_name), any_fired, depths, share))
    return sorted(found, key=lambda sign: (not sign.fired, -sign.share))


def _place(name: str) -> str:
    return _FEATURES if name in ("features", "") else f"layer {name}"


def _unusual(surprise: float, mode: str | None) -> str:
    if mode == "paper":
        return "above its threshold" if surprise > 0 else "below its threshold"
    return one_in(math.exp(-min(max(surprise, 0.0), 700.0)))


def one_in(p_value: float) -> str:
    """Return a share of clean images in words: "1 in 1,500 clean images"."""
    if p_value >= 0.5:
        return "most clean images"
    if p_value <= 1e-6:
        return "fewer than 1 in a million clean images"
    number = 1 / p_value
    digits = max(0, int(math.log10(number)) - 1)
    return f"1 in {round(number / 10**digits) * 10**digits:,} clean images"


def suspect_confidence(flagged: FlaggedInput) -> float:
    """Return the suspect model's own probability for its answer, by a softmax over its logits."""
    logits = flagged.activations.logits[0].astype(np.float64)
    shares = np.exp(logits - logits.max())
    return float(shares[flagged.suspect_label] / shares.sum())


def opinion_name(has_backup: bool | None) -> str:
    """Return what gives a guard's second opinions: its backup, else its replacement head; None: it is not known."""
    if has_backup is None:
        return "second opinion"
    return "backup" if has_backup else "replacement head"


def doubt(flagged: FlaggedInput, is_poisoned: bool) -> str:
    """Return why a second opinion is not to be taken unseen for the true label; empty if it may be."""
    if flagged.backup_label is None:
        return "has no answer"
    if is_poisoned and flagged.backup_label == flagged.suspect_label:
        return "says what the suspect says"
    confidence = flagged.backup_confidence or 0.0
    return "" if confidence >= SURE else f"is only {percent(confidence)} sure"


def rival_label(flagged: FlaggedInput, opinion: str) -> tuple[int, str]:
    """Return the class to compare the suspect's answer with, and who names it.

    The label of the second opinion, by its name; where there is none, or it is the suspect's own, the suspect's second
    best.
    """
    if flagged.backup_label is not None and flagged.backup_label != flagged.suspect_label:
        return flagged.backup_label, f"what the {opinion} says"
    order = np.argsort(-flagged.activations.logits[0], kind="stable")
    return int(next(label for label in order if label != flagged.suspect_label)), "the model's second choice"


def label_names(class_names: Sequence[str] | None, n_classes: int) -> list[str]:
    """Return one name per class; its number where the bundle has no names, or another number of them."""
    if class_names is None or len(class_names) != n_classes:
        return [str(label) for label in range(n_classes)]
    return [name or str(label) for label, name in enumerate(class_names)]


def label_keys(names: Sequence[str]) -> list[str]:
    """Return what to type for each class: one key where there are enough, else its number in fixed width.

    Up to ten classes named by digits have those digits; else 1-9 and the letters without a meaning of their own.
    """
    if len(names) <= 10 and all(name == str(label) for label, name in enumerate(names)):
        return list(names)
    single = string.digits[1:] + "".join(letter for letter in string.ascii_lowercase if letter not in RESERVED_KEYS)
    if len(names) <= len(single):
        return list(single[: len(names)])
    width = len(str(len(names) - 1))
    return [f"{label:0{width}d}" for label in range(len(names))]


def percent(share: float | None) -> str:
    """Return a fraction as a percentage that never claims to be quite sure."""
    if share is None or not math.isfinite(share):
        return ""
    if share >= 0.9995:
        return "over 99.9 %"
    return f"{100 * share:.1f} %" if share > 0.99 else f"{100 * share:.0f} %"


def ago(moment: datetime | None, now: datetime | None = None) -> str:
    """Return how long ago a time was: "just now", "5 min ago", "3 h ago", "2 days ago"."""
    if moment is None:
        return ""
    seconds = ((now or datetime.now(UTC)) - moment).total_seconds()
    if seconds < 60:
        return "just now"
    if seconds < 3600:
        return f"{int(seconds // 60)} min ago"
    if seconds < 48 * 3600:
        return f"{int(seconds // 3600)} h ago"
    return f"{int(seconds // 86400)} days ago"


def moment(time: datetime | None) -> str:
    """Return a time in UTC to the minute."""
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M} UTC" if time is not None else ""


def before_and_after(report: Mapping[str, object]) -> list[tuple[str, str, str, str]]:
    """Return (name, before, after, change) of every figure that a round's report gives both before and after.

    Figures inside of figures are named by their path, as in "false alarms / gtsrb"; those that a retraining measures,
    in words and first. Counts of a kind of input of which none was held back are left out.
    """
    before, after = _flat(report.get("before")), _flat(report.get("after"))
    known = [name for _, name in MEASURES if name in before or name in after]
    rows = []
    for name in dict.fromkeys([*known, *before, *after]):
        old, new = before.get(name), after.get(name)
        change = ""
        if isinstance(old, _Share) and isinstance(new, _Share):
            if old.of == new.of == 0:
                continue  # nothing was held back of that kind
            points = 100 * (new.rate - old.rate) if old.rate is not None and new.rate is not None else None
            change = "" if points is None else "same" if points == 0 else f"{points:+.1f} points".replace("-", "−")
        elif isinstance(old, int | float) and isinstance(new, int | float) and not isinstance(old, bool):
            change = "same" if abs(new - old) < 5e-7 else f"{new - old:+.4g}".replace("-", "−")
        rows.append((_IN_WORDS.get(name, _words(name)), _figure(old), _figure(new), change))
    return rows


def other_facts(report: Mapping[str, object]) -> list[tuple[str, str]]:
    """Return everything else in a round's report, as (name, text)."""
    shown_elsewhere = ("before", "after", "reasons", "outcome", "basis", "changes")
    facts = {name: value for name, value in report.items() if name not in shown_elsewhere}
    return [(_words(name), _figure(value)) for name, value in _flat(facts).items()]


def reasons(report: Mapping[str, object]) -> list[str]:
    """Return why a round ended as it did, one line each."""
    given = report.get("reasons")
    if not given:
        return []
    return (
        [given]
        if isinstance(given, str)
        else [str(line) for line in given]
        if isinstance(given, list)
        else [str(given)]
    )


@dataclass(frozen=True, slots=True)
class _Share:
    """So many of so many."""

    hits: int
    of: int

    @property
    def rate(self) -> float | None:
        return self.hits / self.of if self.of else None


def _flat(value: object, path: str = "") -> dict[str, object]:
    if isinstance(value, Mapping) and value.keys() == {"hits", "of", "rate"}:
        hits, of = value["hits"], value["of"]
        if isinstance(hits, int) and isinstance(of, int) and path:
            return {path: _Share(hits, of)}
    if not isinstance(value, Mapping):
        return {path: value} if path else {}
    flat: dict[str, object] = {}
    for name, inner in value.items():
        flat |= _flat(inner, f"{path} / {name}" if path else str(name))
    return flat


def _figure(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, _Share):
        share = "" if value.rate is None else f" ({100 * value.rate:.1f} %)"
        return f"{value.hits:,} of {value.of:,}{share}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        if isinstance(text := value.get("text"), str):  # a check of the gate says in words what it found
            return f"{_PASSED.get(value.get('passed'), '')}{text}"
        return ", ".join(f"{_words(str(name))}: {_figure(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ("; " if any(isinstance(part, Mapping) for part in value) else ", ").join(map(_figure, value)) or "none"
    return str(value)


def _words(name: str) -> str:
    return name.replace("_", " ")
