"""Guard a suspect image classifier at inference time: which inputs carry a backdoor trigger?

Public names are loaded on first use, so that importing one room of the package does not load the others.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guard.config import GuardConfig
    from guard.errors import GuardError
    from guard.pipeline import Guard
    from guard.suspect import SuspectModel
    from guard.types import Activations, Verdict

_HOMES = {
    "Activations": "guard.types",
    "Guard": "guard.pipeline",
    "GuardConfig": "guard.config",
    "GuardError": "guard.errors",
    "SuspectModel": "guard.suspect",
    "Verdict": "guard.types",
}

__all__ = ["Activations", "Guard", "GuardConfig", "GuardError", "SuspectModel", "Verdict"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'guard' has no attribute {name!r}")
