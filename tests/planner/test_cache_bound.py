"""The bound of caching studies: below whatever any way takes, and equal to figures by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from cache_settings import drawn_setting, setting_for, slow_machine
from hypothesis import given, settings
from hypothesis import strategies as st
from workloads import of_selections

from planner.cache.bound import Bound
from planner.cache.ways import WAYS, serve, way_of
from planner.machine import Link, Machine, Processor
from planner.simulate.timeline import StepCosts, timeline

UNIFIED = Link("unified", math.inf, 0.0)
FORESEEN = [
    replace(way_of("lru"), name=f"lru+{name}", prefetch=name)
    for name in ("popularity", "transitions", "previous_token")
]  # type: ignore[arg-type]
rates = st.sampled_from([1e8, 1e9, 1e10, 1e11, 1e12])


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    """Any order of device, CPU and link."""
    return Machine(
        name="drawn", title="drawn", vram=1 << 40, ram=1 << 40,
        device=Processor(draw(rates), draw(rates), draw(st.sampled_from([0.0, 1e-5]))),
        cpu=Processor(draw(rates), draw(rates), draw(st.sampled_from([0.0, 1e-5]))),
        link=Link("drawn", draw(rates), draw(st.sampled_from([0.0, 2e-5, 1e-3]))),
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    machine=machines(), seed=st.integers(0, 10_000), experts=st.integers(3, 7), layers=st.integers(1, 3),
    batch=st.sampled_from([1, 1, 2, 3]), length=st.integers(1, 8), requests=st.integers(1, 4), data=st.data(),
)  # fmt: skip
def test_no_way_is_faster(
    machine: Machine, seed: int, experts: int, layers: int, batch: int, length: int, requests: int, data: st.DataObject
) -> None:
    """Short workloads, too, in which filling the device beforehand saves a large part of all copies."""
    size = np.random.default_rng(seed).choice([1e5, 1e6, 3e6], (layers, experts))
    setting = drawn_setting(
        seed, machine=machine, size=size, batch=batch, layers=layers, experts=experts, length=length, requests=requests
    )
    costs = setting.test_costs  # something dense, so that the CPU and the link can be ahead of the device
    dense = data.draw(st.sampled_from([0.0, 1e-4, 1e-2])) * np.random.default_rng(seed).random(
        setting.test.needed.shape
    )
    setting = replace(setting, test_costs=replace(costs, dense=dense, tail=dense.sum(axis=0)))
    bound = Bound.of(setting)
    slots = data.draw(st.integers(1, setting.all_slots))
    ways = [*WAYS, *(FORESEEN if slots >= setting.least_slots and layers > 1 else [])]
    for way in ways:
        if way.split == "fitted" and way.policy != "static" and slots < setting.least_slots:
            continue
        served = serve(setting, way, slots=slots)
        assert bound.ms(slots) <= served.ms * (1 + 1e-9), way.name


@settings(max_examples=20, deadline=None)
@given(machine=machines(), seed=st.integers(0, 1000))
def test_misses_shared_out_as_well_as_can_be_are_no_faster(machine: Machine, seed: int) -> None:
    """A cache with some of its misses run by the CPU, as many as end each step first."""
    setting = drawn_setting(seed, machine=machine)
    served = serve(setting, way_of("static_cpu"), slots=9)
    clock = timeline(setting.test, served.outcome, setting.test_costs, link=machine.link, fallback="split")
    assert Bound.of(setting).ms(9) <= clock.ms_per_token * (1 + 1e-9)
    assert clock.ms_per_token <= served.ms * (1 + 1e-9)


@pytest.mark.parametrize("batch", [1, 2])
def test_more_slots_never_raise_it(batch: int) -> None:
    bound = Bound.of(drawn_setting(1, machine=slow_machine(), batch=batch, length=40))
    found = [bound.ms(slots) for slots in range(25)]
    assert all(more <= less for less, more in zip(found, found[1:], strict=False))
    assert found[0] > 2 * found[18]
    assert found[18] == found[24]  # all that there are


def test_by_hand() -> None:
    """One layer, experts 0 1 2 0 1 2 ..., of which the device holds one: the best it can do is to keep one for good."""
    turns = 20
    work = of_selections([[[[at % 3] for at in range(3 * turns)]]], 3)
    # 1 MB: 1 microsecond on the device, 1 ms over the link, 4 ms on the CPU.
    machine = slow_machine(link=1e9, cpu=0.25e9)
    setting = setting_for(work, work, machine=machine, size=1e6)
    costs = setting.test_costs
    setting = replace(setting, test_costs=replace(costs, dense=np.full((1, 3 * turns), 0.5e-3)))
    bound = Bound.of(setting)
    # With one slot and bypassing, 19 of 60 uses hit; filled beforehand, one more.
    assert bound.misses.tolist() == [60.0, 40.0, 20.0, 0.0]
    dense = 60 * 0.5e-3
    copied = (40 + dense / 4e-3) / (1 / 1e-3 + 1 / 4e-3)
    assert bound.ms(1) == pytest.approx(1e3 * copied / 60, rel=1e-12)
    # With all of them, the device and the CPU share the work.
    assert bound.ms(3) == pytest.approx(1e3 * (dense + 60 / (1 / 1e-6 + 1 / 4e-3)) / 60, rel=1e-12)
    # Without a CPU every miss is copied, or all run on the device.
    alone = Bound.of(replace(setting, test_costs=replace(setting.test_costs, cpu=None)))
    assert alone.ms(1) == pytest.approx(40 * 1e-3 * 1e3 / 60, rel=1e-12)
    assert alone.ms(3) == pytest.approx(1e3 * (dense + 60 * 1e-6) / 60, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_fewest_misses_by_trying_everything(seed: int) -> None:
    """One cache for two layers, filled with whatever is best: every choice of what to keep after every step."""
    setting = drawn_setting(seed, layers=2, experts=3, requests=1, length=5, k=1)
    steps = [(layer, int(setting.test.ids[layer, at, 0])) for at in range(5) for layer in range(2)]
    objects = list(product(range(2), range(3)))
    for slots in (1, 2, 3):
        held = {frozenset(one): 0 for one in _subsets(objects, slots)}
        for need in steps:
            after: dict[frozenset[tuple[int, int]], int] = {}
            for cache, misses in held.items():
                for kept in _subsets([*cache, *({need} - cache)], slots):
                    cost = misses + (need not in cache)
                    after[frozenset(kept)] = min(after.get(frozenset(kept), cost), cost)
            held = after
        fewest = min(held.values())
        # Less one per slot may be less than what the best filling saves, never more.
        assert fewest - slots <= Bound.of(setting).misses[slots] <= fewest


def _subsets(items: list[tuple[int, int]], most: int) -> list[tuple[tuple[int, int], ...]]:
    found = [()]
    for item in items:
        found += [(*one, item) for one in found if len(one) < most]
    return found  # type: ignore[return-value]


def test_where_memory_is_shared_nothing_is_copied_and_no_cpu_runs_beside() -> None:
    machine = replace(slow_machine(cpu=1e12), link=UNIFIED)
    setting = drawn_setting(0, machine=machine)
    bound = Bound.of(setting)
    resident: StepCosts = setting.test_costs
    whole = 1e3 * float(resident.resident(setting.test.needed).sum()) / setting.test.num_passes
    for slots in (1, 9, 18):
        assert bound.ms(slots) == pytest.approx(whole, rel=1e-12)
        for way in WAYS:
            if way.misses == "load" and (slots >= 6 or way.name != "lru_split"):
                assert bound.ms(slots) <= serve(setting, way, slots=slots).ms * (1 + 1e-12)


def test_a_device_that_takes_no_time_is_no_reason_to_fail() -> None:
    setting = drawn_setting(0)
    costs = replace(setting.test_costs, expert=np.zeros_like(setting.test_costs.expert), cpu=None)
    bound = Bound.of(replace(setting, test_costs=costs))
    assert bound.ms(18) == 0.0
    assert bound.ms(6) > 0.0  # copies do
