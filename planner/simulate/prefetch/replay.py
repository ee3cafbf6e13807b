"""A cache with prefetching, without time: what predictions bring in before it is needed, and what they push out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moescope.errors import PlanError
from planner.simulate.outcome import Counts, Outcome
from planner.simulate.prefetch.predicted import Predicted
from planner.simulate.workload import Workload
from profiler.metrics._arrays import ratio


@dataclass(frozen=True)
class Prefetched:
    """What a cache with prefetching did.

    Attributes:
        outcome: hits, loads on demand and stalls; an expert that was fetched in time is a hit.
        fetched: (layers, passes) uint16 experts fetched for each step before it began.
        useful: (layers, passes) uint16 experts of each step that a prediction had brought and that had not been used
            since. It may have been the prediction for an earlier step.
    """

    outcome: Outcome
    fetched: NDArray[np.uint16]
    useful: NDArray[np.uint16]

    @property
    def wasted(self) -> int:
        """Experts fetched that were evicted before any use, or never used."""
        return int(self.fetched.sum()) - int(self.useful.sum())

    @property
    def wasted_share(self) -> float:
        """Part of the fetches that were wasted, 0..1; NaN without fetches."""
        return float(ratio(self.wasted, self.fetched.sum()))

    @property
    def loads(self) -> int:
        """Experts that crossed the link, on demand or foreseen."""
        return int(self.fetched.sum()) + int(self.outcome.missing.sum())


def replay_prefetch(
    workload: Workload,
    predicted: Predicted,
    *,
    slots: int | None = None,
    shared: bool = False,
    layer_slots: Sequence[int] | None = None,
    limit: int | None = None,
    demote: bool = False,
) -> Prefetched:
    """LRU caches into which foreseen experts are brought before their step.

    Every fetch is taken to arrive in time; :mod:`planner.simulate.timeline` knows better. A fetched expert enters as
    the most recent one. No fetch evicts what the step under way needs or what is foreseen for a step to come
    (HOBBIT, arXiv 2411.01433); a load on demand evicts foreseen ones last, and never what its own step needs. A step's
    experts are used in the order in which the workload lists them, so the last is the most recent. The caches start
    empty and stay as they are between requests.

    Args:
        workload: what is needed.
        predicted: what is foreseen for it. Its first steps, fewer than it looks ahead, are not fetched for.
        slots: experts that the device holds: per layer, or in all if ``shared``. More than there are count as all.
        shared: one cache for all layers instead of one for each.
        layer_slots: (layers,) slots of each, instead of ``slots``.
        limit: fetches per step at most, the most confident first; None = all; 0 = plain LRU.
        demote: experts fetched in vain become the next to go once their step is over, instead of staying as recent as
            used ones. Ours.

    Raises:
        PlanError: sizes that cannot be, a limit below 0, or predictions for another workload.
    """
    sizes = sizes_of(workload, slots=slots, shared=shared, layer_slots=layer_slots)
    if limit is not None and limit < 0:
        raise PlanError(f"limit {limit} is no number of fetches: give at least 0, or none at all")
    counted = run_lru(workload, predicted, sizes=sizes, limit=predicted.ids.shape[2] if limit is None else limit,
                      demote=demote)  # fmt: skip
    name = "lru" if limit == 0 else f"lru+{predicted.method}"
    return Prefetched(outcome_of(workload, counted.absent, name, int(sizes.sum()), counted.overflow),
                      counted.fetched, counted.useful)  # fmt: skip


@dataclass(frozen=True)
class Counted:
    """What the replay wrote down, in the terms of :func:`planner.simulate._fetching.replay_lru`."""

    absent: NDArray[np.bool_]
    unfetched: NDArray[np.bool_]
    fetched: NDArray[np.uint16]
    useful: NDArray[np.uint16]
    overflow: int


def run_lru(
    workload: Workload, predicted: Predicted, *, sizes: NDArray[np.int64], limit: int, demote: bool = False
) -> Counted:
    """The replay itself; sizes (layers,), or (1,) of a shared cache."""
    from planner.simulate._fetching import empty_caches, replay_lru

    check_same(workload, predicted)
    absent, unfetched = np.zeros(workload.ids.shape, np.bool_), np.zeros(predicted.ids.shape, np.bool_)
    fetched, useful = (np.zeros(workload.ids.shape[:2], np.uint16) for _ in range(2))
    caches = empty_caches(objects=workload.num_layers * workload.num_experts, slots=sizes)
    overflow = replay_lru(
        caches, np.ascontiguousarray(workload.ids), np.ascontiguousarray(predicted.ids), predicted.ahead, limit, demote,
        absent, unfetched, fetched, useful,
    )  # fmt: skip
    return Counted(absent, unfetched, fetched, useful, int(overflow))


def check_same(workload: Workload, predicted: Predicted) -> None:
    """Refuse predictions for other steps."""
    if predicted.ids.shape[:2] != workload.ids.shape[:2]:
        layers, passes = predicted.ids.shape[:2]
        raise PlanError(
            f"predictions for {layers} layers and {passes} passes do not fit a workload of {workload.num_layers} and"
            f" {workload.num_passes}: predict for this workload"
        )


def by_request(workload: Workload, values: NDArray[np.generic]) -> Counts:
    """(requests, layers) sums of values (layers, passes)."""
    sums = np.concatenate([np.zeros((len(values), 1), np.int64), np.cumsum(values, axis=1, dtype=np.int64)], axis=1)
    return np.ascontiguousarray(np.diff(sums[:, workload.offsets], axis=1).T)


def outcome_of(workload: Workload, absent: NDArray[np.bool_], policy: str, slots: int, overflow: int) -> Outcome:
    """The outcome of a replay in which the experts absent (layers, passes, width) were missing."""
    missing = absent.sum(axis=2).astype(np.uint16)
    needed = workload.needed
    uses = by_request(workload, needed)
    return Outcome(
        policy=policy, slots=slots, uses=uses, hits=uses - by_request(workload, missing),
        stalled=by_request(workload, missing > 0), steps=by_request(workload, needed > 0), overflow=overflow,
        missing=missing,
    )  # fmt: skip


def sizes_of(
    workload: Workload, *, slots: int | None, shared: bool = False, layer_slots: Sequence[int] | None = None
) -> NDArray[np.int64]:
    """Slots of every cache: (layers,), or (1,) of the one that all share; arguments as of :func:`replay_prefetch`."""
    if (slots is None) == (layer_slots is None) or (shared and layer_slots is not None):
        raise PlanError("a cache takes slots, per layer or of one shared cache, or layer_slots, one number for each")
    given = np.asarray([slots] if layer_slots is None else layer_slots, np.int64)
    if given.min(initial=0) < 0:
        raise PlanError(f"a cache of {given.min()} slots cannot be: give 0 or more")
    if layer_slots is not None and len(given) != workload.num_layers:
        raise PlanError(f"layer_slots has {len(given)} entries; the workload has {workload.num_layers} MoE layers")
    caches = 1 if shared else workload.num_layers
    most = workload.num_experts * (workload.num_layers if shared else 1)
    return np.minimum(np.broadcast_to(given, caches), most)
