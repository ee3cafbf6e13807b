"""The clock of copies and computing, against an event-driven simulation in plain Python and examples by hand."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import store
from moescope.errors import PlanError
from planner.machine import Link
from planner.simulate.outcome import Outcome
from planner.simulate.replay import replay
from planner.simulate.timeline import StepCosts, Timeline, bound_seconds, prefetching, timeline
from planner.simulate.workload import Workload, batched, decode, workload_of

SAMPLE = Path(__file__).parents[2] / "sample_data" / "runs" / "sample.duckdb"
LINK = Link("test", 100.0, 0.25)
EXACT = 1e-9


def workload(ids: np.ndarray, experts: int) -> Workload:
    """(layers, passes, width) experts as a workload of one request."""
    return decode(selections=ids[:, None], num_experts=experts)


def random_ids(rng: np.random.Generator, layers: int, passes: int, width: int, experts: int) -> np.ndarray:
    """Sets of 1..width experts."""
    ids = np.full((layers, passes, width), -1, np.int16)
    for place in np.ndindex(layers, passes):
        count = rng.integers(1, width + 1)
        ids[place][:count] = rng.permutation(experts)[:count]
    return ids


def random_costs(rng: np.random.Generator, layers: int, passes: int, experts: int) -> StepCosts:
    return StepCosts(
        dense=rng.choice([0.0, 0.1, 0.5], (layers, passes)), expert=rng.uniform(0.05, 0.6, (layers, passes)),
        tail=rng.choice([0.0, 0.3], passes), size=np.repeat(rng.integers(5, 90, (layers, 1)), experts, axis=1) * 1.0,
        cpu=rng.uniform(0.1, 1.5, (layers, passes)),
    )  # fmt: skip


def outcome_of(work: Workload, missing: np.ndarray, **more: np.ndarray) -> Outcome:
    """A replay with misses alone; the clock reads nothing else."""
    zero = np.zeros((work.num_requests, work.num_layers), np.int64)
    return Outcome("test", 0, zero, zero, zero, zero, 0, missing.astype(np.uint16), **more)


# --- steps whose misses are answered on demand ---


def queues(jobs: list[list[tuple[str, float]]]) -> tuple[float, dict[str, float]]:
    """When the last of the jobs ends, and how long each resource works: every resource takes one job at a time, first
    come first served, of those that come together the earlier of the list. jobs: (resource, seconds) in order."""
    events: list[tuple[float, int, int]] = [(0.0, number, 0) for number in range(len(jobs))]
    heapq.heapify(events)
    free: dict[str, float] = {}
    busy: dict[str, float] = {}
    end = 0.0
    while events:
        now, number, stage = heapq.heappop(events)
        if stage == len(jobs[number]):
            end = max(end, now)
            continue
        resource, seconds = jobs[number][stage]
        free[resource] = max(free.get(resource, 0.0), now) + seconds
        busy[resource] = busy.get(resource, 0.0) + seconds
        heapq.heappush(events, (free[resource], number, stage + 1))
    return end, busy


def step_by_events(
    *, ready: int, waiting: list[tuple[float, float]], on_link: int, expert: float, cpu: float, overlap: bool
) -> tuple[float, dict[str, float]]:
    """waiting: (seconds from disk, seconds over the link) of each missing expert."""
    jobs: list[list[tuple[str, float]]] = [[("device", expert)] for _ in range(ready)] if overlap else []
    for place, (read, copy) in enumerate(waiting):
        route = [("disk", read)] if read else []
        if place < on_link:
            route += [("link", copy)] + ([("device", expert)] if overlap else [])
        else:
            route += [("cpu", cpu)]
        jobs.append(route)
    end, busy = queues(jobs)
    if not overlap:
        copied, _ = queues([job for job in jobs if job[-1][0] == "link"])
        end = max(end, copied + (ready + min(on_link, len(waiting))) * expert)
    return end, busy


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("fallback", ["link", "faster", "cpu", "split"])
@pytest.mark.parametrize("seed", range(4))
def test_steps_on_demand_equal_events(seed: int, fallback: Any, overlap: bool) -> None:
    rng = np.random.default_rng(seed)
    work = workload(random_ids(rng, 3, 40, 5, 8), 8)
    costs, disk = random_costs(rng, 3, 40, 8), Link("disk", 60.0, 0.1)
    assert costs.cpu is not None
    missing = rng.integers(0, work.needed + 1)
    narrow = rng.integers(0, missing + 1)
    skipped = rng.integers(0, missing - narrow + 1)
    stored = rng.integers(0, missing - skipped + 1)
    found = timeline(
        work, outcome_of(work, missing, narrow=narrow, skipped=skipped), costs, link=LINK, disk=disk, from_disk=stored,
        fallback=fallback, overlap=overlap, narrow_part=0.25,
    )  # fmt: skip
    links = disks = 0.0
    for layer, at in np.ndindex(missing.shape):
        size = costs.size[layer, 0]
        wide = int(missing[layer, at] - narrow[layer, at] - skipped[layer, at])
        widths = [size] * wide + [size / 4] * int(narrow[layer, at])
        lying = int(stored[layer, at])
        disk_wide = min(wide, lying)
        parts = [(0.0, one) for one in widths[: wide - disk_wide]]
        parts += [(0.0, one) for one in widths[wide : len(widths) - (lying - disk_wide)]]
        parts += [(disk.seconds(one), one) for one in widths[wide - disk_wide : wide]]
        parts += [(disk.seconds(one), one) for one in widths[len(widths) - (lying - disk_wide) :]]
        waiting = [(read, LINK.seconds(one)) for read, one in parts]
        unit, cpu = costs.expert[layer, at], costs.cpu[layer, at]
        choices = {
            "link": [len(waiting)], "cpu": [0], "split": range(len(waiting) + 1),
            "faster": [0 if cpu < LINK.seconds(size) + unit else len(waiting)],
        }[fallback]  # fmt: skip
        ends = [
            step_by_events(
                ready=int(work.needed[layer, at] - missing[layer, at]), waiting=waiting, on_link=one, expert=unit,
                cpu=cpu, overlap=overlap,
            )
            for one in choices
        ]  # fmt: skip
        end, busy = min(ends, key=lambda one: one[0])
        assert found.seconds[layer, at] - costs.dense[layer, at] == pytest.approx(end, abs=EXACT)
        disks += busy.get("disk", 0.0)
        links += busy.get("link", 0.0)
    assert found.disk_seconds == pytest.approx(disks, abs=1e-6)
    if fallback != "split":  # of splits that end alike, either may be taken
        assert found.link_seconds == pytest.approx(links, abs=1e-6)
    assert found.loads + found.cpu_experts == int((missing - skipped).sum())
    assert (found.pass_seconds == found.seconds.sum(axis=0) + costs.tail).all()


def one_step(*, missing: int, overlap: bool, fallback: Any = "link", cpu: float = 9.0) -> Timeline:
    """4 experts of 75 bytes, 1 s each on the device, copies of 1 s."""
    work = workload(np.array([[[0, 1, 2, 3]]], np.int16), 4)
    costs = StepCosts(
        dense=np.full((1, 1), 0.5), expert=np.ones((1, 1)), tail=np.full(1, 0.25), size=np.full((1, 4), 75.0),
        cpu=np.full((1, 1), cpu),
    )  # fmt: skip
    outcome = outcome_of(work, np.full((1, 1), missing))
    return timeline(work, outcome, costs, link=LINK, overlap=overlap, fallback=fallback)


def test_a_step_by_hand() -> None:
    assert one_step(missing=0, overlap=True).total == 4.75
    assert one_step(missing=2, overlap=True).total == 4.75  # both arrive while the hits run
    assert one_step(missing=2, overlap=False).total == 6.75
    assert one_step(missing=4, overlap=True).total == 5.75  # the first copy hides behind nothing
    assert one_step(missing=2, overlap=True, fallback="cpu", cpu=3.0).total == 6.75  # 6 s on the CPU, 2 s beside them
    assert one_step(missing=2, overlap=False, fallback="faster", cpu=2.5).waiting.sum() == 2.0
    assert one_step(missing=4, overlap=True, fallback="split", cpu=2.0).total == 4.75  # 3 copied, 1 on the CPU
    whole = one_step(missing=4, overlap=False)
    assert (whole.loads, whole.bytes, whole.link_seconds, whole.hit_rate) == (4, 300.0, 4.0, 0.0)
    assert whole.link_share == pytest.approx(4 / 8.75)
    assert whole.resident_ms == 4750 and whole.ms_per_token == 8750


# --- prefetching ---


class Events:
    """Cache, channel and device as processes on one event queue; plain lists, nothing shared with the kernel."""

    def __init__(
        self, ids: np.ndarray, predicted: np.ndarray, slots: list[int], ahead: int, shared: bool, costs: StepCosts,
        overlap: bool,
    ) -> None:  # fmt: skip
        self.ids, self.predicted, self.slots, self.ahead, self.shared = ids, predicted, slots, ahead, shared
        self.costs, self.overlap = costs, overlap
        self.layers, self.passes = ids.shape[:2]
        self.caches: list[OrderedDict[tuple[int, int], bool]] = [OrderedDict() for _ in slots]  # oldest first -> used
        self.held_for: dict[tuple[int, int], int] = {}
        self.demand: list[tuple[int, int]] = []
        self.queue: list[tuple[int, tuple[int, int]]] = []
        self.running: tuple[float, tuple[int, int], bool] | None = None
        self.now, self.step, self.waited = 0.0, -1, 0.0
        self.needs: list[tuple[int, int]] = []
        self.there: set[tuple[int, int]] = set()
        self.missing = np.zeros((self.layers, self.passes), int)
        self.ends: list[float] = []
        self.prefetches, self.loads, self.wasted = 0, 0, 0.0
        self.device_free = 0.0
        self.todo: list[tuple[int, int]] = []

    def cache(self, item: tuple[int, int]) -> OrderedDict[tuple[int, int], bool]:
        return self.caches[0 if self.shared else item[0]]

    def room(self, item: tuple[int, int]) -> int:
        return self.slots[0 if self.shared else item[0]]

    def copy_seconds(self, item: tuple[int, int]) -> float:
        return LINK.seconds(float(self.costs.size[item]))

    def evict(self, item: tuple[int, int], first: int) -> bool:
        """Make a place for item: drop the oldest that no step from ``first`` on is held for."""
        cache = self.cache(item)
        if len(cache) < self.room(item):
            return True
        for other in cache:
            running = self.running is not None and self.running[1] == other
            if other not in self.needs and self.held_for.get(other, -1) < first and not running:
                if not cache.pop(other):
                    self.wasted += float(self.costs.size[other])
                return True
        return False

    def start(self) -> None:
        """The channel takes its next copy."""
        while self.running is None and (self.demand or self.queue):
            if self.demand:
                item = self.demand.pop(0)
                self.running = (self.now + self.copy_seconds(item), item, True)
                return
            target, item = self.queue.pop(0)
            if self.evict(item, self.step + 1):
                self.cache(item)[item] = False
                self.held_for[item] = target
                self.prefetches += 1
                self.running = (self.now + self.copy_seconds(item), item, False)

    def answer(self) -> None:
        """A router answers."""
        self.step += 1
        layer, at = self.step % self.layers, self.step // self.layers
        self.needs = [(layer, int(one)) for one in self.ids[layer, at] if one >= 0]
        self.queue = [(target, item) for target, item in self.queue if target != self.step]
        flying = self.running[1] if self.running is not None else None
        self.there, self.todo = set(), list(self.needs)
        for item in self.needs:
            cache = self.cache(item)
            if item in cache:
                cache.move_to_end(item)
                cache[item] = True
                if item != flying:
                    self.there.add(item)
                continue
            self.demand.append(item)
            self.loads += 1
            self.missing[layer, at] += 1
            if self.evict(item, self.step + 1) or self.evict(item, 10**9):
                cache[item] = True
        target = self.step + self.ahead
        if target < self.layers * self.passes:
            aim = target % self.layers
            for one in self.predicted[aim, target // self.layers]:
                item = (aim, int(one))
                if one < 0:
                    continue
                if item in self.cache(item):
                    self.held_for[item] = max(self.held_for.get(item, -1), target)
                elif all(item != queued for _, queued in self.queue):
                    self.queue.append((target, item))
        self.device_free = self.now
        self.begun = False

    def device(self) -> float | None:
        """When the device next ends something, None while it waits for a copy; takes what is there."""
        layer, at = self.step % self.layers, self.step // self.layers
        unit = float(self.costs.expert[layer, at])
        if self.overlap:
            ready = [item for item in self.todo if item in self.there]
        else:
            ready = list(self.todo) if all(item in self.there for item in self.todo) else []
        for item in ready:
            self.todo.remove(item)
            self.device_free = max(self.device_free, self.now) + unit
        return None if self.todo else self.device_free

    def run(self) -> np.ndarray:
        """(layers, passes) when each step ended."""
        router = float(self.costs.dense[0, 0])
        while True:
            # to the router's answer: copies end and begin in between
            while self.running is not None and self.running[0] <= router:
                self.now, item, _ = self.running
                self.running = None
                if self.now < router:
                    self.start()
            self.now = router
            self.answer()
            self.start()
            while (end := self.device()) is None:
                assert self.running is not None
                self.now, item, _ = self.running
                self.running = None
                self.there.add(item)
                self.start()
            self.ends.append(end)
            if len(self.ends) == self.layers * self.passes:
                break
            after = self.step + 1
            layer, at = after % self.layers, after // self.layers
            router = end + float(self.costs.dense[layer, at]) + (float(self.costs.tail[at - 1]) if layer == 0 else 0.0)
        return np.array(self.ends).reshape(self.passes, self.layers).T


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.booleans())
def test_prefetching_equals_events(seed: int, shared: bool, overlap: bool) -> None:
    rng = np.random.default_rng(seed)
    layers, passes, experts = int(rng.integers(1, 5)), int(rng.integers(1, 12)), int(rng.integers(3, 7))
    ids = random_ids(rng, layers, passes, 3, experts)
    costs = random_costs(rng, layers, passes, experts)
    costs.size[:] = rng.integers(5, 90, costs.size.shape)
    ahead = int(rng.integers(1, layers + 1))
    predicted = random_ids(rng, layers, passes, 3, experts)
    right = rng.random((layers, passes)) < 0.6
    predicted[right] = ids[right]
    predicted[rng.random((layers, passes)) < 0.2] = -1
    slots = rng.integers(1, experts + 1, layers)
    room: Any = int(rng.integers(1, layers * experts + 1)) if shared else slots
    found = prefetching(
        workload(ids, experts), costs, predicted=predicted, slots=room, link=LINK, ahead=ahead, shared=shared,
        overlap=overlap,
    )  # fmt: skip
    events = Events(ids, predicted, [room] if shared else [int(one) for one in slots], ahead, shared, costs, overlap)
    ends = events.run()
    mine = np.cumsum((found.seconds + np.where(np.arange(layers)[:, None] == layers - 1, found.tail, 0)).T.ravel())
    mine = mine.reshape(passes, layers).T - np.where(np.arange(layers)[:, None] == layers - 1, found.tail, 0)
    np.testing.assert_allclose(mine, ends, rtol=0, atol=EXACT)
    assert (found.missing == events.missing).all()
    left = sum(float(costs.size[item]) for cache in events.caches for item, used in cache.items() if not used)
    assert found.wasted_bytes == pytest.approx(events.wasted + left)
    assert (found.loads, found.prefetches) == (events.loads, events.prefetches)


def sticky(
    rng: np.random.Generator, *, layers: int, passes: int, experts: int, k: int, keep: float = 0.98
) -> np.ndarray:
    """Selections that follow slowly moving scores, with some experts liked by all tokens."""
    liking = rng.normal(0, 1.0, (layers, experts))
    state = rng.normal(0, 1, (layers, experts))
    ids = np.empty((layers, passes, k), np.int16)
    for at in range(passes):
        state = keep * state + np.sqrt(1 - keep**2) * rng.normal(0, 1, (layers, experts))
        scores = liking + 1.5 * state + 0.5 * rng.normal(0, 1, (layers, experts))
        ids[:, at] = np.argsort(-scores, axis=1)[:, :k]
    return ids


def corrupted(rng: np.random.Generator, ids: np.ndarray, experts: int, accuracy: float) -> np.ndarray:
    """Each id replaced by another, uniformly, with probability 1 - accuracy."""
    wrong = rng.random(ids.shape) >= accuracy
    result: np.ndarray = np.where(wrong, rng.integers(0, experts, ids.shape), ids).astype(np.int16)
    return result


def test_without_predictions_it_is_an_lru_cache() -> None:
    rng = np.random.default_rng(3)
    work = workload(sticky(rng, layers=4, passes=200, experts=16, k=3), 16)
    costs = random_costs(rng, 4, 200, 16)
    missing = np.zeros((4, 200), int)
    for layer in range(4):
        cache: OrderedDict[int, None] = OrderedDict()
        for at, row in enumerate(work.ids[layer]):
            needs = [int(one) for one in row]
            missing[layer, at] = sum(one not in cache for one in needs)
            for one in needs:
                if one not in cache and len(cache) == 6:
                    cache.pop(next(other for other in cache if other not in needs))
                cache[one] = None
                cache.move_to_end(one)
    found = prefetching(work, costs, predicted=None, slots=6, link=LINK)
    assert (found.missing == missing).all() and found.prefetches == 0 and found.wasted_bytes == 0
    plain = timeline(work, outcome_of(work, missing), costs, link=LINK)
    np.testing.assert_allclose(found.seconds, plain.seconds, rtol=0, atol=1e-8)
    np.testing.assert_allclose(found.waiting, plain.waiting, rtol=0, atol=1e-8)
    assert found.hit_rate == pytest.approx(1 - missing.sum() / work.needed.sum())
    assert (found.bytes, found.hits) == (pytest.approx(plain.bytes), plain.hits)


@pytest.mark.parametrize(("size", "slots", "shared"), [(1, 3, False), (1, 20, True), (3, 7, False)])
def test_without_predictions_it_is_the_replay_of_a_run(size: int, slots: int, shared: bool) -> None:
    with store.open_run(SAMPLE) as run:
        work = batched(workload_of(run, max_tokens=6000), size=size)
    shape = (work.num_layers, work.num_passes)
    costs = StepCosts(
        dense=np.full(shape, 1e-4), expert=np.full(shape, 1e-5), tail=np.zeros(shape[1]), size=np.full((6, 16), 1e6)
    )
    outcome = replay(work, policy="lru", slots=slots, shared=shared)
    found = prefetching(work, costs, predicted=None, slots=slots, shared=shared, link=LINK)
    assert (found.missing == outcome.missing).all() and found.hit_rate == pytest.approx(outcome.hit_rate)


def test_imperfect_prefetching_can_lose() -> None:
    """With the same cache, a good prefetcher gains and a poor one is slower than none (a copy cannot be stopped)."""
    rng = np.random.default_rng(0)
    ids = sticky(rng, layers=12, passes=400, experts=64, k=8)
    work = workload(ids, 64)
    costs = StepCosts(
        dense=np.full((12, 400), 80e-6), expert=np.full((12, 400), 12e-6), tail=np.zeros(400),
        size=np.full((12, 64), 2.65e6),
    )  # fmt: skip
    link = Link("pcie4x16", 25.2e9)
    times = {
        accuracy: prefetching(
            work, costs, predicted=corrupted(rng, ids, 64, accuracy) if accuracy else None, slots=16, link=link
        )
        for accuracy in (0.0, 1.0, 0.9, 0.7, 0.5)
    }
    assert times[1.0].total < times[0.9].total < times[0.7].total < times[0.5].total
    assert times[1.0].total < times[0.0].total < times[0.7].total
    assert times[1.0].wasted_bytes == 0 < times[0.9].wasted_bytes < times[0.7].wasted_bytes


def test_a_running_copy_is_not_stopped_and_a_load_overtakes_the_queue() -> None:
    """Step 0 needs 0; for step 1 the experts 1 and 2 are foretold, 3 is needed; every copy takes 1 s."""
    ids = np.array([[[0]], [[3]]], np.int16)
    predicted = np.array([[[-1, -1]], [[1, 2]]], np.int16)
    costs = StepCosts(
        dense=np.array([[0.0], [0.5]]), expert=np.zeros((2, 1)), tail=np.zeros(1), size=np.full((2, 4), 75.0)
    )
    found = prefetching(workload(ids, 4), costs, predicted=predicted, slots=4, link=LINK)
    # 0 arrives at 1 s, then 1 runs until 2 s; the router answers at 1.5 s, takes 2 back, and 3 comes from 2 s to 3 s
    assert found.seconds.ravel().tolist() == [1.0, 2.0]
    assert (found.prefetches, found.dropped, found.loads, found.wasted_bytes) == (1, 1, 2, 75.0)
    costs.dense[1] = 1.0  # the copy ends when the router answers, and 2 has not begun
    tied = prefetching(workload(ids, 4), costs, predicted=predicted, slots=4, link=LINK)
    assert tied.seconds.ravel().tolist() == [1.0, 2.0] and (tied.prefetches, tied.dropped) == (1, 1)
    costs.dense[1] = 0.5
    late = prefetching(
        workload(ids, 4), costs, predicted=predicted + np.int16([[[0, 0]], [[2, 0]]]), slots=4, link=LINK
    )
    assert late.seconds.ravel().tolist() == [1.0, 1.0] and late.late == 1 and late.hits == 1  # 3 is on its way


# --- the bound ---


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_faster_than_the_bound(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = sticky(rng, layers=3, passes=120, experts=10, k=2, keep=0.9)
    work = workload(ids, 10)
    costs = random_costs(rng, 3, 120, 10)
    least = np.array([belady_loads([list(map(int, row)) for row in layer], 4) for layer in ids])
    bound = bound_seconds(work, costs, least=least, link=LINK)
    assert bound >= costs.resident(work.needed).sum()
    for predicted in (None, ids, corrupted(rng, ids, 10, 0.6)):
        for ahead in (1, 2):
            found = prefetching(work, costs, predicted=predicted, slots=4, link=LINK, ahead=ahead)
            assert found.total >= bound - EXACT
    lru = prefetching(work, costs, predicted=None, slots=4, link=LINK)
    for fallback in ("faster", "cpu", "split"):
        mixed = timeline(work, outcome_of(work, lru.missing), costs, link=LINK, fallback=fallback)
        assert mixed.total >= bound_seconds(work, costs, least=least, link=LINK, fallback=fallback) - EXACT


def belady_loads(steps: list[list[int]], slots: int) -> int:
    """Loads of the best cache that need not admit what it serves: after each step it keeps what is used soonest."""
    held: set[int] = set()
    loads = 0
    for at, needs in enumerate(steps):
        loads += len(set(needs) - held)
        later = {
            one: next((when for when in range(at + 1, len(steps)) if one in steps[when]), len(steps))
            for one in held | set(needs)
        }
        held = set(sorted(later, key=lambda one: (later[one], one))[:slots])
    return loads


# --- refusals ---


def test_what_cannot_be_timed_is_refused() -> None:
    work = workload(np.array([[[0, 1]], [[1, 2]]], np.int16), 3)
    costs = StepCosts(dense=np.zeros((2, 1)), expert=np.ones((2, 1)), tail=np.zeros(1), size=np.ones((2, 3)))
    outcome = outcome_of(work, np.ones((2, 1), int))
    with pytest.raises(PlanError, match=r"the replay has \(1, 1\) layers and passes"):
        timeline(work, outcome_of(work, np.ones((1, 1), int)), costs, link=LINK)
    with pytest.raises(PlanError, match="needs the CPU's seconds"):
        timeline(work, outcome, costs, link=LINK, fallback="cpu")
    with pytest.raises(PlanError, match="no fallback 'gpu'; there are link, faster, cpu, split"):
        timeline(work, outcome, costs, link=LINK, fallback="gpu")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="no disk is given"):
        timeline(work, outcome, costs, link=LINK, from_disk=np.ones((2, 1), int))
    with pytest.raises(PlanError, match="0 slots"):
        prefetching(work, costs, predicted=None, slots=0, link=LINK)
    with pytest.raises(PlanError, match="between 1 and the 2 layers"):
        prefetching(work, costs, predicted=None, slots=1, link=LINK, ahead=3)
    with pytest.raises(PlanError, match="expert 7 is predicted"):
        prefetching(work, costs, predicted=np.full((2, 1, 1), 7), slots=1, link=LINK)
    with pytest.raises(PlanError, match="'expert' must be finite"):
        StepCosts(dense=np.zeros(1), expert=np.array([np.nan]), tail=np.zeros(1), size=np.ones((1, 1)))
