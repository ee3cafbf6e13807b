"""Which sixteenth of the text a sequence belongs to, and which sequences a sample holds.

Table ``expert_part`` keeps its sums by sixteenths.

Consecutive numbers go to far apart parts (multiples of the golden ratio), not to one after the other: domains are often
fed in turn, and with the number modulo 16 a part would hold a single one of 2, 4, 8 or 16 domains.
"""

from __future__ import annotations

from typing import Any, TypeVar

NUM_PARTS = 16
"""Parts that the sequences of a run are dealt into."""

_GOLDEN = 2654435769  # 2^32 / golden ratio

_MIX = ((16, 0x7FEB352D), (15, 0x68E31DA5))
"""Shifts and odd factors that mix the bits of a sequence's number: small numbers, too, become evenly large ones."""

Numbers = TypeVar("Numbers")
"""An int, or an int64 array of numpy or torch."""


def part_of_sequence(sequence: Numbers) -> Numbers:
    """The part, 0..15, of each sequence by its number in the run: the upper four bits of number x 2^32 / golden ratio.

    The same for all runs and hosts. Runs of consecutive numbers, and every n-th number, fall evenly on the parts.
    """
    number: Any = sequence
    part: Numbers = ((number * _GOLDEN) & 0xFFFFFFFF) >> 28
    return part


def in_every(sequence: Any, every: int) -> Any:
    """Whether each sequence is among the one of ``every`` that is kept whole: bool of its number in the run.

    By a hash of the number, so that it is the same in every session, and domains that take turns are hit alike: even
    steps would miss some of them. Sequence 0 is one; those of a larger ``every`` are among those of a smaller one.
    """
    mixed = sequence & 0xFFFFFFFF
    for shift, factor in _MIX:
        mixed = ((mixed ^ (mixed >> shift)) * factor) & 0xFFFFFFFF
    return (mixed ^ (mixed >> 16)) * every < 1 << 32
