"""What the guards let through, as the status page shows it: estimates of the last week, and their intervals drawn."""

from __future__ import annotations

from dataclasses import dataclass

from guard.observing.detection import FIGURES, Detection, percent
from guard.statistics.detection_rates import Estimate

#: Ends of a drawn scale.
_SCALES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class Bar:
    """One figure with its interval, drawn on a scale from 0; positions in percent of its length.

    Attributes
    ----------
    name, meaning : str
    value, between : str
        In words; `value` says what is missing where `between` is empty.
    place, left, width : float
        Of the value, of the interval's begin, and the interval's length.
    scale : str
        End of the scale.
    """

    name: str
    meaning: str
    value: str
    between: str = ""
    place: float = 0.0
    left: float = 0.0
    width: float = 0.0
    scale: str = ""


def bars(found: Detection) -> list[Bar]:
    """Return the figures of a guard in the order in which they are told."""
    drawn = []
    for key, (name, meaning) in FIGURES.items():
        figure = getattr(found.rates, key)
        if not isinstance(figure, Estimate):
            drawn.append(Bar(name.capitalize(), meaning, str(figure)))
            continue
        end = 1.0 if key in ("detection_rate", "precision") else next(end for end in _SCALES if figure.upper <= end)
        drawn.append(
            Bar(
                name.capitalize(),
                meaning,
                percent(figure.value),
                f"{percent(figure.lower)} to {percent(figure.upper)}",
                round(100 * figure.value / end, 2),
                round(100 * figure.lower / end, 2),
                round(100 * (figure.upper - figure.lower) / end, 2),
                f"{100 * end:g} %",
            )
        )
    return drawn
