"""The timeline of one token: ends when the clock says, for every pass, and no lane does two things at once."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from workloads import drawn_workload

from compressor.plan import LayerShape, Source
from moescope.errors import PlanError
from planner.cache.setting import Setting
from planner.cache.token import Event, token_events
from planner.cache.ways import WAYS, serve, way_of
from planner.estimate.memory import ExpertSizes, MemoryBudget
from planner.machine import Link
from planner.machines import machine
from planner.simulate.timeline import StepCosts, timeline

EXACT = 1e-12
LAYERS, EXPERTS, SLOTS = 3, 6, 9


def setting(seed: int, **changes: Any) -> Setting:
    """Two workloads of three layers, with costs and sizes that differ from step to step."""
    rng = np.random.default_rng(seed)
    train, test = drawn_workload(seed, skew=0.4), drawn_workload(seed + 100, skew=0.4)
    shape = (LAYERS, test.num_passes)
    size = rng.integers(10, 90, (LAYERS, EXPERTS)) * 1.0
    costs = StepCosts(
        dense=rng.uniform(0, 0.5, shape), expert=rng.uniform(0.05, 0.6, shape), tail=rng.uniform(0, 0.3, shape[1]),
        size=size, cpu=rng.uniform(0.1, 1.5, shape),
    )  # fmt: skip
    layers = tuple(LayerShape(layer=layer, num_experts=EXPERTS, top_k=2, width=4) for layer in range(LAYERS))
    source = Source(model="m", model_type="t", hidden_size=4, expert_size=4, num_layers=LAYERS, layers=layers)
    found = Setting(
        machine=replace(machine("rtx3060"), link=Link("test", 100.0, 0.25)), source=source,
        sizes=ExpertSizes(tuple((layer, 0) for layer in range(LAYERS)), size, np.ones(size.shape, np.int64)), rest=None,
        budget=MemoryBudget(1000, 0.0, 0.0, 0.0, True), train=train, test=test, test_costs=costs, context=1, batch=1,
        dense_bits=16.0, other=None,
    )  # fmt: skip
    return replace(found, **changes)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_last_end_is_the_time_of_the_pass(way: Any, seed: int) -> None:
    given = setting(seed)
    served = serve(given, way, slots=SLOTS)
    ends = [max(one.end for one in token_events(given, served, at=at)) for at in range(given.test.num_passes)]
    np.testing.assert_allclose(ends, served.clock.pass_seconds, rtol=0, atol=EXACT)
    # The ways that load do load, and those that leave experts to the CPU have it run some.
    assert served.clock.cpu_experts > 0 if way.misses == "cpu" else served.clock.loads > 0


def test_without_overlap_too() -> None:
    given = setting(3)
    served = serve(given, way_of("lru"), slots=SLOTS)
    clock = timeline(given.test, served.outcome, served.costs, link=given.machine.link, overlap=False)
    ends = [
        max(one.end for one in token_events(given, served, at=at, overlap=False)) for at in range(given.test.num_passes)
    ]
    np.testing.assert_allclose(ends, clock.pass_seconds, rtol=0, atol=EXACT)
    assert clock.total > served.clock.total


@pytest.mark.parametrize("name", ["lru", "static_cpu", "half_pinned"])
def test_lanes_do_one_thing_at_a_time_and_every_expert_runs_once(name: str) -> None:
    given = setting(5)
    served = serve(given, way_of(name), slots=SLOTS)
    loads = 0
    for at in range(given.test.num_passes):
        events = token_events(given, served, at=at)
        lanes: dict[str, list[Event]] = defaultdict(list)
        for one in events:
            lanes[one.lane].append(one)
        for mine in lanes.values():
            assert all(late.begin >= early.end - EXACT for early, late in zip(mine, mine[1:], strict=False))
        ran = sorted((one.layer, one.expert) for one in events if one.kind in ("hit", "loaded", "cpu"))
        needed = sorted((layer, int(one)) for layer in range(LAYERS) for one in given.test.ids[layer, at] if one >= 0)
        assert ran == needed
        arrived = {(one.layer, one.expert): one.end for one in events if one.kind == "load"}
        assert all(one.begin >= arrived[one.layer, one.expert] - EXACT for one in events if one.kind == "loaded")
        loads += len(arrived)
    assert loads == served.clock.loads


def test_by_hand() -> None:
    """One layer, expert 0 pinned: the copy of the other takes 1 second beside the hit of 0.3."""
    work = drawn_workload(0, layers=1, experts=2, k=2, requests=1, length=1)
    ones = np.ones((1, 1))
    costs = StepCosts(dense=0.5 * ones, expert=0.3 * ones, tail=np.array([0.1]), size=np.full((1, 2), 75.0))
    sizes = ExpertSizes(((0, 0),), np.full((1, 2), 75.0), np.ones((1, 2), np.int64))
    given = setting(0, train=work, test=work, test_costs=costs, sizes=sizes)
    served = serve(given, replace(way_of("static_cpu"), misses="load"), slots=1)
    assert token_events(given, served, at=0) == [
        Event("device", "dense", 0, -1, 0.0, 0.5), Event("link", "load", 0, 1, 0.5, 1.5),
        Event("device", "hit", 0, 0, 0.5, 0.8), Event("device", "loaded", 0, 1, 1.5, 1.8),
        Event("device", "tail", -1, -1, 1.8, pytest.approx(1.9, abs=EXACT)),
    ]  # fmt: skip


def test_what_cannot_be_drawn_is_said() -> None:
    given = setting(0)
    served = serve(given, way_of("lru"), slots=SLOTS)
    with pytest.raises(PlanError, match="no token 40: there are 40"):
        token_events(given, served, at=40)
    foreseen = serve(given, replace(way_of("lru"), prefetch="popularity"), slots=SLOTS)
    with pytest.raises(PlanError, match="without prefetching"):
        token_events(given, foreseen, at=0)
