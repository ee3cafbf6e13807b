"""How good predictions are: of what is needed, of what is foreseen, and of what a cache does not hold anyway."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.simulate.outcome import Counts
from planner.simulate.prefetch.predicted import Predicted
from planner.simulate.prefetch.replay import by_request, check_same, run_lru, sizes_of
from planner.simulate.workload import Workload
from profiler.metrics._arrays import FloatArray, ratio


@dataclass(frozen=True)
class Score:
    """Counts (requests, layers), so that they add up; layers for which nothing was foreseen count nowhere.

    Attributes:
        method: what predicted.
        needed: experts that steps needed.
        foreseen: experts predicted.
        right: both.
        steps: that needed any expert.
        exact: of which all were predicted.
        chance: experts that would be right if as many were drawn uniformly out of E.
        missing: needed experts that an LRU cache without prefetching lacked; without a cache, all.
        caught: of which were predicted.
        fetched: predicted experts that it lacked: what would cross the link.
        tokens: of the workload.
    """

    method: str
    needed: Counts
    foreseen: Counts
    right: Counts
    steps: Counts
    exact: Counts
    chance: FloatArray
    missing: Counts
    caught: Counts
    fetched: Counts
    tokens: int

    @property
    def recall(self) -> float:
        """Part of the needed experts that were predicted, 0..1; NaN without any."""
        return float(ratio(self.right.sum(), self.needed.sum()))

    @property
    def precision(self) -> float:
        """Part of the predicted experts that were needed, 0..1; NaN without any."""
        return float(ratio(self.right.sum(), self.foreseen.sum()))

    @property
    def exact_share(self) -> float:
        """Part of the steps that were predicted whole, 0..1."""
        return float(ratio(self.exact.sum(), self.steps.sum()))

    @property
    def chance_recall(self) -> float:
        """Recall of as many experts drawn uniformly."""
        return float(ratio(self.chance.sum(), self.needed.sum()))

    @property
    def recall_of_missing(self) -> float:
        """Part of what the cache lacked that was predicted, 0..1: all that prefetching can save."""
        return float(ratio(self.caught.sum(), self.missing.sum()))

    @property
    def wasted(self) -> int:
        """Experts that would be fetched and are not needed by the step that they are fetched for."""
        return int(self.fetched.sum() - self.caught.sum())

    def wasted_bytes(self, expert_bytes: float) -> float:
        """Of wasted fetches, per token."""
        return float(ratio(self.wasted * expert_bytes, self.tokens))

    def per_layer(self) -> FloatArray:
        """(layers,) recall of each; NaN where nothing was foreseen."""
        return ratio(self.right.sum(axis=0), self.needed.sum(axis=0))

    def per_request(self) -> FloatArray:
        """(requests,) recall of each."""
        return ratio(self.right.sum(axis=1), self.needed.sum(axis=1))


def score(predicted: Predicted, workload: Workload, *, slots: int | None = None, shared: bool = False) -> Score:
    """Hold predictions against what was needed, and against what an LRU cache lacked.

    Args:
        predicted: for the steps of ``workload``.
        workload: what was needed.
        slots: of the cache, per layer or, with ``shared``, in all; it runs without prefetching. None = no cache: every
            expert has to come.
        shared: one cache for all layers.

    Raises:
        PlanError: predictions for another workload, or a size that cannot be.
    """
    check_same(workload, predicted)
    hit = _found(workload.ids, predicted.ids)
    absent, unfetched = workload.ids >= 0, predicted.ids >= 0
    if slots is not None:
        replayed = run_lru(workload, predicted, sizes=sizes_of(workload, slots=slots, shared=shared), limit=0)
        absent, unfetched = replayed.absent, replayed.unfetched
    known = predicted.layers[:, None]
    needed, foreseen = workload.needed * known, (predicted.ids >= 0).sum(axis=2)

    def total(values: NDArray[np.generic]) -> Counts:
        return by_request(workload, values * known)

    return Score(
        method=predicted.method, needed=total(needed), foreseen=total(foreseen), right=total(hit.sum(axis=2)),
        steps=total(needed > 0), exact=total((needed > 0) & (hit.sum(axis=2) == needed)),
        chance=total(needed * foreseen) / workload.num_experts, missing=total(absent.sum(axis=2)),
        caught=total((absent & hit).sum(axis=2)), fetched=total(unfetched.sum(axis=2)),
        tokens=int(workload.pass_tokens.sum()),
    )  # fmt: skip


def _found(ids: NDArray[np.int16], others: NDArray[np.int16]) -> NDArray[np.bool_]:
    """Which of ids (layers, passes, width) stand among others (layers, passes, other width) of the same step."""
    result = np.zeros(ids.shape, np.bool_)
    for rank in range(others.shape[2]):
        result |= ids == others[:, :, rank : rank + 1]
    return result & (ids >= 0)
