"""Profile a checkpoint that is larger than memory: one decoder layer after the other.

Importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from profiler.stream.job import collect_streamed

__all__ = ["collect_streamed"]


def __getattr__(name: str) -> Any:
    if name != "collect_streamed":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from profiler.stream.job import collect_streamed

    return collect_streamed
