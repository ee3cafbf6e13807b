"""Checkpoints in order: by the steps in their names or by date, and what to call them on an axis."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

Order = Literal["step", "date", "chosen"]

_STEP = re.compile(
    r"(?:step|iter|iteration|ckpt|checkpoint|epoch)s?[-_.=]?(\d+(?:\.\d+)?)([kmb]?)(?![a-z])", re.IGNORECASE
)
_DATE = re.compile(r"(?<!\d)((?:19|20)\d\d)[-_.](\d\d)[-_.](\d\d)(?!\d)")
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)([kmb]?)(?![a-z])", re.IGNORECASE)


def ordered(names: Sequence[str], times: Sequence[float], by: Order) -> list[int]:
    """The places of runs in order: by the step in their names (those without come last, and equal ones by date), by
    date, or as they were chosen."""
    places = range(len(names))
    if by == "chosen":
        return list(places)
    if by == "date":
        return sorted(places, key=lambda place: times[place])
    return sorted(places, key=lambda place: (step_of(names[place]), times[place]))


def step_of(name: str) -> float:
    """The training step in a run's name: the number behind "step", "checkpoint" and the like, else a date as one
    number, else the last number.

    20000 of "run-step20k", 20260131 of "run-2026-01-31"; infinite without a number.
    """
    found = _STEP.findall(name) or _NUMBER.findall(_DATE.sub(r"\1\2\3", name))
    if not found:
        return float("inf")
    digits, unit = found[-1]
    return float(digits) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[unit.lower()]


def alike(name: str, names: Sequence[str]) -> list[str]:
    """The names that differ from this one in their numbers only, itself included: checkpoints of one training."""
    return [other for other in names if _stem(other) == _stem(name)]


def short_names(names: Sequence[str]) -> list[str]:
    """The names without the words that all of them begin with; as they are where nothing would be left of one."""
    words = [re.split(r"(?<=[-_.+])", name) for name in names]
    if len(set(names)) < 2:
        return list(names)
    shortest = min(len(one) for one in words)
    front = next((at for at in range(shortest) if len({one[at] for one in words}) > 1), shortest)
    cut = ["".join(one[front:]) for one in words]
    return cut if all(cut) and len(set(cut)) == len(set(names)) else list(names)


def _stem(name: str) -> str:
    return re.sub(r"\d+(?:\.\d+)?[kmb]?(?![a-z])", "#", name.lower())
