"""The multiple-choice knapsack: one width for every unit, the least cost in all, within a budget.

Units are experts, layers, or projections of layers; widths are columns, the narrowest first. Costs are what a width
costs a unit, infinity where it may not have it; sizes are bits, whole numbers. Two solvers find the same optimum, one
of our own and HiGHS; :func:`hull` has the whole curve of sizes and costs in one pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moescope.errors import PlanError
from planner.quantize.programme import Floats, Whole, cheapest, problem_of
from planner.quantize.states import search


@dataclass(frozen=True)
class Choice:
    """A width for every unit.

    Attributes:
        widths: (units,) column of each.
        cost: the sum of their costs.
        size: the sum of their sizes.
        proved: no choice that fits is cheaper.
    """

    widths: Whole
    cost: float
    size: int
    proved: bool = False

    @classmethod
    def of(cls, widths: Whole, costs: Floats, sizes: Whole, *, proved: bool = False) -> Choice:
        """The choice of these columns."""
        at = np.arange(len(widths)), widths
        return cls(widths, float(costs[at].sum()), int(sizes[at].sum()), proved)


def solve(
    *,
    costs: Floats,
    sizes: Whole,
    capacity: int | Whole,
    groups: Whole | None = None,
    minimum: Whole | None = None,
    equal: bool = False,
) -> Choice:
    """The cheapest choice that fits, exactly.

    Dynamic programming over the sizes that units can reach together. A state (size, cost) is dropped where another is
    neither larger nor dearer, and where the Lagrangian bound shows that nothing cheaper than the best known choice
    follows from it; widths that the bound rules out are never tried. Both are exact, for any sizes: they need no common
    divisor, and the sum of costs is the least there is, within the rounding of sums (1e-12). Only where more than
    200,000 states would have to be kept at once (sizes without a common divisor, and costs that fall almost exactly in
    proportion to them), states are thinned: the choice still fits, costs at most what the greedy pass finds, and is not
    ``proved``.

    Of equal costs the smaller size is taken, and of equal sizes the narrower width for the units that come last.

    Args:
        costs: (units, widths); infinity = not allowed.
        sizes: (units, widths), 0 or more.
        capacity: of all units, or (groups,) of each group.
        groups: (units,) group of each unit, from 0; None = all in one.
        minimum: (widths,) how many units of every group have to have each width; None = none.
        equal: the size has to be the capacity, not at most that.

    Raises:
        PlanError: no choice fits, with the sizes that would.
    """
    problem = problem_of(costs, sizes, capacity, groups, minimum)
    widths, proved = np.zeros(len(costs), dtype=np.int64), True
    for part, room in problem.parts():
        widths[part.units], sure = search(part, room, equal=equal)
        proved = proved and sure
    return Choice.of(widths, problem.costs, problem.sizes, proved=proved)


def solve_milp(
    *,
    costs: Floats,
    sizes: Whole,
    capacity: int | Whole,
    groups: Whole | None = None,
    minimum: Whole | None = None,
    equal: bool = False,
) -> Choice:
    """The same by HiGHS, as a linear programme in 0 and 1: the check on :func:`solve`.

    Raises:
        PlanError: as :func:`solve`.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    problem = problem_of(costs, sizes, capacity, groups, minimum)
    units, columns = np.nonzero(np.isfinite(problem.costs))
    variables = np.arange(len(units))
    one = csr_matrix((np.ones(len(units)), (units, variables)), shape=(len(costs), len(units)))
    per_group = np.ndim(capacity) > 0
    rows = problem.groups[units] if per_group else np.zeros(len(units), dtype=np.int64)
    room = np.atleast_1d(np.asarray(capacity, dtype=np.float64))
    unit = float(np.gcd.reduce(problem.sizes[units, columns])) or 1.0  # HiGHS holds rows within 1e-6
    taken = csr_matrix((problem.sizes[units, columns] / unit, (rows, variables)), shape=(len(room), len(units)))
    limits = [
        LinearConstraint(one, 1, 1),
        LinearConstraint(taken, room / unit if equal else -np.inf, np.floor(room / unit) if not equal else room / unit),
    ]
    for column in np.flatnonzero(problem.minimum):
        mine = columns == column
        counted = csr_matrix(
            (np.ones(int(mine.sum())), (problem.groups[units[mine]], variables[mine])),
            shape=(int(problem.groups.max()) + 1, len(units)),
        )
        limits.append(LinearConstraint(counted, float(problem.minimum[column]), np.inf))
    value = problem.costs[units, columns]
    scale = float(np.abs(value).max()) or 1.0
    found = milp(value / scale, constraints=limits, bounds=Bounds(0, 1), integrality=np.ones(len(units)),
                 options={"mip_rel_gap": 0.0})  # fmt: skip
    if found.x is None:
        raise PlanError(f"no choice of widths fits into {room.sum():,.0f}: {found.message}")
    taken_up = found.x > 0.5
    widths = np.zeros(len(costs), dtype=np.int64)
    widths[units[taken_up]] = columns[taken_up]
    return Choice.of(widths, problem.costs, problem.sizes, proved=True)


