"""Orders of bit planes, against all orders of small steps and examples by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moescope.errors import PlanError
from planner.simulate.planes import PlaneJobs, hottest_first, plane_jobs, schedule, schedules, tokens_by_width


def random_jobs(rng: np.random.Generator, experts: int, planes: int) -> PlaneJobs:
    jobs = tuple((expert, plane) for expert in range(experts) for plane in range(rng.integers(1, planes + 1)))
    load, compute = rng.integers(0, 6, len(jobs)) * 1.0, rng.integers(0, 6, len(jobs)) * 1.0
    return PlaneJobs(jobs, rng.integers(1, 9, len(jobs)), load, compute)


def least(jobs: PlaneJobs) -> float:
    """Of all orders that ascend within each expert, simulated on two machines by their clocks."""
    best = float("inf")
    for order in itertools.permutations(range(len(jobs.jobs))):
        if any(jobs.jobs[a] > jobs.jobs[b] for a, b in itertools.combinations(order, 2)
               if jobs.jobs[a][0] == jobs.jobs[b][0]):  # fmt: skip
            continue
        arrivals = np.cumsum(jobs.load[list(order)])
        left = np.cumsum(jobs.compute[list(order)][::-1])[::-1]
        best = min(best, float((arrivals + left).max()))
    return best


@pytest.mark.parametrize("seed", range(60))
def test_johnson_is_the_best_of_all_orders(seed: int) -> None:
    rng = np.random.default_rng(seed)
    jobs = random_jobs(rng, int(rng.integers(1, 5)), 3)
    while len(jobs.jobs) > 7:
        jobs = random_jobs(rng, 3, 3)
    found = schedules(jobs)
    assert found["johnson"].seconds == least(jobs)
    assert min(found["hottest"].seconds, found["id"].seconds) >= found["johnson"].seconds
    for one in found.values():
        assert one.idle == pytest.approx(one.seconds - jobs.compute.sum())


def test_the_textbook_example_of_johnsons_rule() -> None:
    """Five jobs of one plane each, (load, compute): the order 4, 0, 3, 2, 1 takes 27."""
    load, compute = np.array([4.0, 4, 10, 6, 2]), np.array([5.0, 1, 4, 10, 3])
    jobs = PlaneJobs(tuple((one, 0) for one in range(5)), np.ones(5, np.int64), load, compute)
    found = schedules(jobs)["johnson"]
    assert [expert for expert, _ in found.order] == [4, 0, 3, 2, 1]
    assert found.seconds == least(jobs) == 27.0


def test_the_hottest_plane_comes_first() -> None:
    """Expert 0: 5 tokens in 2 planes; expert 1: 4 tokens of the base, 2 of them of all three planes."""
    jobs = plane_jobs(wanted=[[0, 5, 0], [2, 0, 2], [0, 0, 0]], load_seconds=[2, 1, 1], token_seconds=[1, 2, 3])
    assert jobs.jobs == ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2))
    assert jobs.users.tolist() == [5, 5, 4, 2, 2]
    assert jobs.load.tolist() == [2, 1, 2, 1, 1]
    assert jobs.compute.tolist() == [0, 10, 2, 0, 6]
    assert hottest_first(jobs) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    colder = plane_jobs(wanted=[[2, 1, 0], [0, 0, 2]], load_seconds=[2, 1, 1], token_seconds=[1, 2, 3])
    assert hottest_first(colder) == [(0, 0), (1, 0), (1, 1), (1, 2), (0, 1)]
    assert (
        schedule(colder, hottest_first(colder)).seconds == 14.0
    )  # loads end at 2, 4, 5, 6, 7; computing 2-4, 6-12, 12-14
    there = plane_jobs(wanted=[[0, 5, 0]], load_seconds=[2, 1, 1], token_seconds=[1, 2, 3], resident=[1])
    assert there.load.tolist() == [0, 1]


def test_light_uses_get_few_planes() -> None:
    selections = np.array([[0, 1], [1, 2], [2, -1]])
    weights = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.0]])
    counts = tokens_by_width(selections=selections, weights=weights, num_experts=4, shares=[0.4, 0.4, 0.2])
    assert counts.tolist() == [[0, 0, 1], [1, 1, 0], [1, 1, 0], [0, 0, 0]]
    with pytest.raises(PlanError, match="add up to 1"):
        tokens_by_width(selections=selections, weights=weights, num_experts=4, shares=[0.5, 0.4])


def test_orders_that_cannot_be_are_refused() -> None:
    jobs = plane_jobs(wanted=[[0, 1]], load_seconds=[1, 1], token_seconds=[1, 1])
    with pytest.raises(PlanError, match="every plane"):
        schedule(jobs, [(0, 0)])
    with pytest.raises(PlanError, match="plane 0 of expert 0 comes after"):
        schedule(jobs, [(0, 1), (0, 0)])
    with pytest.raises(PlanError, match="as many planes"):
        plane_jobs(wanted=[[0, 1]], load_seconds=[1], token_seconds=[1, 1])
    with pytest.raises(PlanError, match="0 or more"):
        plane_jobs(wanted=[[0, 1]], load_seconds=[1, -1], token_seconds=[1, 1])
