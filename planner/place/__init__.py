"""Which device of an expert-parallel group holds which experts, one file per method.

::

    slots = planner.place.eplb(load=counts, num_replicas=288, num_groups=8, num_nodes=4, num_gpus=32)
    slots.physical_to_logical          # (layers, 288) expert in each slot

Importing this loads no numpy; the names below do, when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.place.rebalance import eplb
    from planner.place.slots import Placement

_LAZY = {"Placement": "planner.place.slots", "eplb": "planner.place.rebalance"}  # no module of ours has these names

__all__ = ["Placement", "eplb"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
