"""What timm imports of torchvision, as empty classes, where torchvision cannot be imported.

timm's networks use none of it but `FrozenBatchNorm2d`, and that only to recognise such layers; its transforms and
data sets, which do, are not used here. A wheel of torchvision must be made for the installed torch; many builds of
torch have none.
"""

from __future__ import annotations

import enum
import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

_NAMES = ("", ".datasets", ".ops", ".ops.misc", ".transforms", ".transforms.functional")


class InterpolationMode(enum.Enum):
    """Ways to resize, under the names that timm uses."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class _EmptyModule(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def _is_importable() -> bool:
    try:
        importlib.import_module("torchvision")
    except (ImportError, OSError, RuntimeError):  # none, or one for another build of torch
        return False
    return True


@contextmanager
def torchvision_for_timm() -> Iterator[None]:
    """Let `import timm` succeed meanwhile; other packages, which look for torchvision, find none afterwards."""
    if _is_importable():
        yield
        return
    modules = {f"torchvision{name}": _EmptyModule(f"torchvision{name}") for name in _NAMES}
    modules["torchvision.transforms.functional"].InterpolationMode = InterpolationMode  # type: ignore[attr-defined]
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
