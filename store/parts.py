"""Which sixteenth of the text a sequence belongs to: what table ``expert_part`` keeps its sums by.

Consecutive numbers go to far apart parts (multiples of the golden ratio), not to one after the other: domains are often
fed in turn, and with the number modulo 16 a part would hold a single one of 2, 4, 8 or 16 domains.
"""

from __future__ import annotations

from typing import Any, TypeVar

NUM_PARTS = 16
"""Parts that the sequences of a run are dealt into."""

_GOLDEN = 2654435769  # 2^32 / golden ratio

Numbers = TypeVar("Numbers")
"""An int, or an int64 array of numpy or torch."""


def part_of_sequence(sequence: Numbers) -> Numbers:
    """The part, 0..15, of each sequence by its number in the run: the upper four bits of number x 2^32 / golden ratio.

    The same for all runs and hosts. Runs of consecutive numbers, and every n-th number, fall evenly on the parts.
    """
    number: Any = sequence
    part: Numbers = ((number * _GOLDEN) & 0xFFFFFFFF) >> 28
    return part
