"""Guard a suspect image classifier at inference time: which inputs carry a backdoor trigger?

Public names are loaded on first use, so that importing one room of the package does not load the others.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guard.config import GuardConfig
    from guard.detection.pipeline import Guard
    from guard.errors import GuardError
    from guard.serving.guarded_model import GuardedModel
    from guard.suspect.model import SuspectModel
    from guard.types import Activations, Verdict

_HOMES = {
    "Activations": "guard.types",
    "Guard": "guard.detection.pipeline",
    "GuardConfig": "guard.config",
    "GuardError": "guard.errors",
    "GuardedModel": "guard.serving.guarded_model",
    "SuspectModel": "guard.suspect.model",
    "Verdict": "guard.types",
}

__all__ = ["Activations", "Guard", "GuardConfig", "GuardError", "GuardedModel", "SuspectModel", "Verdict"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'guard' has no attribute {name!r}")


#: Modules that moved. Archives made before name them in their adapter, or as the place of a network's factory.
_MOVED = {
    "guard.attacks": "guard.lab.attacks",
    "guard.attacks.networks": "guard.lab.attacks.networks",
    "guard.pipeline": "guard.detection.pipeline",
    "guard.serving.archived": "guard.torchserve.archives.contents",
    "guard.serving.batches": "guard.torchserve.batches",
    "guard.serving.envelopes": "guard.torchserve.envelopes",
    "guard.serving.user_handler": "guard.torchserve.user_handler",
    "guard.weights": "guard.suspect.weights",
}


class _Moved(MetaPathFinder, Loader):
    """Finds a module that moved under its old name: the same module, not a second one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in _MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(_MOVED[spec.name])
        if spec.name == "guard.pipeline":
            import_module("guard.torchserve.older_adapters")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state  # the import system has put the old name's there


sys.meta_path.insert(0, _Moved())
