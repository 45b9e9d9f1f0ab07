"""Published detectors of triggered inputs, written from their papers, to compare the guard with.

A new one is a file with a class that inherits from `Rival`, and a line in `RIVALS`. None is part of a guard.
"""

from guard.lab.rivals.badexpert import BadExpert
from guard.lab.rivals.base import CountedNetwork, Rival
from guard.lab.rivals.beatrix import Beatrix
from guard.lab.rivals.ibd_psc import IbdPsc
from guard.lab.rivals.max_softmax import MaxSoftmax
from guard.lab.rivals.psbd import Psbd
from guard.lab.rivals.scale_up import ScaleUp, ScaleUpLimited
from guard.lab.rivals.strip import Strip
from guard.lab.rivals.ted import Ted
from guard.lab.rivals.ted_plus import TedPlus

#: Name -> class, as the leaderboard and its files name them.
RIVALS: dict[str, type[Rival]] = {
    "max-softmax": MaxSoftmax,
    "strip": Strip,
    "scale-up": ScaleUp,
    "scale-up-limited": ScaleUpLimited,
    "ibd-psc": IbdPsc,
    "ted": Ted,
    "ted++": TedPlus,
    "beatrix": Beatrix,
    "psbd": Psbd,
    "badexpert": BadExpert,
}

__all__ = ["RIVALS", "CountedNetwork", "Rival"]
