"""How many and which: exact allocation, balanced groups, and numbers that cannot be."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from compressor.plan import LayerShape, Protected
from moescope.errors import PlanError
from planner.allocation import allocate, blocks, least_kept, lost_by_count, lowest, most_removed, part, removed
from planner.guard import Guard


def shape(**changes: Any) -> LayerShape:
    return LayerShape(**{"layer": 3, "num_experts": 12, "top_k": 2, "width": 8, **changes})


def asked(share: float, *protected: int) -> Any:
    units = tuple(Protected(layer=3, expert=one, reason="super expert") for one in protected)
    return SimpleNamespace(share=share, guard=Guard(protected=units, active=True))


@pytest.mark.parametrize("seed", range(6))
def test_allocation_is_that_of_all_allocations(seed: int) -> None:
    generator = np.random.default_rng(seed)
    costs = [generator.normal(size=generator.integers(2, 6)).cumsum() for _ in range(4)]
    costs[1][1] = np.inf
    total = 5
    possible = [counts for counts in itertools.product(*(range(len(cost)) for cost in costs)) if sum(counts) == total]
    best = min(possible, key=lambda counts: sum(cost[count] for cost, count in zip(costs, counts, strict=True)))
    assert tuple(allocate(costs, total)) == best


def test_more_than_there_is_cannot_be_allocated() -> None:
    with pytest.raises(PlanError, match="can give at most 3 units, not 4"):
        allocate([np.zeros(2), np.zeros(3)], 4)


def test_parts_are_those_of_decimal_fractions() -> None:
    assert [part(100, share) for share in (0.29, 0.57, 0.58, 0.1, 0.999)] == [29, 57, 58, 10, 99]
    assert all(part(count, removed / count) == removed for count in range(1, 300) for removed in range(1, count))


def test_share_becomes_a_number() -> None:
    assert removed(asked(0.25), shape()) == 3
    assert removed(asked(0.25), shape(num_experts=16, groups=4, chosen_groups=2)) == 4
    assert removed(asked(0.3), shape(num_experts=16, groups=4, chosen_groups=2)) == 4  # 4.8, and groups stay alike


@pytest.mark.parametrize(
    ("task", "layer", "sentence"),
    [
        (asked(0.05), shape(), "share 0.05 of 12 experts removes none from layer 3: ask for at least 0.08333"),
        (asked(0.9), shape(top_k=3), "would keep 2 of 12 experts of layer 3, which needs 3"),
        (asked(0.1), shape(groups=4), "removes fewer experts than layer 3 has groups, 4"),
        (asked(0.7), shape(groups=4, chosen_groups=1), "would keep 4 of 12 experts of layer 3, which needs 8"),
        (asked(0.5, *range(8)), shape(), "protects 8 super experts and would keep 6 of 12, so that at most 4 can go"),
        (asked(0.5, 0, 1, 2, 3), shape(groups=2, chosen_groups=2), "at most 4 can go and not 6"),
    ],
)
def test_numbers_that_cannot_be_are_refused(task: Any, layer: LayerShape, sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        removed(task, layer)


def test_least_kept_leaves_groups_that_work() -> None:
    assert least_kept(shape()) == 2
    assert least_kept(shape(groups=3, chosen_groups=1, top_k=3)) == 9
    assert least_kept(shape(groups=3, chosen_groups=3, top_k=3)) == 6  # two are ranked in every group
    assert most_removed(shape(), range(11)) == 1
    assert most_removed(shape(groups=3, chosen_groups=1), [0, 1, 2, 3]) == 0
    assert most_removed(shape(), range(12)) == 0


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_lowest_are_balanced_and_spare_the_protected(groups: int) -> None:
    generator = np.random.default_rng(groups)
    layer, values = shape(groups=groups), generator.normal(size=12)
    gone = lowest(values, layer, 4, {0, 7})
    assert len(gone) == 4 and gone == sorted(gone) and not {0, 7} & set(gone)
    for block in blocks(layer):
        mine = [one for one in gone if one in block]
        assert len(mine) == 4 // groups
        kept = [one for one in block.tolist() if one not in mine and one not in (0, 7)]
        assert max(values[mine]) < min(values[kept])


def test_of_equal_values_the_higher_goes() -> None:
    assert lowest(np.ones(12), shape(), 2, ()) == [10, 11]


def test_cost_of_a_count_is_what_goes() -> None:
    values = np.array([4.0, 1.0, 3.0, 2.0])
    layer = shape(num_experts=4, top_k=1)
    assert lost_by_count(values, layer, ()).tolist() == [0.0, 0.1, 0.3, 0.6]
    assert lost_by_count(values, layer, {1}).tolist() == pytest.approx([0.0, 0.2, 0.5, 0.9])
    grouped = lost_by_count(np.arange(1.0, 9.0), replace_groups(layer), ())
    assert np.isinf(grouped[[1, 3]]).all() and grouped[2] == (1 + 5) / 36


def replace_groups(layer: LayerShape) -> LayerShape:
    return layer.model_copy(update={"num_experts": 8, "groups": 2, "chosen_groups": 2})


def test_guard_knows_its_experts() -> None:
    guard = Guard(
        protected=(Protected(layer=3, expert=1, reason="a"), Protected(layer=5, expert=0, role="shared", reason="b"))
    )
    assert guard.experts((3, 0)) == {1} and guard.experts((5, 0)) == set()
    assert guard.experts((5, 0), "shared") == {0} and guard.layers == {3, 5}
    assert replace(guard, active=True).active
