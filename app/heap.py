"""Memory over weeks: garbage collections that stay short, and freed memory that goes back to the system.

Streamlit collects all generations after every rerun. With the libraries that the pages load, and the frames and figures
that are kept, that takes half a second, in which no other user's rerun goes on: what has survived a long collection is
set aside from the next ones. What reruns free lies between what is kept, and the C library holds it back: in five
minutes of five users, two thirds of what it had taken.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import time

LONG = 0.02
"""Seconds of a full collection after which its survivors are set aside."""

THOROUGH = 300.0
"""Seconds until everything is looked through again, so that nothing set aside is kept for good."""

GIVE_BACK = 30.0
"""Seconds between two times when freed memory is given back."""


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


async def give_back() -> None:
    """Give freed memory back to the system every :data:`GIVE_BACK` seconds, until it is cancelled; where the C library
    cannot, return at once.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    while trim is not None:
        await asyncio.sleep(GIVE_BACK)
        await asyncio.to_thread(trim, 0)
