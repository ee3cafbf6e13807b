"""Which statistic of a run recommends what, as plain rows; only where the run has the data."""

from __future__ import annotations

from dataclasses import dataclass

import store


@dataclass(frozen=True)
class Advice:
    """One statistic and what follows from it.

    Attributes:
        name: of the statistic, as a word.
        statistic: what was looked at, in words.
        observed: its value.
        text: the value with its unit, as people read it.
        threshold: where it turns.
        holds: whether the value is on the side on which the rest follows.
        suggest: what is worth trying.
        avoid: what is not.
        where: layers or tokens that it was taken from.
    """

    name: str
    statistic: str
    observed: float
    text: str
    threshold: str
    holds: bool
    suggest: str
    avoid: str
    where: str


def advice(run: store.Run) -> list[Advice]:
    """The rows for which the run holds the data."""
    return []
