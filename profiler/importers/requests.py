"""Sequences put together from positions alone, where an engine records tokens without saying whose they are."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from numpy.typing import NDArray


class Requests:
    """Open sequences by the position at which each would go on."""

    def __init__(self) -> None:
        self._open: dict[int, list[int]] = defaultdict(list)
        self._length: list[int] = []

    def place(
        self, positions: NDArray[np.int64], stretches: list[tuple[int, int]]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Sequence and position (from 0 inside it) of each token of a forward pass, and the tokens' order by both.

        positions (tokens,): as the engine numbers them; stretches: parts of one request each, (first, behind the last).
        """
        sequence, place = np.zeros(len(positions), np.int64), np.zeros(len(positions), np.int64)
        starts = [int(positions[low]) for low, _ in stretches]
        for (low, high), start in zip(stretches, starts, strict=True):
            waiting = self._open[start] if start > 0 else []
            # Two that could be it, or two that want it: nobody can tell, so the stretch stands by itself.
            if len(waiting) == 1 and starts.count(start) == 1:
                number = waiting.pop()
            else:
                number = len(self._length)
                self._length.append(0)
            sequence[low:high] = number
            place[low:high] = self._length[number] + np.arange(high - low)
            self._length[number] += high - low
            self._open[start + high - low].append(number)
        return sequence, place, np.lexsort((place, sequence))
