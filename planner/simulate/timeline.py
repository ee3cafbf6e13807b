"""How long a trace takes when experts come over one channel: a clock beside every replay.

The channel is a DMA engine: one copy at a time, each begun copy runs to its end (a copy that has begun cannot be
stopped, HOBBIT, arXiv 2411.01433), tau = latency + bytes / bandwidth. A step, that is one MoE layer of one pass, begins
with what is dense in the layer; then the router answers, and copies of missing experts are asked for:

    arrive(e) = max(channel free, router's answer) + tau

Without ``overlap`` the experts of a step run together when the last has arrived (one grouped product); with it those
that are there run first and each other one when it arrives.

:func:`timeline` puts times to what a replay counted. :func:`prefetching` replays a set-LRU cache of its own, since what
a prefetch changes depends on when it arrives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from moescope.errors import PlanError
from planner.machine import Link
from planner.simulate.outcome import Outcome
from planner.simulate.workload import Workload
from profiler.metrics._arrays import FloatArray, ratio

Fallback = Literal["link", "faster", "cpu", "split"]


@dataclass(frozen=True)
class StepCosts:
    """What the steps of a workload cost with every expert on the device, and what its experts weigh.

    Attributes:
        dense: (layers, passes) seconds of all that comes before the layer's experts: attention, router, shared experts,
            decoder layers without experts.
        expert: (layers, passes) device seconds of one expert.
        cpu: (layers, passes) CPU seconds of one expert; None = the CPU runs none.
        tail: (passes,) seconds after the last layer.
        size: (layers, E) bytes of each routed expert.
        copied: (layers,) bytes of what :func:`timeline` copies, where that is known; None = see :func:`copy_size`.
    """

    dense: FloatArray
    expert: FloatArray
    tail: FloatArray
    size: FloatArray
    cpu: FloatArray | None = None
    copied: FloatArray | None = None

    def __post_init__(self) -> None:
        for name, values in (("dense", self.dense), ("expert", self.expert), ("tail", self.tail), ("size", self.size)):
            if not (np.isfinite(values).all() and (values >= 0).all()):
                raise PlanError(f"costs {name!r} must be finite numbers from 0 on")

    def resident(self, needed: NDArray[np.int64]) -> FloatArray:
        """(passes,) seconds with all experts on the device. needed: (layers, passes)."""
        seconds: FloatArray = (self.dense + needed * self.expert).sum(axis=0) + self.tail
        return seconds


@dataclass(frozen=True)
class Timeline:
    """The times of a workload on a machine.

    Attributes:
        seconds: (layers, passes) of every step, its dense part included.
        waiting: (layers, passes) of which the device has nothing to do: it waits for experts, or for the CPU.
        tail: (passes,) seconds after the last layer.
        resident: (passes,) seconds of each pass if all experts were on the device.
        pass_tokens: (passes,) tokens of each.
        missing: (layers, passes) experts that steps had to ask for.
        loads: copies that steps asked for.
        prefetches: copies that predictions asked for.
        late: experts that a prefetch was still copying when their router answered.
        dropped: prefetches taken back before they began, since nobody needed them or no slot was free.
        staged: loads that found no slot: they pass through a buffer and are not kept.
        cpu_experts: experts that the CPU ran.
        bytes: over the link.
        wasted_bytes: of prefetches whose expert was evicted, or left at the end, without a use.
        link_seconds: of copies.
        disk_seconds: of reads.
        hits: uses whose expert was on the device, or on its way, when the router answered.
        uses: experts that steps needed.
    """

    seconds: FloatArray
    waiting: FloatArray
    tail: FloatArray
    resident: FloatArray
    pass_tokens: NDArray[np.int64]
    missing: NDArray[np.int64]
    loads: int
    bytes: float
    link_seconds: float
    hits: int
    uses: int
    disk_seconds: float = 0.0
    prefetches: int = 0
    late: int = 0
    dropped: int = 0
    staged: int = 0
    cpu_experts: int = 0
    wasted_bytes: float = 0.0

    @property
    def pass_seconds(self) -> FloatArray:
        """(passes,) of each."""
        seconds: FloatArray = self.seconds.sum(axis=0) + self.tail
        return seconds

    @property
    def total(self) -> float:
        """Seconds of all passes."""
        return float(self.pass_seconds.sum())

    @property
    def ms_per_token(self) -> float:
        """Milliseconds of all passes by their tokens."""
        return 1e3 * self.total / max(int(self.pass_tokens.sum()), 1)

    @property
    def resident_ms(self) -> float:
        """The same if all experts were on the device."""
        return 1e3 * float(self.resident.sum()) / max(int(self.pass_tokens.sum()), 1)

    @property
    def p95_ms(self) -> float:
        """95th percentile of the milliseconds of a pass."""
        return 1e3 * float(np.percentile(self.pass_seconds, 95))

    @property
    def stalled_share(self) -> float:
        """Part of the steps in which the device waits, 0..1."""
        return float(np.count_nonzero(self.waiting > 0) / max(self.waiting.size, 1))

    @property
    def link_share(self) -> float:
        """Part of the time in which the link is busy, 0..1."""
        return float(ratio(self.link_seconds, self.total))

    @property
    def hit_rate(self) -> float:
        """Part of the uses that needed no copy of their own, 0..1."""
        return float(ratio(self.hits, self.uses))


def timeline(
    work: Workload,
    outcome: Outcome,
    costs: StepCosts,
    *,
    link: Link,
    disk: Link | None = None,
    from_disk: NDArray[np.integer[Any]] | None = None,
    fallback: Fallback = "link",
    overlap: bool = True,
    narrow_part: float = 0.25,
) -> Timeline:
    """Times of a replay whose misses are answered on demand.

    Copies of a step come in the order: full width from memory, narrow from memory, full from disk, narrow from disk. An
    expert on disk is read first, then copied; the disk reads while the link copies others, each one at a time. A copy
    has the bytes of :func:`copy_size`.

    Args:
        work: what was replayed.
        outcome: what the replay counted; experts skipped cost nothing, narrow ones ``narrow_part`` of the bytes and the
            full time to run.
        costs: of the steps.
        link: host memory to device.
        disk: disk to host memory.
        from_disk: (layers, passes) missing experts that are not in host memory either; None = none.
        fallback: what happens to a missing expert. ``link``: copied. ``faster``: on the CPU if that takes less time
            than copying and running it (Fiddler, arXiv 2402.07033). ``cpu``: always on the CPU, beside the device
            (KTransformers). ``split``: as many on either as end the step first. The CPU runs one after another; an
            expert that it runs is not admitted, so that the replay should bypass or pin a static set.
        overlap: experts that are there run while others come.
        narrow_part: bytes of a narrow version by those of a full one.

    Raises:
        PlanError: the replay is of another workload, the CPU is asked for and has no costs, or experts are on a disk
            that has no link.
    """
    from planner.simulate import _timeline as kernel

    shape = (work.num_layers, work.num_passes)
    if outcome.missing.shape != shape:
        raise PlanError(f"the replay has {outcome.missing.shape} layers and passes, the workload {shape}: use the same")
    if fallback not in get_args(Fallback):
        raise PlanError(f"no fallback {fallback!r}; there are {', '.join(get_args(Fallback))}")
    if fallback != "link" and costs.cpu is None:
        raise PlanError(f"fallback {fallback!r} needs the CPU's seconds per expert: give costs with cpu")
    if from_disk is not None and disk is None:
        raise PlanError("experts are on disk, and no disk is given: give its link")
    mean = copy_size(work, costs)
    size = np.stack([mean, mean * narrow_part], axis=1)
    read = np.zeros_like(size) if disk is None else disk.latency + size / disk.bandwidth
    seconds, waiting, totals = np.zeros(shape), np.zeros(shape), np.zeros(len(kernel.Total))
    kernel.on_demand(
        work.needed, _whole(outcome.missing, shape), _whole(outcome.narrow, shape), _whole(outcome.skipped, shape),
        _whole(from_disk, shape), _full(costs.dense, shape), _full(costs.expert, shape),
        _full(0.0 if costs.cpu is None else costs.cpu, shape), size, link.latency + size / link.bandwidth, read,
        int(kernel.Fallback[fallback.upper()]), overlap, seconds, waiting, totals,
    )  # fmt: skip
    return _summed(work, costs, seconds, waiting, outcome.missing.astype(np.int64), totals)


def prefetching(
    work: Workload,
    costs: StepCosts,
    *,
    predicted: NDArray[np.integer[Any]] | None,
    slots: int | NDArray[np.integer[Any]],
    link: Link,
    ahead: int = 1,
    shared: bool = False,
    overlap: bool = True,
) -> Timeline:
    """A set-LRU cache with prefetching, replayed on the clock.

    When the router of step s has answered, what it needs and lacks is copied next; then prefetches for step s + ahead
    are queued behind those already queued. Loads that a step asks for overtake queued prefetches, not the one that is
    running. Queued prefetches that have not begun when the router of their step answers are loaded at once if needed,
    taken back otherwise. A predicted expert, copied or found there, is not evicted before its step unless a load finds
    no other slot; a prefetch that finds no slot is dropped. A copy counts as the use that LRU goes by. Equal to
    ``lru`` of the replays where nothing is predicted.

    Args:
        work: what is replayed; the cache starts empty and lives on between requests.
        costs: of the steps.
        predicted: (layers, passes, width) experts that are foretold for each step, the likeliest first, -1 = none; None
            = no prefetching.
        slots: experts per layer, or (layers,) of each; experts in all if ``shared``.
        link: host memory to device.
        ahead: steps between the router that answers and the step that is predicted, 1..layers.
        shared: one cache for all layers.
        overlap: experts that are there run while others come.

    Raises:
        PlanError: slots below 1, predictions for another workload, or a distance that is none.
    """
    from planner.simulate import _timeline as kernel

    shape = (work.num_layers, work.num_passes)
    if predicted is None:
        predicted = np.full((*shape, 1), -1, np.int16)
    if predicted.ndim != 3 or predicted.shape[:2] != shape:
        raise PlanError(f"predictions are {predicted.shape}; the workload has {shape} layers and passes")
    if predicted.size and int(predicted.max()) >= work.num_experts:
        raise PlanError(f"expert {int(predicted.max())} is predicted; the layers have {work.num_experts}")
    if not 1 <= ahead <= work.num_layers:
        raise PlanError(f"ahead {ahead} must lie between 1 and the {work.num_layers} layers")
    room = np.array([slots], np.int64) if shared else np.broadcast_to(np.asarray(slots, np.int64), shape[:1]).copy()
    if (room < 1).any():
        raise PlanError(f"a cache of {int(room.min())} slots holds nothing: give at least 1")
    size = _full(costs.size, (shape[0], work.num_experts))
    seconds, waiting, missing = np.zeros(shape), np.zeros(shape), np.zeros(shape, np.int64)
    totals = np.zeros(len(kernel.Total))
    kernel.prefetched(
        np.ascontiguousarray(work.ids), np.ascontiguousarray(predicted, np.int16), room, ahead,
        _full(costs.dense, shape), _full(costs.expert, shape), _full(costs.tail, shape[1:]), size,
        link.latency + size / link.bandwidth, overlap, seconds, waiting, missing, totals,
    )  # fmt: skip
    return _summed(work, costs, seconds, waiting, missing, totals)


def bound_seconds(
    work: Workload, costs: StepCosts, *, least: NDArray[np.integer[Any]], link: Link, fallback: Fallback = "link"
) -> float:
    """Seconds that no policy and no prefetching can beat with as many slots.

    All computing, or all copies that even the best choice of victims needs, whichever takes longer. Where the CPU may
    run experts, m misses share themselves between both at best: m / (1 / tau + 1 / cpu), beside all that is dense. Of a
    layer's experts, the smallest that is used counts for each copy. Copies in narrow width are not foreseen.

    Args:
        work: the workload.
        costs: of its steps.
        least: (layers,) loads that no policy can avoid: uses less hits of ``min_bypass`` where experts may pass through
            a buffer, of ``min_set`` where all of a step must be in the cache together.
        link: host memory to device.
        fallback: as in :func:`timeline`.
    """
    size = np.where(work.counts() > 0, _full(costs.size, (work.num_layers, work.num_experts)), np.inf).min(axis=1)
    copy = link.latency + np.where(np.isfinite(size), size, 0.0) / link.bandwidth
    if fallback == "link":
        return max(float(costs.resident(work.needed).sum()), float((least * copy).sum()))
    if costs.cpu is None:
        raise PlanError(f"fallback {fallback!r} needs the CPU's seconds per expert: give costs with cpu")
    fastest = _full(costs.cpu, work.needed.shape).min(axis=1)
    with np.errstate(divide="ignore"):
        both = fastest if fallback == "cpu" else 1 / (1 / copy + 1 / fastest)
    dense = float(_full(costs.dense, work.needed.shape).sum() + costs.tail.sum())
    return max(dense, float((least * both).sum()))


def copy_size(work: Workload, costs: StepCosts) -> FloatArray:
    """(layers,) bytes of one copy: as the costs say, else the mean of the layer's experts, weighted by uses."""
    if costs.copied is not None:
        return costs.copied
    size = _full(costs.size, (work.num_layers, work.num_experts))
    uses = work.counts()
    mean: FloatArray = (size * uses).sum(axis=1) / np.maximum(uses.sum(axis=1), 1)
    return mean


