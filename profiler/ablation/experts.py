"""Experts by name, as users write them: ``1:68`` is expert 68 of decoder layer 1, ``33:shared`` its shared experts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moescope.errors import InputError

_NAME = re.compile(r"(\d+)(?:\.(\d+))?:(\d+|shared)")


@dataclass(frozen=True, order=True)
class Expert:
    """One expert of a model.

    Attributes:
        layer: decoder layer.
        step: 0, or which of several experts modules in the layer.
        kind: routed | shared; the shared experts of a layer count as its expert 0.
        expert: its number.
    """

    layer: int
    step: int = 0
    kind: Literal["routed", "shared"] = "routed"
    expert: int = 0

    def __str__(self) -> str:
        place = f"{self.layer}.{self.step}" if self.step else f"{self.layer}"
        return f"{place}:{'shared' if self.kind == 'shared' else self.expert}"


def parse_experts(text: str) -> list[Expert]:
    """Experts from a comma list such as ``1:68,2:92,33:shared`` (``2.1:7`` is the second experts module of layer 2).

    Raises:
        InputError: an entry that is none, one that stands there twice, or nothing at all.
    """
    found: list[Expert] = []
    for part in re.split(r"[,;\s]+", text.strip()):
        match = _NAME.fullmatch(part)
        if match is None:
            raise InputError(f"expert {part!r} is not LAYER:EXPERT: write a comma list such as 1:68,2:92,33:shared")
        layer, step = int(match[1]), int(match[2] or 0)
        shared = match[3] == "shared"
        expert = Expert(layer, step, "shared") if shared else Expert(layer, step, "routed", int(match[3]))
        if expert in found:
            raise InputError(f"expert {expert} stands there twice")
        found.append(expert)
    return sorted(found)


def random_experts(chosen: Sequence[Expert], available: Iterable[Expert], *, seed: int) -> list[Expert]:
    """As many other routed experts as were chosen, from anywhere; empty where there are too few."""
    others = sorted(set(available) - set(chosen))
    if len(others) < len(chosen):
        return []
    drawn = np.random.default_rng(seed).choice(len(others), len(chosen), replace=False)
    return sorted(others[place] for place in drawn)


def same_layer_experts(chosen: Sequence[Expert], available: Iterable[Expert], *, seed: int) -> list[Expert]:
    """As many other routed experts, each layer as often as among the chosen ones; empty where there are too few."""
    others = sorted(set(available) - set(chosen))
    generator = np.random.default_rng(seed)
    found: list[Expert] = []
    for layer in sorted({expert.layer for expert in chosen}):
        count = sum(expert.layer == layer for expert in chosen)
        here = [expert for expert in others if expert.layer == layer]
        if len(here) < count:
            return []
        found += [here[place] for place in generator.choice(len(here), count, replace=False)]
    return sorted(found)
