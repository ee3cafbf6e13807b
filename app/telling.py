"""What long work says of itself, in one line on stderr: the sentence, how long it has taken, and what is left."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from app import line

_COUNTED = re.compile(r"(\d+) of (\d+)")


class Telling:
    """Called with a sentence, shows it in place of the last one. A context: leaving it ends the line.

    Sentences that count (``measuring 3 of 24 plans``) also say how long the rest of them takes, by those before.

    Args:
        clock: seconds, for tests.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._stage, self._stage_began, self._first, self._last = "", self._began, 1, 1

    def __call__(self, sentence: str) -> None:
        """Show a sentence."""
        from app.text import duration

        now = self._clock()
        left = self._left(sentence, now)
        times = f"{duration(now - self._began)}" + (f", {duration(left)} left of this" if left is not None else "")
        line.over(f"[{times}] {sentence}")

    def __enter__(self) -> Telling:
        return self

    def __exit__(self, *_: object) -> None:
        line.end()

    def _left(self, sentence: str, now: float) -> float | None:
        """Seconds for what is left of a counted stage; None in its first step, and where nothing is counted."""
        found = _COUNTED.search(sentence)
        if found is None:
            self._stage = ""
            return None
        number, count = int(found[1]), int(found[2])
        stage = f"{sentence[: found.start()]}of {count}"
        if stage != self._stage or number < self._last:  # or the same begins anew
            self._stage, self._stage_began, self._first, self._last = stage, now, number, number
            return None
        self._last = number
        done = number - self._first
        return (now - self._stage_began) / done * (count - number + 1) if done > 0 else None
