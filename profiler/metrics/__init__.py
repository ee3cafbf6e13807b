"""Formulas over traces and sums: pure functions on arrays, without torch, SQL or a model.

Each module holds one family of metrics; ``registry`` lists every metric in order and ``docs/metrics.md`` says in
plain words what each one means. Modules load on first use, so that ``import profiler.metrics`` costs nothing::

    import profiler.metrics as metrics

    metrics.local_consistency.srp(selections=trace.ids, num_experts=64, segment_length=16)
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = [
    "co_activation",
    "comparison",
    "confidence",
    "controls",
    "divergence",
    "flips",
    "generated_text",
    "load",
    "local_consistency",
    "lookahead",
    "perplexity",
    "published",
    "registry",
    "similarity",
    "similarity_agreement",
    "specialization",
    "super_experts",
    "temporal",
    "transitions",
]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
