"""Turns a run into plans: what to drop, merge, slim, quantize, factor, cache, place or route, and why.

::

    plan = planner.make(run, preset="reap", share=0.25)
    plan.save("plan.json")

    advice = planner.recommend(run, memory="12GiB")       # a sequence of plans, the best first
    slots = planner.place.eplb(load=counts, num_replicas=288, num_groups=8, num_nodes=4, num_gpus=32)
    found = planner.caching.study(run, planner.machines.machine("rtx4090"))
    ranking = planner.choose([plan, other], measure)      # measure(plan) -> Measurement; the planner runs no model

Importing this loads neither torch nor numpy; the names below do, when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from planner.presets import DEFAULT, PRESETS

if TYPE_CHECKING:
    from planner import caching, machines, place, placing, serving
    from planner.advice import recommend
    from planner.entry import make
    from planner.estimate.prediction import predict
    from planner.finalists import Measurement, choose

_LAZY = {
    "Measurement": "planner.finalists",
    "choose": "planner.finalists",
    "make": "planner.entry",
    "predict": "planner.estimate.prediction",
    "recommend": "planner.advice",
}

_MODULES = ("caching", "machines", "place", "placing", "serving")
"""Modules that are reached as attributes: ``planner.place.eplb(...)``."""

__all__ = [
    "DEFAULT",
    "PRESETS",
    "Measurement",
    "caching",
    "choose",
    "machines",
    "make",
    "place",
    "placing",
    "predict",
    "recommend",
    "serving",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"planner.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
