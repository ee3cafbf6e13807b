"""The exact search behind :func:`planner.quantize.knapsack.solve`: states that units reach together, bounded."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moescope.errors import PlanError
from planner.quantize.programme import Floats, Problem, Whole, cheapest

_ROUNDING = 1e-11  # of the bound: what sums of floats may be off by
_STATES, _CLASSES = 200_000, 20_000
_HALVINGS = 80
_PARTS = (4.0**-6, 4.0**-5, 4.0**-4, 4.0**-3, 4.0**-2, 4.0**-1, 1.0)


def search(problem: Problem, capacity: int, *, equal: bool) -> tuple[Whole, bool]:
    """(units,) columns of the cheapest choice, and whether it is proved, see :func:`planner.quantize.knapsack.solve`.

    Args:
        problem: its units sorted by group.
        capacity: of all its units.
        equal: the size has to be the capacity.

    Raises:
        PlanError: nothing fits.
    """
    allowed = np.isfinite(problem.costs)
    smallest = np.where(allowed, problem.sizes, np.iinfo(np.int64).max).min(1)
    extra = np.where(allowed, problem.sizes - smallest[:, None], 0)
    unit = int(np.gcd.reduce(extra, axis=None)) or 1
    room, left = divmod(capacity - int(smallest.sum()), unit)
    bound = _bound(problem, extra // unit, room, equal)
    if bound is None or (equal and left):
        raise _refusal(problem, capacity, equal)
    # All choices that cost up to a limit are compared: if there is one, the cheapest of them is the cheapest of all.
    for part in _PARTS:
        states = _States(problem, extra // unit, room, equal, bound, bound.lower + part * bound.gap)
        found = states.run()
        if found is not None:
            return found, not states.thinned
    if bound.known is not None:
        return bound.known, False
    raise _refusal(problem, capacity, equal)


@dataclass(frozen=True)
class _Bound:
    """What the Lagrangian relaxation says: sizes have a price, and every unit takes what is cheapest with it.

    Attributes:
        price: of one unit of size.
        values: (units, widths) cost + price x size.
        added: (groups,) what the minimum of every width adds.
        lower: no choice costs less.
        gap: the cheapest choice costs at most ``lower`` and this.
        known: (units,) columns of a choice that does; None where none was found.
    """

    price: float
    values: Floats
    added: Floats
    lower: float
    gap: float
    known: Whole | None = None


def _bound(problem: Problem, sizes: Whole, room: int, equal: bool) -> _Bound | None:
    """The best of the bounds that halving the price finds; None where not even the smallest choice fits."""
    every = np.arange(len(sizes))
    best: _Bound | None = None
    upper, fitting = np.inf, None

    def tried(price: float) -> int:
        nonlocal best, upper, fitting
        values = problem.costs + price * sizes
        choice, added = cheapest(values, problem)
        size, cost = int(sizes[every, choice].sum()), float(problem.costs[every, choice].sum())
        if (size == room or (size < room and not equal)) and cost < upper:
            upper, fitting = cost, choice
        lower = float(values[every, choice].sum()) - price * room
        if best is None or lower > best.lower:
            best = _Bound(price, values, added, lower, 0.0)
        return size

    smallest, _ = cheapest(np.where(np.isfinite(problem.costs), sizes.astype(np.float64), np.inf), problem)
    if int(sizes[every, smallest].sum()) > room:
        return None
    if tried(0.0) > room:
        finite = problem.costs[np.isfinite(problem.costs)]
        low, high = 0.0, float(finite.max() - finite.min()) or 1.0
        while tried(high) > room:
            low, high = high, high * 4
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if not low < middle < high:
                break
            low, high = (low, middle) if tried(middle) <= room else (middle, high)
    assert best is not None
    if fitting is not None and not equal and not problem.minimum.any():
        upper, fitting = _filled(problem.costs, sizes, fitting, room)
    if fitting is None:
        upper = float(np.where(np.isfinite(problem.costs), problem.costs, -np.inf).max(1).sum())
    return replace(best, gap=max(upper - best.lower, 0.0), known=fitting)


def _filled(costs: Floats, sizes: Whole, choice: Whole, room: int) -> tuple[float, Whole]:
    """Cost and columns after single units, one after the other, took what saves most of what still fits."""
    choice, every = choice.copy(), np.arange(len(choice))
    while True:
        left = room - int(sizes[every, choice].sum())
        saved = costs[every, choice][:, None] - costs
        saved[sizes - sizes[every, choice][:, None] > left] = 0
        unit, column = np.unravel_index(int(saved.argmax()), saved.shape)
        if saved[unit, column] <= 0:
            return float(costs[every, choice].sum()), choice
        choice[unit] = column


class _States:
    """The states (size, cost, tag) that the units so far can reach, and from which state and width each came.

    Where there are more than 200,000 states at once, the cheapest of each of 20,000 classes of sizes are kept.

    The tag counts, in mixed radix, how many units of the group have each width that has to be there, up to its minimum.
    """

    def __init__(self, problem: Problem, sizes: Whole, room: int, equal: bool, bound: _Bound, most: float) -> None:
        self._problem, self._sizes, self._room, self._equal, self._bound = problem, sizes, room, equal, bound
        self.thinned = False
        least = bound.values.min(1)
        slack = _ROUNDING * (abs(most) + abs(bound.lower) + bound.price * room)
        self._most, self._limit = most + slack, most + bound.price * room + slack
        gap = most - bound.lower + slack
        # A width stays if the bound with this unit forced to it, the group's other demands left out, is low enough.
        self._open = bound.values - least[:, None] <= (gap + bound.added[problem.groups])[:, None]
        self._open &= np.isfinite(problem.costs)
        self._least = least
        self._radix = np.cumprod(np.concatenate([[1], problem.minimum + 1]))[:-1]
        self._full = int((problem.minimum * self._radix).sum())

    def run(self) -> Whole | None:
        """The columns of the cheapest choice; None where no state is left."""
        problem, fixed = self._problem, self._open.sum(1) == 1
        only = self._open.argmax(1)
        at = np.flatnonzero(fixed), only[fixed]
        self.size = np.array([int(self._sizes[at].sum())])
        self.cost = np.zeros(1)
        self.tag = np.zeros(1, dtype=np.int64)
        steps: list[tuple[int, Whole, Whole]] = []
        known = float(problem.costs[at].sum())
        rest = float(self._least[~fixed].sum() + self._bound.added.sum()) + known
        for group, span in enumerate(problem.spans()):
            for unit in range(span.start, span.stop):
                if fixed[unit]:
                    self.tag = self._counted(self.tag, int(only[unit]))
            rest -= float(self._bound.added[group])
            for unit in range(span.start, span.stop):
                if not fixed[unit]:
                    rest -= float(self._least[unit])
                    steps.append((unit, *self._step(unit, rest)))
            if self._full:
                kept = np.flatnonzero(self.tag == self._full)
                self.size, self.cost, self.tag = self.size[kept], self.cost[kept], self.tag[kept] * 0
                steps.append((-1, kept, kept))
        if self._equal:
            self.cost = np.where(self.size == self._room, self.cost, np.inf)
        self.cost = np.where(self.cost + known <= self._most, self.cost, np.inf)  # beyond it, not all were compared
        if not len(self.cost) or not np.isfinite(self.cost.min()):
            return None
        return self._traced(only, steps)

    def _step(self, unit: int, rest: float) -> tuple[Whole, Whole]:
        """One unit more: (states,) from which state each new one came, and with which column."""
        columns = np.flatnonzero(self._open[unit])
        count = len(self.size)
        size = np.concatenate([self.size + self._sizes[unit, column] for column in columns])
        cost = np.concatenate([self.cost + self._problem.costs[unit, column] for column in columns])
        tag = np.concatenate([self._counted(self.tag, int(column)) for column in columns])
        fits = (size <= self._room) & (cost + self._bound.price * size + rest <= self._limit)
        places = np.flatnonzero(fits)
        kept = places[self._undominated(size[places], cost[places], tag[places])]
        if len(kept) > _STATES:  # sorted by tag and size, the cheapest of a size last
            self.thinned = True
            classes = tag[kept] * _CLASSES + (size[kept] / (self._room + 1) * _CLASSES).astype(np.int64)
            kept = kept[np.append(np.diff(classes) > 0, True)]
        self.size, self.cost, self.tag = size[kept], cost[kept], tag[kept]
        return kept % count, columns[kept // count]

    def _undominated(self, size: Whole, cost: Floats, tag: Whole) -> Whole:
        """Places of the states that no other of the same tag makes needless, by tag and size."""
        order = np.lexsort((cost, size, tag))
        size, cost, tag = size[order], cost[order], tag[order]
        first = np.ones(len(order), dtype=bool)
        if self._equal:
            first[1:] = (size[1:] != size[:-1]) | (tag[1:] != tag[:-1])
            return order[first]
        edges = [0, *(np.flatnonzero(np.diff(tag)) + 1).tolist(), len(order)]
        for start, stop in zip(edges[:-1], edges[1:], strict=True):
            part = cost[start:stop]
            first[start + 1 : stop] = part[1:] < np.minimum.accumulate(part)[:-1]
        return order[first]

    def _counted(self, tag: Whole, column: int) -> Whole:
        """The tags with one unit more of a width."""
        most = int(self._problem.minimum[column])
        if not most:
            return tag
        have = tag // self._radix[column] % (most + 1)
        return tag + np.where(have < most, self._radix[column], 0)

    def _traced(self, only: Whole, steps: list[tuple[int, Whole, Whole]]) -> Whole:
        state, columns = int(self.cost.argmin()), only.copy()
        for unit, parents, widths in reversed(steps):
            if unit >= 0:
                columns[unit] = widths[state]
            state = int(parents[state])
        return columns


def _refusal(problem: Problem, capacity: int, equal: bool) -> PlanError:
    allowed = np.where(np.isfinite(problem.costs), problem.sizes.astype(np.float64), np.inf)
    choice, _ = cheapest(allowed, problem)
    least = int(problem.sizes[np.arange(len(choice)), choice].sum())
    if equal and least <= capacity:
        return PlanError(f"no choice of widths takes {capacity:,} exactly: ask for another size")
    return PlanError(f"no choice of widths fits into {capacity:,}: the narrowest take {least:,}")
