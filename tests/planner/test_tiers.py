"""Where experts lie, against counting by hand: every expert somewhere once, the coldest on disk, widths by place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import store
from compressor.plan import BITS, Plan, QuantizeStep, Target
from moescope.errors import PlanError
from planner.cache.offer import plan_of
from planner.cache.setting import Setting, setting_of
from planner.cache.tiers import cache_step, tiers_of, widths_by_tier
from planner.cache.ways import WAYS, Way, serve, way_of
from planner.candidates import Request
from planner.estimate.memory import expert_sizes
from planner.estimate.storage import expert_bytes
from planner.machines import machine
from planner.task import Task
from tests.planner.collected import collected, sample
from tests.profiler.capture.tiny import build

EXPERT = 3 * 128 * 128 * 2
"""Bytes of one of the sample's experts: 128 x 128, 16 bits."""

ALL = 6 * 16
MOVING = [one.name for one in WAYS if one.policy != "static"]
STAYING = [one.name for one in WAYS if one.policy == "static"]


@pytest.fixture(scope="module")
def run() -> Iterator[store.Run]:
    with sample() as opened:
        yield opened


@pytest.fixture(scope="module")
def setting(run: store.Run) -> Setting:
    return setting_of(run, machine("rtx3060"), context=64, steps=20_000)


@pytest.fixture(scope="module")
def task(run: store.Run) -> Task:
    """With super experts: in a model of few experts, the published code's rule always finds one."""
    found = replace(Request(run=run, memory=0, guard="code").task(), form="packed", bits=16.0)
    assert found.guard.protected
    return found


@pytest.fixture(scope="module")
def shared_task(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Task]:
    """A tiny model with a shared expert beside the routed ones."""
    folder = tmp_path_factory.mktemp("shared")
    with collected(build("qwen2_moe"), folder, level="activations,errors", errors_every=1) as opened:
        yield replace(Request(run=opened, memory=0, guard=False).task(), form="packed", bits=16.0)


def on(setting: Setting, **changes: Any) -> Setting:
    return replace(setting, machine=replace(setting.machine, **changes))


@pytest.fixture(scope="module")
def counts(setting: Setting) -> dict[tuple[int, int], int]:
    """(layer, expert) -> steps of the training requests that need it, one by one."""
    found: Counter[tuple[int, int]] = Counter()
    for layer, passes in enumerate(setting.train.ids.tolist()):
        for step in passes:
            found.update((layer, expert) for expert in step if expert >= 0)
    return dict(found)


