"""Replay a workload through one cache of one size: what was there, what had to be loaded, which steps waited."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import PlanError
from planner.simulate.outcome import Outcome
from planner.simulate.policies.job import Job, Served
from planner.simulate.policies.registry import policy as named
from planner.simulate.workload import Workload


def replay(
    workload: Workload,
    *,
    policy: str,
    slots: int | None = None,
    shared: bool = False,
    layer_slots: Sequence[int] | None = None,
    train: Workload | None = None,
    warm: bool = True,
    seed: int = 0,
    **parameters: Any,
) -> Outcome:
    """Serve every step of a workload, and count.

    All experts of a step are looked up together and stay until the step is over; then what is missing is loaded, each
    evicting the expert that the policy values least among those that the step does not need. A step that needs more
    than the cache holds loads all that is missing, and what does not fit is not kept.

    Args:
        workload: what is served.
        policy: a name of ``planner.simulate.policies.POLICIES``.
        slots: experts that the device holds: per layer, or in all if ``shared``. More than there are count as all.
        shared: one cache for all layers instead of one for each.
        layer_slots: (layers,) slots of each, instead of ``slots``.
        train: what fitted policies learn from; of other requests than the workload's.
        warm: the cache goes on from one request to the next, as in a server; False: every request finds it empty, and
            nothing is remembered, as in the published measurements (arXiv 2505.16056).
        seed: of what a policy draws.
        parameters: of the policy; its function says which.

    Raises:
        PlanError: no such policy or parameter, sizes that cannot be, or a training workload of another model.
    """
    job = _job(workload, policy, slots, shared, layer_slots, train, warm, seed, range(0))
    served = _serve(job, policy, parameters)
    return _counted(workload, policy, job, served)


def residency(
    workload: Workload,
    *,
    policy: str,
    passes: range,
    slots: int | None = None,
    shared: bool = False,
    layer_slots: Sequence[int] | None = None,
    train: Workload | None = None,
    warm: bool = True,
    seed: int = 0,
    **parameters: Any,
) -> NDArray[np.bool_]:
    """Which of the experts that each step of a stretch needs were on the device when it began.

    The whole workload is served, as by :func:`replay`, whose arguments are the same; ``passes`` are those looked at.

    Returns:
        (layers, passes, width), entries as in ``workload.ids[:, passes.start : passes.stop]``; False where there is no
        expert.

    Raises:
        PlanError: as :func:`replay`; a stretch that is not within the workload.
    """
    if passes.step != 1 or not 0 <= passes.start <= passes.stop <= workload.num_passes:
        raise PlanError(f"passes {passes} are no stretch of a workload of {workload.num_passes} passes")
    job = _job(workload, policy, slots, shared, layer_slots, train, warm, seed, passes)
    return _serve(job, policy, parameters).there


def _job(
    workload: Workload, policy: str, slots: int | None, shared: bool, layer_slots: Sequence[int] | None,
    train: Workload | None, warm: bool, seed: int, stretch: range,
) -> Job:  # fmt: skip
    """A checked job."""
    layers, experts = workload.num_layers, workload.num_experts
    if slots is None and layer_slots is None:
        raise PlanError(f"a replay of {policy!r} takes slots: experts per layer, or in all of a shared cache")
    if layer_slots is not None:
        if slots is not None or shared:
            raise PlanError("layer_slots stand instead of slots, and for caches per layer: leave the others out")
        if len(layer_slots) != layers:
            raise PlanError(f"layer_slots has {len(layer_slots)} entries; the workload has {layers} MoE layers")
    each = np.array([slots] * layers if layer_slots is None else list(layer_slots), np.int64)
    if each.min() < 0:
        raise PlanError(f"a cache of {each.min()} slots cannot be: give 0 or more")
    if train is not None and (train.num_layers, train.num_experts) != (layers, experts):
        raise PlanError(
            f"the training workload has {train.num_layers} layers of {train.num_experts} experts, the other {layers} of"
            f" {experts}: take both from one model"
        )
    capacity = np.minimum(each, experts * (layers if shared else 1))
    return Job(workload, capacity, shared, train, warm, seed, stretch)


def _serve(job: Job, policy: str, parameters: dict[str, Any]) -> Served:
    function = named(policy).function
    known = [name for name in inspect.signature(function).parameters if name != "job"]
    for name in parameters:
        if name not in known:
            what = f"it takes {', '.join(known)}" if known else "it takes none"
            raise PlanError(f"policy {policy!r} has no parameter {name!r}; {what}")
    return function(job, **parameters)


def _counted(workload: Workload, policy: str, job: Job, served: Served) -> Outcome:
    """Sums of what happened in each step, per request and layer."""
    needed = workload.needed
    waits = served.missing > (0 if served.skipped is None else served.skipped)
    room = served.capacity[0] if job.shared else served.capacity[:, None]
    return Outcome(
        policy=policy, slots=served.slots, uses=_per_request(workload, needed),
        hits=_per_request(workload, needed - served.missing), stalled=_per_request(workload, waits),
        steps=_per_request(workload, needed > 0), overflow=int(np.count_nonzero(needed > room)),
        missing=served.missing, narrow=served.narrow, skipped=served.skipped,
    )  # fmt: skip


def _per_request(workload: Workload, values: NDArray[Any]) -> NDArray[np.int64]:
    """(requests, layers) sums of (layers, passes)."""
    sums = np.zeros((workload.num_layers, workload.num_passes + 1), np.int64)
    np.cumsum(values, axis=1, dtype=np.int64, out=sums[:, 1:])
    return np.ascontiguousarray(np.diff(sums[:, workload.offsets], axis=1).T)
