"""What can be recorded while one decoder layer runs at a time."""

from __future__ import annotations

from moescope.errors import InputError
from profiler.capture.levels import parse_levels

REFUSED = {
    "gradients": "a backward needs all layers at once",
    "predictions": "the language-model head is not among the layers that run",
    "lookahead": "the routers of later layers are not in memory while a layer runs",
}
"""Levels that cannot be, and why."""


def require_levels(level: str) -> tuple[str, ...]:
    """The levels of a comma list, all of which can be recorded layer by layer.

    Raises:
        InputError: an unknown level, or one that cannot.
    """
    levels = parse_levels(level)
    for name in levels:
        if name in REFUSED:
            raise InputError(f"level {name} cannot be recorded with --layer-stream: {REFUSED[name]}")
    return levels