@pytest.mark.parametrize("name", [*STAYING, *MOVING])
def test_every_expert_lies_somewhere_once(setting: Setting, name: str) -> None:
    way = way_of(name)
    for slots in (12, 40, 95):
        served = serve(setting, way, slots=slots)
        ram = 32 * EXPERT if way.misses == "load" else setting.machine.ram
        tiers = tiers_of(on(setting, ram=ram), way, device=served.pinned, slots=served.slots)
        assert not (tiers.device & tiers.disk).any()
        pinned, below = int(tiers.device.sum()), int(tiers.disk.sum())
        host = ALL - pinned - below
        assert tiers.ram_bytes == host * EXPERT <= ram and tiers.disk_bytes == below * EXPERT
        assert below == max(ALL - pinned - ram // EXPERT, 0)
        # whatever moves has its place below all the same; what stays takes none of the device that it does not use
        assert tiers.held == (pinned if way.policy == "static" else slots) <= slots
        assert tiers.device_bytes == tiers.held * EXPERT
        step = cache_step(setting, served, tiers, method="test")
        assert step.slots == tiers.held and step.policy == way.policy and step.misses == way.misses
        for row, layer in enumerate(step.layers):
            assert (layer.layer, layer.step) == setting.test.layers[row]
            assert set(layer.pinned) == {expert for expert in range(16) if tiers.device[row, expert]}
            assert set(layer.disk) == {expert for expert in range(16) if tiers.disk[row, expert]}
            assert layer.slots == (len(layer.pinned) if way.scope == "shared" else served.layer_slots[row])


@settings(max_examples=30, deadline=None)
@given(pins=st.integers(0, 95), ram=st.integers(0, ALL * EXPERT), slots=st.integers(12, 95))
def test_the_coldest_lie_on_disk(
    setting: Setting, counts: dict[tuple[int, int], int], pins: int, ram: int, slots: int
) -> None:
    everyone = [(layer, expert) for layer in range(6) for expert in range(16)]
    hottest = sorted(everyone, key=lambda one: (-counts.get(one, 0), one))[:pins]
    device = np.zeros((6, 16), np.bool_)
    for one in hottest:
        device[one] = True
    outside = sorted((one for one in everyone if one not in hottest),
                     key=lambda one: (counts.get(one, 0), [-part for part in one]))  # fmt: skip
    fitting = min(ram // EXPERT, len(outside))
    tiers = tiers_of(on(setting, ram=ram), way_of("lru"), device=device, slots=slots)
    assert {tuple(map(int, one)) for one in np.argwhere(tiers.disk)} == set(outside[: len(outside) - fitting])


def test_host_memory_that_just_holds_them_needs_no_disk(setting: Setting) -> None:
    device = np.zeros((6, 16), np.bool_)
    for ram, below in ((ALL * EXPERT, 0), (ALL * EXPERT - 1, 1)):
        tiers = tiers_of(on(setting, ram=ram), way_of("lru"), device=device, slots=20)
        assert tiers.disk.sum() == below


def test_experts_of_several_sizes_are_counted_in_bytes(setting: Setting) -> None:
    bytes_of = np.where(np.arange(16) % 2, 100.0, 40.0) * np.ones((6, 1))
    bytes_of[0, :4] = 0.0  # no weights at all: they lie nowhere
    sized = replace(setting, sizes=replace(setting.sizes, bytes=bytes_of))
    device = np.zeros((6, 16), np.bool_)
    device[2] = True
    need = bytes_of.sum() - bytes_of[2].sum()
    tiers = tiers_of(on(sized, ram=int(need) - 350), way_of("lru"), device=device, slots=20)
    assert need - 350 - 100 < tiers.ram_bytes <= need - 350
    assert tiers.ram_bytes + tiers.disk_bytes == need and not tiers.disk[0, :4].any() and not tiers.disk[2].any()
    assert tiers.device_bytes == bytes_of[2].sum() + 4 * 100.0  # a slot that experts move through holds the largest


def test_what_cannot_be_is_refused_with_the_numbers(setting: Setting) -> None:
    device = np.zeros((6, 16), np.bool_)
    small = on(setting, ram=4 << 20)
    with pytest.raises(PlanError, match=r"^9 MiB of experts .*, 4 MiB of host memory, and the CPU runs"):
        tiers_of(small, way_of("static_cpu"), device=device, slots=20)
    with pytest.raises(PlanError, match=r"9 MiB of experts .*4 MiB of host memory, and the machine has no disk"):
        tiers_of(on(small, disk=None), way_of("lru"), device=device, slots=20)
    device[:] = True  # nothing is left outside
    assert not tiers_of(on(small, disk=None, ram=0), way_of("static_cpu"), device=device, slots=96).disk.any()


# --- widths ---


def planned(task: Task, step: QuantizeStep) -> Plan:
    return plan_of(task, (step,), target=Target(preset="test"), selections={}, notes=())


@pytest.mark.parametrize(("near", "far"), [(8, 4), (8, 2), (4, 3), (3, 2), (4, 4)])
def test_widths_go_by_place_and_super_experts_have_the_wider(task: Task, near: Any, far: Any) -> None:
    device = np.random.default_rng(near * 10 + far).random((6, 16)) < 0.4
    protected = {(unit.layer, unit.expert) for unit in task.guard.protected}
    for unit in protected:
        device[unit] = False
    step = widths_by_tier(task, near=near, far=far, device=device)
    seen = set()
    for layer in step.layers:
        for entry in layer.experts:
            place = (layer.layer, entry.expert)
            wide = device[place] or place in protected
            assert {entry.gate, entry.up, entry.down} == {near if wide else far}
            seen.add(place)
    assert len(seen) == ALL
    plan = planned(task, step)
    sizes = expert_sizes(plan, source_bits=16)
    assert sizes.total == pytest.approx(expert_bytes(plan, source_bits=16))  # which has no shared experts here
    wide = device.copy()
    for unit in protected:
        wide[unit] = True
    for width, where in ((near, wide), (far, ~wide)):
        # one scale of 16 bits for the 128 inputs of a row, and zero points where grids have them
        least, most = EXPERT * width / 16, EXPERT * (width + (16 + width) / 128 + 0.01) / 16
        assert np.all((sizes.bytes[where] >= least) & (sizes.bytes[where] <= most))


def test_shared_experts_have_the_width_of_the_device(shared_task: Task) -> None:
    shapes = shared_task.source.layers
    device = np.zeros((len(shapes), shapes[0].num_experts), np.bool_)
    step = widths_by_tier(shared_task, near=8, far=4, device=device)
    found = {(entry.role, entry.gate) for layer in step.layers for entry in layer.experts}
    assert shapes[0].shared_width and found == {("shared", 8), ("routed", 4)}


def test_a_width_that_files_cannot_hold_is_refused(task: Task) -> None:
    assert "ternary" in BITS
    with pytest.raises(PlanError, match="ternary|packed"):
        widths_by_tier(task, near="ternary", far="ternary", device=np.ones((6, 16), np.bool_))


def test_narrower_experts_leave_more_slots_and_less_on_disk(setting: Setting, task: Task) -> None:
    every = np.ones((6, 16), np.bool_)
    way: Way = way_of("lru")
    below = []
    for width in (8, 4, 2):
        step = widths_by_tier(task, near=width, far=width, device=every)  # type: ignore[arg-type]
        narrow = setting.with_sizes(expert_sizes(planned(task, step), source_bits=16))
        tiers = tiers_of(on(narrow, ram=1 << 20), way, device=~every, slots=20)
        below.append(int(tiers.disk.sum()))
        assert tiers.device_bytes == 20 * narrow.slot_bytes
    assert below[0] > below[1] > below[2]


def test_the_same_setting_gives_the_same_places(setting: Setting) -> None:
    way = way_of("half_pinned")
    device = serve(setting, way, slots=40).pinned
    one, other = (tiers_of(on(setting, ram=3 << 20), way, device=device, slots=40) for _ in range(2))
    assert np.array_equal(one.disk, other.disk) and one.disk.any()
