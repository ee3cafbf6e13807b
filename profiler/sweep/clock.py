"""How far a sweep is: tokens read of all that will be, the pace, and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

Tell = Callable[["Progress"], None]


@dataclass(frozen=True)
class Progress:
    """Where a sweep stands.

    Attributes:
        part: what is being measured.
        share: of all tokens that will be read, 0..1.
        pace: tokens read per second since the start.
        left: seconds that are left at that pace; None before anything was read.
    """

    part: str
    share: float
    pace: float
    left: float | None


class Clock:
    """Counts tokens. ``total``: how many will be read; ``tell``: told after each batch."""

    def __init__(self, total: int, tell: Tell | None = None) -> None:
        self._total, self._tell = max(1, total), tell
        self._done, self._began = 0, time.perf_counter()

    def part(self, name: str) -> Callable[[int], None]:
        """What one part of the work calls with the tokens that it has read since the last time."""

        def read(tokens: int) -> None:
            self._done += tokens
            if self._tell is not None:
                seconds = max(1e-9, time.perf_counter() - self._began)
                pace = self._done / seconds
                left = max(0.0, self._total - self._done) / pace if pace else None
                self._tell(Progress(name, min(1.0, self._done / self._total), pace, left))

        return read
