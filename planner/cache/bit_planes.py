"""Nested widths loaded plane by plane: what the order of loads within a step is worth (D2MoE, arXiv 2504.15299)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.cache.setting import Setting
from planner.simulate.planes import plane_jobs, schedules, tokens_by_width
from planner.simulate.workload import Workload

BITS = (2, 1, 1)
"""Bits of the base and of each residual: widths 2, 3 and 4."""

SHARES = (0.25, 0.25, 0.5)
"""Part of the uses that take 2, 3 and all 4 bits, those of least gate weight the fewest; ours: the paper learns it."""

STEPS = 300
"""Steps that are looked at, spread over passes and layers."""

WORDS = {"id": "by number", "hottest": "the plane that most tokens use first", "johnson": "the best there is"}


@dataclass(frozen=True)
class PlaneFigures:
    """An order of loads, mean over steps.

    Attributes:
        order: in words.
        ms: until the last token of a step is computed.
        idle: of which nothing is computed.
        least: what no order can beat: all loads, or all computing.
    """

    order: str
    ms: float
    idle: float
    least: float


def bit_planes(setting: Setting, *, size: int = 8) -> list[PlaneFigures]:
    """Every order, on steps of ``size`` tokens of which nothing is on the device yet; empty without gate weights.

    Args:
        setting: model, machine and requests.
        size: tokens of a step.
    """
    work = setting.apart[1] if setting.apart is not None else setting.test
    if work.weights is None or work.num_passes < size:
        return []
    machine, weights = setting.machine, float(setting.sizes.parameters.max())
    planes = np.array([bits * weights / 8 for bits in BITS])
    load = machine.link.latency + planes / machine.link.bandwidth
    token = np.array([machine.device.seconds(size_, weights, 1) for size_ in np.cumsum(planes)])
    sums: dict[str, list[tuple[float, float]]] = {name: [] for name in WORDS}
    least = []
    for layer, tokens in _steps(work, size):
        wanted = tokens_by_width(
            selections=work.ids[layer, tokens], weights=work.weights[layer, tokens], num_experts=work.num_experts,
            shares=SHARES,
        )  # fmt: skip
        jobs = plane_jobs(wanted=wanted, load_seconds=load, token_seconds=token)
        least.append(max(float(jobs.load.sum()), float(jobs.compute.sum())))
        for name, found in schedules(jobs).items():
            sums[name].append((found.seconds, found.idle))
    rows = []
    for name, values in sums.items():
        seconds, idle = np.array(values).mean(axis=0)
        rows.append(PlaneFigures(WORDS[name], 1e3 * float(seconds), 1e3 * float(idle), 1e3 * float(np.mean(least))))
    return rows


def _steps(work: Workload, size: int) -> list[tuple[int, NDArray[np.int64]]]:
    """(layer, passes that run together): successive tokens, as in reading text; some span two requests."""
    count = min(STEPS, work.num_layers * (work.num_passes // size))
    starts = np.linspace(0, work.num_passes - size, count).astype(np.int64)
    return [(place % work.num_layers, np.arange(start, start + size)) for place, start in enumerate(starts.tolist())]
