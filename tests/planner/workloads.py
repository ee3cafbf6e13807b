"""Workloads made for tests: selections of a given kind, drawn with a seed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.simulate.workload import Workload, decode


def drawn_workload(
    seed: int, *, layers: int = 3, experts: int = 6, k: int = 2, requests: int = 4, length: int = 10, skew: float = 0.0
) -> Workload:
    """Tokens that draw k distinct experts independently, the first ones more often with more skew."""
    generator = np.random.default_rng(seed)
    noise = generator.gumbel(size=(layers, requests, length, experts)) - skew * np.arange(experts)
    return of_selections(np.argsort(-noise, axis=-1)[..., :k], experts)


def of_selections(selections: NDArray[Any] | list[Any], experts: int, domains: list[str] | None = None) -> Workload:
    """A workload of selections (layers, requests, tokens, k)."""
    return decode(selections=np.asarray(selections, np.int16), num_experts=experts, domains=domains)


def sets_of(ids: NDArray[Any]) -> set[int]:
    """The experts of one step."""
    return {int(one) for one in ids if one >= 0}