def least_size(*, costs: Floats, sizes: Whole, groups: Whole | None = None, minimum: Whole | None = None) -> Whole:
    """(groups,) the smallest size that each group can have; without groups one.

    Raises:
        PlanError: a group has too few units for the widths that it has to have.
    """
    problem = problem_of(costs, sizes, 0, groups, minimum)
    allowed = np.where(np.isfinite(problem.costs), problem.sizes.astype(np.float64), np.inf)
    choice, _ = cheapest(allowed, problem)
    mine = problem.sizes[np.arange(len(choice)), choice]
    return np.bincount(problem.groups, weights=mine).round().astype(np.int64)


@dataclass(frozen=True)
class Curve:
    """The sizes and costs that a greedy pass goes through, the smallest first: what a budget buys.

    The costs fall along the lower convex hull of what all units can do together: no choice of any size lies below it.
    Between two of its points the smaller is taken, which costs at most one unit's step more than the optimum.

    Attributes:
        sizes: (points,) ascending.
        costs: (points,) descending, convex over sizes.
        start: (units,) columns at the first point.
        units: (points - 1,) the unit that is widened at each further point.
        widths: (points - 1,) the column that it then has.
    """

    sizes: Whole
    costs: Floats
    start: Whole
    units: Whole
    widths: Whole

    def at(self, capacity: int) -> Choice:
        """The choice of the last point that fits.

        Raises:
            PlanError: none does.
        """
        count = int(np.searchsorted(self.sizes, capacity, side="right")) - 1
        if count < 0:
            raise PlanError(f"no choice of widths fits into {capacity:,}: the narrowest take {int(self.sizes[0]):,}")
        widths = self.start.copy()
        widths[self.units[:count]] = self.widths[:count]  # of several steps of a unit the last stays
        return Choice(widths, float(self.costs[count]), int(self.sizes[count]))


def hull(*, costs: Floats, sizes: Whole) -> Curve:
    """The whole curve in one pass: of all steps on the units' convex hulls, those that save most per bit come first.

    Of equal savings the earlier unit comes first.

    Args:
        costs: (units, widths); infinity = not allowed.
        sizes: (units, widths).

    Raises:
        PlanError: shapes that do not fit, or a unit that may have no width.
    """
    problem = problem_of(costs, sizes, 0, None, None)
    costs, sizes = problem.costs, problem.sizes
    every = np.arange(len(costs))
    allowed = np.where(np.isfinite(costs), sizes, np.iinfo(np.int64).max)
    smallest = allowed.min(1)
    now = np.where(allowed == smallest[:, None], costs, np.inf).argmin(1)
    start, steps, before = now.copy(), [], np.full(len(costs), np.inf)
    for _ in range(costs.shape[1] - 1):
        more = sizes - sizes[every, now][:, None]
        saved = costs[every, now][:, None] - costs
        gain = np.where((more > 0) & (saved > 0), saved / np.maximum(more, 1), -np.inf)
        best = gain.argmax(1)
        rises = np.flatnonzero(gain[every, best] > 0)
        if not len(rises):
            break
        at = rises, best[rises]
        before[rises] = np.minimum(gain[at], before[rises])  # equal but for rounding: steps stay in order
        steps.append((before[rises], *at, more[at], saved[at]))
        now[rises] = best[rises]
    if not steps:
        first = Choice.of(start, costs, sizes)
        empty = np.zeros(0, dtype=np.int64)
        return Curve(np.array([first.size]), np.array([first.cost]), start, empty, empty)
    gains, units, widths, more, saved = (np.concatenate(one) for one in zip(*steps, strict=True))
    order = np.lexsort((units, -gains))  # stable: of one unit, earlier steps stay first
    first = Choice.of(start, costs, sizes)
    return Curve(
        sizes=first.size + np.concatenate([[0], np.cumsum(more[order])]),
        costs=first.cost - np.concatenate([[0.0], np.cumsum(saved[order])]),
        start=start, units=units[order], widths=widths[order],
    )  # fmt: skip
