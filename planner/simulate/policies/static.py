"""What is on the device stays there: which experts, chosen before the first token."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moescope.errors import PlanError
from planner.simulate.policies.job import Job, Served

Placement = Literal["frequency", "uniform", "front_loading", "random"]


def static(job: Job, *, placement: Placement = "frequency") -> Served:
    """Experts that never move; misses run elsewhere or are streamed.

    Args:
        placement: ``frequency``: those that most tokens of ``train`` used: with a shared budget over all layers, as
            KTransformers does, which is the best fixed set for that text; otherwise in each layer as many as it has
            slots. The others are KTransformers' for those who have no counts, of a shared budget or of the sum of the
            layers': ``uniform``: the first experts of every layer, as many in each, one more in the first layers where
            it does not come out even; ``front_loading``: whole layers from the first on; ``random``: any (ours draws
            with numpy and ``seed``, so not the same ones as torch does with seed 42).

    Raises:
        PlanError: ``frequency`` without a training workload, or another placement.
    """
    held = placed(job, placement)
    work = job.workload
    missing, there = job.missing(), job.there()
    for layer, ids in enumerate(work.ids):
        hit = np.append(held[layer], True)[ids]  # -1, no expert, is the last entry
        missing[layer] = ids.shape[1] - np.count_nonzero(hit, axis=1)
        part = slice(job.stretch.start, job.stretch.stop)
        there[layer] = hit[part] & (ids[part] >= 0)
    return Served(missing, there, job.slots, job.capacity)


def placed(job: Job, placement: str) -> NDArray[np.bool_]:
    """(layers, E) what is on the device. Ties go to the lower layer, then to the lower id."""
    layers, experts = job.workload.num_layers, job.workload.num_experts
    held = np.zeros((layers, experts), np.bool_)
    if placement == "frequency":
        if job.train is None:
            raise PlanError("a static placement by frequency takes counts: give a training workload, of other requests")
        counts = job.train.counts()
        if job.shared:
            held.flat[np.argsort(-counts, axis=None, kind="stable")[: job.slots]] = True
            return held
        order = np.argsort(-counts, axis=1, kind="stable")
        np.put_along_axis(held, order, np.arange(experts) < job.capacity[:, None], axis=1)
        return held
    if placement == "uniform":
        each, more = divmod(job.slots, layers)
        quota = np.minimum(each + (np.arange(layers) < more), experts)
        return np.asarray(np.arange(experts) < quota[:, None])
    if placement == "front_loading":
        held.flat[: job.slots] = True
        return held
    if placement == "random":
        held.flat[np.random.default_rng(job.seed).permutation(held.size)[: job.slots]] = True
        return held
    raise PlanError(
        f"placement is {placement!r}; a static placement is by 'frequency', 'uniform', 'front_loading' or 'random'"
    )
