"""Garbage collections that stay short: what has survived a long one is set aside from the next ones.

Streamlit collects all generations after every rerun. With the libraries that the pages load, and the frames and figures
that are kept, that takes half a second, in which no other user's rerun goes on.
"""

from __future__ import annotations

import gc
import time

LONG = 0.02
"""Seconds of a full collection after which its survivors are set aside."""

THOROUGH = 900.0
"""Seconds until everything is looked through again, so that nothing set aside is kept for good."""


class _Watch:
    """Called by the interpreter before and after each collection."""

    def __init__(self) -> None:
        self.began = self.looked = time.monotonic()

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        if info["generation"] < 2:
            return
        now = time.monotonic()
        if phase == "start":
            if now - self.looked > THOROUGH:
                self.looked = now
                gc.unfreeze()
            self.began = time.monotonic()
        elif now - self.began > LONG:
            gc.freeze()


def keep_collections_short() -> None:
    """Set survivors aside from now on, in this process."""
    if not any(isinstance(known, _Watch) for known in gc.callbacks):
        gc.callbacks.append(_Watch())
