"""One model measured against another on held-out text: what a change of its weights has cost.

Importing this package loads no torch; the names below do, when they are first used.

::

    base = BaseDistribution.of(model, corpus.batches())      # once
    found = base.against(edited)                             # for each of many edited variants
    found.kl, found.low, found.high, found.per_domain["code"].kl

    everything = evaluate(edited, model, corpus.batches, tokenizer=tokenizer, kept=kept)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from profiler.evaluation.compare import PARTS, Evaluation, evaluate
    from profiler.evaluation.distribution import BaseDistribution, Divergence, divergence
    from profiler.evaluation.report import document

_LAZY = {
    "BaseDistribution": "profiler.evaluation.distribution",
    "Evaluation": "profiler.evaluation.compare",
    "PARTS": "profiler.evaluation.compare",
    "evaluate": "profiler.evaluation.compare",
    "document": "profiler.evaluation.report",
    "Divergence": "profiler.evaluation.distribution",
    "divergence": "profiler.evaluation.distribution",
}

__all__ = ["PARTS", "BaseDistribution", "Divergence", "Evaluation", "divergence", "document", "evaluate"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