def _full(values: Any, shape: tuple[int, ...]) -> FloatArray:
    return np.ascontiguousarray(np.broadcast_to(np.asarray(values, np.float64), shape))


def _whole(values: NDArray[Any] | None, shape: tuple[int, ...]) -> NDArray[np.int64]:
    return np.zeros(shape, np.int64) if values is None else np.ascontiguousarray(values, np.int64)


def _summed(
    work: Workload, costs: StepCosts, seconds: FloatArray, waiting: FloatArray, missing: NDArray[np.int64],
    totals: FloatArray,
) -> Timeline:  # fmt: skip
    from planner.simulate._timeline import Total

    needed = work.needed
    return Timeline(
        seconds=seconds, waiting=waiting, tail=_full(costs.tail, seconds.shape[1:]), resident=costs.resident(needed),
        pass_tokens=work.pass_tokens, missing=missing, loads=int(totals[Total.LOADS]),
        prefetches=int(totals[Total.PREFETCHES]), late=int(totals[Total.LATE]), dropped=int(totals[Total.DROPPED]),
        staged=int(totals[Total.STAGED]), cpu_experts=int(totals[Total.CPU_EXPERTS]),
        bytes=float(totals[Total.BYTES]), wasted_bytes=float(totals[Total.WASTED_BYTES]),
        link_seconds=float(totals[Total.LINK_SECONDS]), disk_seconds=float(totals[Total.DISK_SECONDS]),
        hits=int(totals[Total.HITS]), uses=int(needed.sum()),
    )  # fmt: skip
