"""In which order to load the bit planes of a step's experts (D2MoE, arXiv 2504.15299).

Weights are nested: the planes of 2 bits lie in those of 3 and 4, so that a load is (expert, plane), the low planes are
shared by all tokens of an expert, and each token computes when the planes of its own width are there. Loading and
computing are a flow shop of two machines: planes come one after another, each is loaded before it is computed with, and
an expert's planes come in ascending order. Orders that are compared:

* ``id``: expert by expert, plane by plane;
* ``hottest``: hottest-expert-bit-first (HEBF), the paper's rule: of the next planes of all experts, the one that most
  tokens use;
* ``johnson``: Johnson's rule (1954) for chains, by Monma and Sidney (1979): no order takes less time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moescope.errors import PlanError
from profiler.metrics._arrays import FloatArray, IntArray

Job = tuple[int, int]
"""(expert, plane)."""


@dataclass(frozen=True)
class PlaneJobs:
    """What one step has to load and to compute.

    Attributes:
        jobs: planes that some token uses, by expert and then plane.
        users: (jobs,) tokens that use the plane.
        load: (jobs,) seconds of each load; 0 for planes that are there.
        compute: (jobs,) seconds of the tokens that were waiting for this plane alone.
    """

    jobs: tuple[Job, ...]
    users: IntArray
    load: FloatArray
    compute: FloatArray


@dataclass(frozen=True)
class Schedule:
    """An order and its time.

    Attributes:
        order: planes as they are loaded.
        seconds: until the last token is computed.
        idle: of these, the ones in which nothing is computed: the bubbles.
    """

    order: tuple[Job, ...]
    seconds: float
    idle: float


def tokens_by_width(
    *,
    selections: NDArray[np.integer[Any]],
    weights: NDArray[np.floating[Any]],
    num_experts: int,
    shares: Sequence[float],
) -> IntArray:
    """How many tokens want each expert in each width, by their gate weights: (E, planes).

    The paper learns a router of widths; where there is none, the uses of smallest weight get the fewest planes.

    Args:
        selections: (tokens, k) of one step, -1 = none.
        weights: (tokens, k) gate weights.
        num_experts: E.
        shares: part of the uses that each width gets, fewest planes first; they add up to 1.

    Raises:
        PlanError: shares that do not add up to 1.
    """
    parts = np.asarray(shares, np.float64)
    if (parts < 0).any() or abs(parts.sum() - 1) > 1e-9:
        raise PlanError(f"shares {list(shares)} must be parts from 0 on that add up to 1")
    used = selections >= 0
    ids, gates = selections[used], weights[used]
    order = np.lexsort((ids, gates))  # lightest first, ties by expert
    edges = np.round(np.cumsum(parts) * len(ids)).astype(np.int64)
    width = np.empty(len(ids), np.int64)
    width[order] = np.searchsorted(edges, np.arange(len(ids)), side="right").clip(max=len(parts) - 1)
    counts: IntArray = np.bincount(ids * len(parts) + width, minlength=num_experts * len(parts)).astype(np.int64)
    return counts.reshape(num_experts, len(parts))


def plane_jobs(
    *, wanted: ArrayLike, load_seconds: ArrayLike, token_seconds: ArrayLike, resident: ArrayLike | None = None
) -> PlaneJobs:
    """The loads and the computing of one step.

    Args:
        wanted: (E, planes) tokens that want an expert up to each plane and no further.
        load_seconds: (planes,) of one plane, the base first: the paper's table of loading by width, as differences.
        token_seconds: (planes,) of one token in each width: the paper's table of dequantization and product.
        resident: (E,) planes that are there, from the base up; None = none.

    Raises:
        PlanError: shapes that do not fit, or seconds below 0.
    """
    tokens = np.asarray(wanted, np.int64)
    load, unit = np.asarray(load_seconds, np.float64), np.asarray(token_seconds, np.float64)
    if tokens.ndim != 2 or load.shape != tokens.shape[1:] or unit.shape != tokens.shape[1:]:
        raise PlanError(f"tokens {tokens.shape} by expert and plane need seconds of as many planes, got {load.shape}")
    if (tokens < 0).any() or (load < 0).any() or (unit < 0).any():
        raise PlanError("tokens and seconds of planes must be 0 or more")
    there = np.zeros(len(tokens), np.int64) if resident is None else np.asarray(resident, np.int64)
    users = tokens[:, ::-1].cumsum(axis=1)[:, ::-1]
    experts, planes = np.nonzero(users)
    return PlaneJobs(
        jobs=tuple(zip(experts.tolist(), planes.tolist(), strict=True)), users=users[experts, planes],
        load=np.where(planes < there[experts], 0.0, load[planes]), compute=(tokens * unit)[experts, planes],
    )  # fmt: skip


def schedule(jobs: PlaneJobs, order: Sequence[Job]) -> Schedule:
    """The time of an order.

    Raises:
        PlanError: the order leaves a plane out, or has one before the plane below it.
    """
    place = {job: index for index, job in enumerate(jobs.jobs)}
    if sorted(order) != sorted(place):
        raise PlanError("an order must hold every plane of the step once")
    seen: dict[int, int] = {}
    loaded = computed = 0.0
    for expert, plane in order:
        if seen.get(expert, -1) > plane:
            raise PlanError(f"plane {plane} of expert {expert} comes after one above it")
        seen[expert] = plane
        index = place[expert, plane]
        loaded += float(jobs.load[index])
        computed = max(computed, loaded) + float(jobs.compute[index])
    return Schedule(tuple(order), computed, computed - float(jobs.compute.sum()))


def schedules(jobs: PlaneJobs) -> dict[str, Schedule]:
    """Every order and its time, by name."""
    orders = {"id": list(jobs.jobs), "hottest": hottest_first(jobs), "johnson": johnson(jobs)}
    return {name: schedule(jobs, order) for name, order in orders.items()}


def hottest_first(jobs: PlaneJobs) -> list[Job]:
    """HEBF: of the next planes of all experts, the one that most tokens use; ties: lower plane, then expert."""
    users = dict(zip(jobs.jobs, jobs.users.tolist(), strict=True))
    chains = _chains(jobs)
    order: list[Job] = []
    while chains:
        expert = min(chains, key=lambda one: (-users[chains[one][0]], chains[one][0][1], one))
        order.append(chains[expert].pop(0))
        if not chains[expert]:
            del chains[expert]
    return order


def johnson(jobs: PlaneJobs) -> list[Job]:
    """The order that takes least time.

    Without precedence Johnson's rule is optimal: first what loads faster than it computes, the fastest load first; then
    the rest, the longest computing first. Within a chain, a plane that the rule would put before the one below it is
    joined with that to one block, which counts as one job (its load before anything of it is computed, and what is left
    to compute when its loads are over); blocks of all chains then follow the rule. Ties: ascending expert.
    """
    seconds = {job: (float(a), float(b)) for job, a, b in zip(jobs.jobs, jobs.load, jobs.compute, strict=True)}
    blocks: list[tuple[list[Job], tuple[float, float]]] = []
    for chain in _chains(jobs).values():
        mine: list[tuple[list[Job], tuple[float, float]]] = []
        for job in chain:
            block = ([job], seconds[job])
            while mine and _rank(block[1]) < _rank(mine[-1][1]):
                below, pair = mine.pop()
                block = (below + block[0], _joined(pair, block[1]))
            mine.append(block)
        blocks += mine
    blocks.sort(key=lambda one: _rank(one[1]))  # stable: blocks of a chain keep their order
    return [job for block, _ in blocks for job in block]


def _rank(pair: tuple[float, float]) -> tuple[int, float]:
    load, compute = pair
    return (0, load) if load < compute else (1, -compute)


def _joined(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    """(seconds to wait before, seconds left after) of two jobs in a row, as one."""
    return first[0] + max(0.0, second[0] - first[1]), second[1] + max(0.0, first[1] - second[0])


def _chains(jobs: PlaneJobs) -> dict[int, list[Job]]:
    chains: dict[int, list[Job]] = {}
    for job in jobs.jobs:
        chains.setdefault(job[0], []).append(job)
    return chains
