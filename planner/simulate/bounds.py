"""What no policy can beat, at every cache size: three offline bounds, for three ways in which engines work.

``min_set``: all experts of a step are resident together, as fused kernels need. On a step evict, of what it does not
    need, what is needed again last.
``min_flat``: one expert at a time, which may replace another of the same step, as engines with one buffer do: Belady's
    rule on single uses, in the order in which the step lists them.
``min_bypass``: a miss need not be admitted, where the processor computes missing experts or they are streamed. Keep,
    of what was there and what the step needed, what is needed again first.

Misses: min_bypass <= min_flat <= min_set <= those of any policy that holds whole steps. All three are stack algorithms.
At sizes below the largest step ``min_set`` is NaN, the other two are not; no slots at all are legal for ``min_bypass``
and hit nothing. Flat Belady is often quoted as *the* bound; it is one for engines that go one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from moescope.errors import PlanError
from planner.simulate.curves import Depths, Ids32, curve_of_depths
from planner.simulate.outcome import Curve
from planner.simulate.workload import Workload
from profiler.metrics._arrays import IntArray

Bound = Literal["min_set", "min_flat", "min_bypass"]
BOUNDS: tuple[Bound, ...] = get_args(Bound)


def bounds(
    workload: Workload,
    *,
    names: Sequence[Bound] = BOUNDS,
    shared: bool = False,
    warm: bool = True,
    overflow: bool = False,
) -> dict[str, Curve]:
    """The offline bounds at every cache size, per request and layer.

    Args:
        workload: passes in order.
        names: which of them.
        shared: one cache for all layers, served layer after layer; sizes are then 1..L * E.
        warm: the cache goes on from request to request; False: it starts empty at each.
        overflow: ``min_set`` also at sizes below the largest step: a larger step leaves those with the nearest next
            use, and the others pass through. False: NaN there.

    Raises:
        PlanError: an unknown bound, or more than 2^31 requests.
    """
    for name in names:
        if name not in BOUNDS:
            raise PlanError(f"bound {name!r} is not known: use {', '.join(BOUNDS)}")
    return {
        name: curve_of_depths(
            workload, _KERNELS[name], name=name, shared=shared, warm=warm, whole=name == "min_set" and not overflow,
            flat=name == "min_flat",
        )
        for name in names
    }  # fmt: skip


def _min_set(requests: Ids32, starts: IntArray, objects: int, found: Ids32) -> None:
    from planner.simulate._curves import optimal_depths

    optimal_depths(requests, starts, objects, True, found)


def _min_bypass(requests: Ids32, starts: IntArray, objects: int, found: Ids32) -> None:
    from planner.simulate._curves import optimal_depths

    optimal_depths(requests, starts, objects, False, found)


def _min_flat(requests: Ids32, starts: IntArray, objects: int, found: Ids32) -> None:
    from profiler.metrics._stack import Policy, request_depths

    request_depths(requests, starts, objects, int(Policy.BELADY), 1, False, found)


_KERNELS: dict[Bound, Depths] = {"min_set": _min_set, "min_flat": _min_flat, "min_bypass": _min_bypass}
