"""What a measure of tokens is: its words, its unit and the range that its colours span."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """One figure per token.

    Attributes:
        name: how it is asked for.
        label: a few words.
        unit: of the value; empty = a share of 1.
        low: value of the palest colour.
        high: value of the strongest colour; larger values have it too.
        note: what it is taken from, where that differs between runs, as a sentence.
    """

    name: str
    label: str
    unit: str = ""
    low: float = 0.0
    high: float = 1.0
    note: str = ""
