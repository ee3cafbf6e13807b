"""The shared compression backend, and what each MoE family looks like. Anyone may use it without the rest.

::

    plan = compressor.Plan.load("plan.json")
    compressor.apply(plan, source="Qwen/Qwen3-30B-A3B", destination="out/")
    model = compressor.load("out/")

Names load on first use: ``import compressor`` loads no torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressor.apply import Receipt, apply
    from compressor.checkpoint.verification import Verified, verify
    from compressor.load import load
    from compressor.memory import edit, edited
    from compressor.plan import Plan

__all__ = ["Plan", "Receipt", "Verified", "apply", "edit", "edited", "load", "verify"]

_HOMES = {
    "Plan": "compressor.plan",
    "Receipt": "compressor.apply",
    "Verified": "compressor.checkpoint.verification",
    "apply": "compressor.apply",
    "edit": "compressor.memory",
    "edited": "compressor.memory",
    "load": "compressor.load",
    "verify": "compressor.checkpoint.verification",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Package(ModuleType):
    """The package, in which a name stays the function although a module is called like it."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing compressor.apply puts the module into the package, in place of the function of that name.
        if isinstance(value, ModuleType) and _HOMES.get(name) == value.__name__:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
