"""Watch a model, write a run; evaluate one model against another.

Importing this package loads neither torch nor transformers; the names below do, when they are first used.

::

    with profiler.watch(model, store="runs", name="mine", level="activations") as session:
        for batch in batches:
            model(**batch)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from profiler.capture.discovery import MoELayer, find_moe_layers
    from profiler.capture.loading import load_model, load_tokenizer
    from profiler.capture.session import WatchSession
    from profiler.capture.watch import watch

_LAZY = {
    "MoELayer": "profiler.capture.discovery",
    "WatchSession": "profiler.capture.session",
    "find_moe_layers": "profiler.capture.discovery",
    "load_model": "profiler.capture.loading",
    "load_tokenizer": "profiler.capture.loading",
    "watch": "profiler.capture.watch",
}

__all__ = ["MoELayer", "WatchSession", "find_moe_layers", "load_model", "load_tokenizer", "watch"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
