"""HOBBIT: one priority made of four, and misses of little gate weight in a narrower version."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moescope.errors import PlanError
from planner.simulate.policies.job import Job, Served, plain
from planner.simulate.workload import Workload

Weights = tuple[float, float, float, float]

EVEN: Weights = (0.4, 0.4, 0.0, 0.2)
"""Where nobody fitted them; ours."""


def hobbit(
    job: Job,
    *,
    weights: Weights = EVEN,
    distance: Literal["corrected", "paper"] = "corrected",
    thresholds: tuple[float, float] | None = None,
    narrow_slots: int | None = None,
) -> Served:
    """The expert of least priority goes (arXiv 2411.01433, no code published).

    Priority = w_lru R / T + w_lfu F / T + w_lhu H / T + w_fld (1 - d / L): T tokens of the request so far, R the token
    that used the expert last, F its uses, H its uses in full precision, d the layers until its layer runs; R, F and H
    are forgotten at every request. In caches per layer the last term is the same for all, hence of no effect.

    Args:
        weights: w_lru, w_lfu, w_lhu, w_fld; they sum to 1. :func:`fit_hobbit` finds them.
        distance: ``paper``: d of the current layer is 0, so that those of its experts that are not used now look the
            most urgent, a whole sweep before they can be. ``corrected``: it is L.
        thresholds: T1 and T2 (paper, Mixtral: 0.6 and 0.9). A missing expert is loaded in full if the share of the
            token's gate weight ranked before it is at most T1, in a narrower version if at most T2, and else left out.
            An expert that is there in full is used in full. None = all in full.
        narrow_slots: slots of the second cache, for narrow versions, in addition to the others: per layer, or of a
            shared cache in all. The paper does not say how memory is divided.

    Raises:
        PlanError: weights or thresholds out of range; thresholds on a workload without gate weights, or of passes of
            several tokens, or without ``narrow_slots``.
    """
    from planner.simulate import _hobbit

    work, layers = job.workload, job.workload.num_layers
    if len(weights) != 4 or min(weights) < 0 or abs(sum(weights) - 1) > 1e-6:
        raise PlanError(f"HOBBIT's weights are {weights}: give four that are not negative and sum to 1")
    forms = np.zeros((0, 0, 0), np.int8)
    rooms = np.zeros(layers, np.int64)
    if thresholds is not None:
        gates = _gates(work, thresholds, narrow_slots)
        forms = _hobbit.forms_of(plain(gates, np.float32), job.ids(), float(thresholds[0]), float(thresholds[1]))
        rooms[:] = min(narrow_slots or 0, work.num_experts * (layers if job.shared else 1))
    missing, narrow, skipped, there = job.missing(), job.missing(), job.missing(), job.there()
    priority = _hobbit.Priority(
        float(weights[0]), float(weights[1]), float(weights[2]), float(weights[3]) * nearness(layers, distance)
    )
    _hobbit.replay(
        job.ids(), forms, job.starts(), work.num_experts, job.capacity, rooms, job.shared, not job.warm, priority,
        missing, narrow, skipped, job.stretch.start, there,
    )  # fmt: skip
    held = job.slots + int(rooms[0] if job.shared else rooms.sum())
    if thresholds is None:
        return Served(missing, there, held, job.capacity)
    return Served(missing, there, held, job.capacity, narrow, skipped)


def nearness(layers: int, distance: str) -> NDArray[np.float64]:
    """(2 * layers,) 1 - d / L of the layer so many ahead, in a circle."""
    ahead = np.arange(layers, dtype=np.float64)
    if distance == "corrected":
        ahead[0] = layers
    elif distance != "paper":
        raise PlanError(f"distance is {distance!r}; HOBBIT takes 'corrected' or 'paper'")
    return np.tile(1.0 - ahead / layers, 2)


def fit_hobbit(
    train: Workload,
    *,
    slots: int,
    shared: bool = True,
    warm: bool = True,
    thresholds: tuple[float, float] | None = None,
    narrow_slots: int | None = None,
    narrow_cost: float = 0.25,
    distance: Literal["corrected", "paper"] = "corrected",
    parts: int = 10,
    max_steps: int = 48_000,
) -> Weights:
    """The weights of least loading on a training workload: every point of a grid on the simplex is replayed.

    Args:
        train: of other requests than those that the result is used on.
        slots, shared, warm, thresholds, narrow_slots, distance: as in the replay.
        narrow_cost: bytes of a narrow version over those of a full one (int4 for fp16: 0.25); a skipped one costs none.
        parts: steps of the grid from 0 to 1; 10 are 286 points (66 in caches per layer, where w_fld is 0).
        max_steps: layers x passes that are replayed at most: whole requests, spread evenly; at least one.

    Returns:
        w_lru, w_lfu, w_lhu, w_fld; of equals the first in descending order of the weights.
    """
    from planner.simulate.replay import replay

    some = _subsample(train, max_steps)
    best: tuple[float, Weights] | None = None
    for weights in _grid(parts, with_distance=shared):
        done = replay(
            some, policy="hobbit", slots=slots, shared=shared, warm=warm, weights=weights, thresholds=thresholds,
            narrow_slots=narrow_slots, distance=distance,
        )  # fmt: skip
        narrow = 0 if done.narrow is None else int(done.narrow.sum())
        skipped = 0 if done.skipped is None else int(done.skipped.sum())
        cost = int(done.missing.sum()) - narrow - skipped + narrow_cost * narrow
        if best is None or cost < best[0]:
            best = (cost, weights)
    assert best is not None
    return best[1]


def _grid(parts: int, *, with_distance: bool) -> list[Weights]:
    if parts < 1:
        raise PlanError(f"a grid of {parts} parts has no point: give at least 1")
    points = []
    for recency in range(parts, -1, -1):
        for frequency in range(parts - recency, -1, -1):
            left = parts - recency - frequency
            for full in range(left, -1, -1) if with_distance else (left,):
                points.append((recency / parts, frequency / parts, full / parts, (left - full) / parts))
    return points


def _subsample(workload: Workload, max_steps: int) -> Workload:
    if workload.num_passes * workload.num_layers <= max_steps:
        return workload
    share = max_steps / (workload.num_passes * workload.num_layers)
    wanted = max(1, int(share * workload.num_requests))
    return workload.requests(np.linspace(0, workload.num_requests - 1, wanted).round().astype(np.int64))


def _gates(work: Workload, thresholds: tuple[float, float], narrow_slots: int | None) -> NDArray[np.float32]:
    """The gate weights that the thresholds look at, if they can."""
    if not 0 <= thresholds[0] <= thresholds[1] <= 1:
        raise PlanError(f"thresholds {thresholds} must ascend within 0..1")
    if narrow_slots is None or narrow_slots < 0:
        raise PlanError("thresholds take a second cache: give narrow_slots, 0 or more, beside them")
    if work.weights is None:
        raise PlanError("thresholds look at gate weights, and the trace has none: leave them out, or record weights")
    if (work.pass_tokens > 1).any():
        raise PlanError("thresholds look at one token's gate weights, and passes hold several: decode one at a time")
    return work.weights
