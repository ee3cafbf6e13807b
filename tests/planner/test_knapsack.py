"""The knapsack of widths against every choice on small instances, and against HiGHS on large ones."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moescope.errors import PlanError
from planner.quantize.knapsack import hull, least_size, solve, solve_milp

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]

ERRORS = (0.1384, 0.0351, 0.0091, 3.5e-05)
BITS = (2 + 18 / 128, 3 + 19 / 128, 4 + 20 / 128, 8 + 24 / 128)


def _every_choice(
    costs: Floats, sizes: Whole, capacity: int | Whole, groups: Whole, minimum: Whole, equal: bool
) -> float | None:
    """The least cost of all choices that are allowed, one after the other."""
    best = None
    for widths in itertools.product(range(costs.shape[1]), repeat=len(costs)):
        at = np.arange(len(costs)), np.array(widths)
        taken: Any = sizes[at].sum()
        if np.ndim(capacity):
            taken = np.bincount(groups, weights=sizes[at], minlength=len(capacity))  # type: ignore[arg-type]
        if not np.all(taken == capacity if equal else taken <= capacity):
            continue
        counted = [np.bincount(np.array(widths)[groups == one], minlength=len(minimum)) for one in set(groups.tolist())]
        if any((own < minimum).any() for own in counted):
            continue
        cost = float(costs[at].sum())
        if np.isfinite(cost) and (best is None or cost < best):
            best = cost
    return best


def _small(seed: int) -> dict[str, Any]:
    """A few units; ties, forbidden widths, sizes that fall, groups and minima all occur."""
    rng = np.random.default_rng(seed)
    units, widths = int(rng.integers(1, 6)), int(rng.integers(2, 5))
    costs = rng.random((units, widths)) * rng.choice([1.0, 1e6])
    costs = np.round(costs, 1) if seed % 3 == 0 else costs
    costs = -np.sort(-costs, axis=1) if seed % 2 else costs
    if seed % 5 == 0:
        costs[rng.random(costs.shape) < 0.2] = np.inf
        costs[~np.isfinite(costs).any(1), 0] = 1.0
    sizes = rng.integers(0, rng.choice([4, 50, 10**9]), (units, widths))
    if seed % 4 == 0:
        sizes = np.tile([2, 3, 4, 8][:widths], (units, 1))
    groups = np.unique(rng.integers(0, 2, units), return_inverse=True)[1]
    minimum = rng.integers(0, 2, widths) if seed % 3 == 1 else np.zeros(widths, dtype=np.int64)
    capacity: Any = int(rng.integers(sizes.min(1).sum(), sizes.max(1).sum() + 1))
    if seed % 4 == 3:
        least, most = (np.bincount(groups, weights=one).astype(int) for one in (sizes.min(1), sizes.max(1)))
        capacity = rng.integers(least, most + 1)
    return {"costs": costs, "sizes": sizes, "capacity": capacity, "groups": groups, "minimum": minimum,
            "equal": seed % 6 == 2}  # fmt: skip


def test_no_choice_is_cheaper() -> None:
    solved = refused = 0
    for seed in range(400):
        asked = _small(seed)
        best = _every_choice(**asked)
        for function in (solve, solve_milp) if seed % 8 in (1, 2) else (solve,):
            if best is None:
                with pytest.raises(PlanError):
                    function(**asked)
                refused += 1
                continue
            choice = function(**asked)
            at = np.arange(len(choice.widths)), choice.widths
            assert choice.cost == pytest.approx(best, rel=1e-9, abs=1e-12), (function.__name__, seed)
            assert choice.proved and (choice.cost, choice.size) == (asked["costs"][at].sum(), asked["sizes"][at].sum())
            solved += 1
    assert solved > 250 and refused > 30


def _model(seed: int, layers: int = 12, experts: int = 32, *, alike: bool = True) -> tuple[Floats, Whole, Whole]:
    """Experts of unequal energy with errors near the typical ones; sizes alike, or of any weights."""
    rng = np.random.default_rng(seed)
    energy = rng.lognormal(0, 1.5, (layers, experts)) * rng.lognormal(0, 1, (layers, 1))
    costs = energy.reshape(-1, 1) * np.array(ERRORS) * rng.lognormal(0, 0.2, (layers * experts, 4))
    weights = np.full(layers * experts, 3 * 768 * 2048) if alike else rng.integers(1000, 200_000, layers * experts) * 16
    return -np.sort(-costs, axis=1), (weights[:, None] * np.array(BITS)).astype(np.int64), weights


@pytest.mark.parametrize(
    ("alike", "bits", "seed"), [(True, 2.5, 1), (True, 3.0, 2), (True, 5.0, 3), (False, 2.6, 4), (False, 4.0, 5)]
)
def test_large_instances_agree_with_highs(alike: bool, bits: float, seed: int) -> None:
    costs, sizes, weights = _model(seed, alike=alike)
    capacity = int(bits * weights.sum())
    own, other = (one(costs=costs, sizes=sizes, capacity=capacity) for one in (solve, solve_milp))
    assert own.size <= capacity
    # HiGHS stops within 1e-6 of sizes that share no divisor; ours is never dearer.
    assert own.cost <= other.cost * (1 + 1e-9)
    assert own.cost == pytest.approx(other.cost, rel=1e-9 if alike else 1e-5)


def test_layers_with_budgets_and_minima_agree_with_highs() -> None:
    costs, sizes, weights = _model(7, layers=4, experts=16)
    groups, minimum = np.repeat(np.arange(4), 16), np.array([1, 2, 0, 1])
    capacity: Any = np.full(4, int(3.1 * weights[:16].sum()))
    for room in (capacity, int(capacity.sum())):
        asked: dict[str, Any] = {"costs": costs, "sizes": sizes, "capacity": room, "groups": groups}
        own = solve(**asked, minimum=minimum)
        assert own.cost == pytest.approx(solve_milp(**asked, minimum=minimum).cost, rel=1e-9)
        assert own.cost >= solve(**asked).cost
        counts = np.array([np.bincount(own.widths[groups == one], minlength=4) for one in range(4)])
        assert (counts >= minimum).all()
    assert solve(**{**asked, "capacity": capacity}).cost >= solve(**asked).cost  # one budget is never dearer


def test_equal_sizes_are_met() -> None:
    rng = np.random.default_rng(3)
    costs = -np.sort(-rng.random((40, 3)), axis=1)
    sizes, minimum = np.tile([1, 2, 3], (40, 1)), np.array([0, 1, 1])
    for capacity in (60, 81, 103):
        asked: dict[str, Any] = {"costs": costs, "sizes": sizes, "capacity": capacity, "minimum": minimum}
        own = solve(**asked, equal=True)
        assert own.size == capacity
        assert own.cost == pytest.approx(solve_milp(**asked, equal=True).cost, rel=1e-9)


def test_ties_take_the_narrower_width_and_the_same_again() -> None:
    costs, sizes = np.ones((5, 3)), np.tile([1, 2, 3], (5, 1))
    assert solve(costs=costs, sizes=sizes, capacity=12).widths.tolist() == [0] * 5
    model, bits, weights = _model(9)
    rounded = np.round(model, 2)  # many costs are the same
    first, second = (solve(costs=rounded, sizes=bits, capacity=int(3 * weights.sum())) for _ in range(2))
    assert first.widths.tolist() == second.widths.tolist()


def test_what_cannot_be_compared_is_thinned_and_says_so() -> None:
    """Costs that are linear in sizes without a divisor: every sum of sizes is a state that nothing dominates."""
    rng = np.random.default_rng(12)
    sizes = np.sort(rng.integers(10**6, 10**8, (16, 4)), axis=1)
    costs = 1e8 - sizes.astype(np.float64)
    capacity = int(sizes.mean() * 16 * 0.9)
    own = solve(costs=costs, sizes=sizes, capacity=capacity)
    greedy = hull(costs=costs, sizes=sizes).at(capacity)
    assert not own.proved and own.size <= capacity
    # The size is all that counts: what is left of the capacity is what it costs too much, at most.
    assert 0 <= own.cost - (16e8 - capacity) < (greedy.cost - (16e8 - capacity)) / 100


def test_units_without_a_choice_keep_theirs() -> None:
    costs, sizes, weights = _model(10, layers=2)
    costs[5, :3] = np.inf
    own = solve(costs=costs, sizes=sizes, capacity=int(2.5 * weights.sum()))
    assert own.widths[5] == 3


@pytest.mark.parametrize("alike", [True, False])
def test_the_curve_is_convex_and_bounds_every_choice(alike: bool) -> None:
    costs, sizes, weights = _model(11, alike=alike)
    curve = hull(costs=costs, sizes=sizes)
    slopes = np.diff(curve.costs) / np.diff(curve.sizes)
    assert (np.diff(curve.sizes) > 0).all() and (slopes < 0).all()
    assert (np.diff(slopes) >= -1e-9 * np.abs(slopes[:-1])).all()
    assert curve.sizes[0] == sizes.min(1).sum() and curve.sizes[-1] == sizes.max(1).sum()
    assert curve.costs[-1] == pytest.approx(costs.min(1).sum(), rel=1e-6)
    for bits in (2.2, 2.7, 3.3, 4.5, 7.0):
        capacity = int(bits * weights.sum())
        greedy, exact = curve.at(capacity), solve(costs=costs, sizes=sizes, capacity=capacity)
        at = np.arange(len(costs)), greedy.widths
        assert greedy.size == sizes[at].sum() <= capacity
        assert greedy.cost == pytest.approx(costs[at].sum(), rel=1e-9)
        lower = float(np.interp(capacity, curve.sizes, curve.costs))  # the relaxed optimum: widths may be mixed
        assert lower * (1 - 1e-9) <= exact.cost <= greedy.cost * (1 + 1e-9)
        assert greedy.cost <= exact.cost * 1.02
    for point in range(0, len(curve.sizes), 97):  # at its own points, the curve is exact
        exact = solve(costs=costs, sizes=sizes, capacity=int(curve.sizes[point]))
        assert exact.cost == pytest.approx(curve.costs[point], rel=1e-9)


def test_a_unit_that_gains_nothing_stays_narrow() -> None:
    curve = hull(costs=np.array([[1.0, 1.0, 2.0], [3.0, 2.0, 1.0]]), sizes=np.tile([2, 3, 4], (2, 1)))
    assert curve.sizes.tolist() == [4, 5, 6] and curve.costs.tolist() == [4.0, 3.0, 2.0]
    assert curve.at(100).widths.tolist() == [0, 2]
    flat = hull(costs=np.ones((2, 2)), sizes=np.tile([2, 3], (2, 1)))
    assert flat.sizes.tolist() == [4] and flat.at(9).widths.tolist() == [0, 0]


def test_what_cannot_be_is_refused() -> None:
    costs, sizes = np.ones((2, 2)), np.tile([2, 3], (2, 1))
    for function in (solve, solve_milp):
        with pytest.raises(PlanError, match="no choice of widths fits into 3"):
            function(costs=costs, sizes=sizes, capacity=3)
    with pytest.raises(PlanError, match="fits into 3: the narrowest take 4"):
        hull(costs=costs, sizes=sizes).at(3)
    with pytest.raises(PlanError, match="no choice of widths takes 7 exactly"):
        solve(costs=costs, sizes=sizes, capacity=7, equal=True)
    with pytest.raises(PlanError, match="group 0 has 2 units, too few for the 3 widths"):
        solve(costs=costs, sizes=sizes, capacity=9, minimum=np.array([2, 1]))
    with pytest.raises(PlanError, match="unit 1 may have no width at all"):
        hull(costs=np.array([[1.0, 2.0], [np.inf, np.inf]]), sizes=sizes)
    with pytest.raises(PlanError, match="costs must be numbers"):
        solve(costs=np.array([[1.0, np.nan], [1.0, 1.0]]), sizes=sizes, capacity=9)
    with pytest.raises(PlanError, match="must be whole numbers of bits"):
        solve(costs=costs, sizes=sizes * 0.5, capacity=9)
    with pytest.raises(PlanError, match="alike and not empty"):
        solve(costs=costs, sizes=sizes[:1], capacity=9)
    with pytest.raises(PlanError, match="groups are"):
        solve(costs=costs, sizes=sizes, capacity=9, groups=np.zeros(3, dtype=np.int64))


def test_the_least_size_has_the_minimum() -> None:
    sizes, groups = np.tile([2, 3, 8], (6, 1)), np.array([0, 0, 0, 1, 1, 1])
    assert least_size(costs=np.ones((6, 3)), sizes=sizes).tolist() == [12]
    own = least_size(costs=np.ones((6, 3)), sizes=sizes, groups=groups, minimum=np.array([0, 1, 1]))
    assert own.tolist() == [13, 13]
