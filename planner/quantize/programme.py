"""The problem that the solvers of :mod:`planner.quantize.knapsack` share, checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moescope.errors import PlanError

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]


@dataclass(frozen=True)
class Problem:
    """What is asked, checked.

    Attributes:
        costs: (units, widths).
        sizes: (units, widths).
        groups: (units,) ascending where ``parts`` made it.
        minimum: (widths,) of every group.
        units: (units,) their places in what was asked.
        capacity: of all, or per group.
    """

    costs: Floats
    sizes: Whole
    groups: Whole
    minimum: Whole
    units: Whole
    capacity: int | Whole

    def parts(self) -> Iterator[tuple[Problem, int]]:
        """What can be solved by itself, and its capacity: all together, or group by group."""
        if np.ndim(self.capacity) == 0:
            yield self._of(np.argsort(self.groups, kind="stable")), int(self.capacity)
            return
        for group, room in enumerate(np.asarray(self.capacity)):
            yield self._of(np.flatnonzero(self.groups == group)), int(room)

    def _of(self, order: Whole) -> Problem:
        _, groups = np.unique(self.groups[order], return_inverse=True)
        return Problem(self.costs[order], self.sizes[order], groups, self.minimum, order, 0)

    def spans(self) -> Iterator[slice]:
        """The units of each group, where they are sorted by it."""
        edges = np.flatnonzero(np.diff(self.groups)) + 1
        for first, last in zip([0, *edges.tolist()], [*edges.tolist(), len(self.groups)], strict=True):
            yield slice(first, last)


def problem_of(
    costs: Floats, sizes: Whole, capacity: int | Whole, groups: Whole | None, minimum: Whole | None
) -> Problem:
    """The checked problem.

    Raises:
        PlanError: shapes that do not fit, costs that are no numbers, or a unit that may have no width.
    """
    costs, sizes = np.asarray(costs, dtype=np.float64), np.asarray(sizes)
    if costs.ndim != 2 or costs.shape != sizes.shape or not len(costs):
        raise PlanError(f"costs {costs.shape} and sizes {sizes.shape} must be (units, widths), alike and not empty")
    if sizes.dtype.kind not in "iu" or sizes.min() < 0:
        raise PlanError("sizes must be whole numbers of bits, 0 or more")
    if np.isnan(costs).any() or np.isneginf(costs).any():
        raise PlanError("costs must be numbers, or infinity where a width is not allowed")
    none = np.flatnonzero(~np.isfinite(costs).any(1))
    if len(none):
        raise PlanError(f"unit {none[0]} may have no width at all")
    place = np.zeros(len(costs), dtype=np.int64) if groups is None else np.asarray(groups, dtype=np.int64)
    least = np.zeros(costs.shape[1], dtype=np.int64) if minimum is None else np.asarray(minimum, dtype=np.int64)
    if place.shape != (len(costs),) or least.shape != (costs.shape[1],):
        raise PlanError(f"groups are (units,) and a minimum is (widths,): got {place.shape} and {least.shape}")
    return Problem(costs, sizes.astype(np.int64), place, least, np.arange(len(costs)), capacity)


def cheapest(values: Floats, problem: Problem) -> tuple[Whole, Floats]:
    """(units,) columns with the least sum of values that have the minimum of every width, and (groups,) what that adds.

    Every width that has to be there is a slot; giving slots to units is an assignment problem.
    """
    choice, best = values.argmin(1), values.min(1)
    added = np.zeros(int(problem.groups.max()) + 1)
    slots = np.repeat(np.arange(values.shape[1]), problem.minimum)
    if not len(slots):
        return choice, added
    from scipy.optimize import linear_sum_assignment

    for group in range(len(added)):
        mine = np.flatnonzero(problem.groups == group)
        more = values[mine][:, slots] - best[mine][:, None]
        try:
            rows, taken = linear_sum_assignment(more)
        except ValueError:
            rows = taken = np.zeros(0, dtype=np.int64)
        if len(rows) < len(slots):
            raise PlanError(f"group {group} has {len(mine)} units, too few for the {len(slots)} widths it has to have")
        choice[mine[rows]] = slots[taken]
        added[group] = more[rows, taken].sum()
    return choice, added
