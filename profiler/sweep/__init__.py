"""Rules of routing tried on the model itself: what each costs in loss, and what it saves, on held-out text.

Importing this package loads no torch; the names below do, when they are first used.

::

    study = Study.of(model, text.judged)                       # the model as it is, once
    found = study.trial(Trial("top_p", 0.4), calibration=text.calibration)
    found["change"], found["flops_share"], found["per_domain"]["code"]["change"]

The router was trained for its own rule: what is measured here is the rule put upon it, not a model trained with it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from profiler.sweep.job import Options, sweep
    from profiler.sweep.study import Study
    from profiler.sweep.text import Text, divide
    from profiler.sweep.trials import Trial, default_trials, parse_rules

_LAZY = {
    "Options": "profiler.sweep.job",
    "Study": "profiler.sweep.study",
    "Text": "profiler.sweep.text",
    "Trial": "profiler.sweep.trials",
    "default_trials": "profiler.sweep.trials",
    "divide": "profiler.sweep.text",
    "parse_rules": "profiler.sweep.trials",
    "sweep": "profiler.sweep.job",
}

__all__ = ["Options", "Study", "Text", "Trial", "default_trials", "divide", "parse_rules", "sweep"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
