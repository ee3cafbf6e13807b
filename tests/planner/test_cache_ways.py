"""Ways to serve against replays, plain Python and figures by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cache_settings import drawn_setting, setting_for, slow_machine
from hypothesis import given, settings
from hypothesis import strategies as st
from workloads import drawn_workload, of_selections

from moescope.errors import PlanError
from planner.cache.bound import Bound
from planner.cache.setting import Setting
from planner.cache.ways import WAYS, Served, Way, _even, most_used, serve, way_of
from planner.simulate.replay import replay
from planner.simulate.workload import Workload

LAYERS, EXPERTS = 3, 6
SLOTS = 9


def _per_request(work: Workload, values: np.ndarray) -> np.ndarray:
    """(requests, layers) sums of (layers, passes)."""
    spans = zip(work.offsets[:-1], work.offsets[1:], strict=True)
    return np.array([values[:, first:last].sum(axis=1) for first, last in spans])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["lru", "lru_split", "lfu", "lru_shared"])
def test_caches_are_those_of_the_replay(name: str, seed: int) -> None:
    setting = drawn_setting(seed)
    served = serve(setting, way_of(name), slots=SLOTS)
    policy = "lfu" if name == "lfu" else "lru"
    if name == "lru_shared":
        other = replay(setting.test, policy=policy, slots=SLOTS, shared=True)
    else:
        assert served.layer_slots.sum() == SLOTS
        other = replay(setting.test, policy=policy, layer_slots=served.layer_slots.tolist())
    for what in ("uses", "hits", "stalled", "steps", "missing"):
        np.testing.assert_array_equal(getattr(served.outcome, what), getattr(other, what), err_msg=what)
    assert served.outcome.overflow == other.overflow
    assert served.clock.hit_rate == served.outcome.hit_rate


@pytest.mark.parametrize("seed", range(4))
def test_static_sets_hit_what_they_hold(seed: int) -> None:
    setting = drawn_setting(seed)
    served = serve(setting, way_of("static_cpu"), slots=SLOTS)
    assert served.pinned.sum() == served.layer_slots.sum() == SLOTS
    hits = np.zeros((LAYERS, setting.test.num_passes), np.int64)
    for layer in range(LAYERS):
        for at, ids in enumerate(setting.test.ids[layer]):
            hits[layer, at] = sum(bool(served.pinned[layer, one]) for one in ids if one >= 0)
    np.testing.assert_array_equal(served.outcome.hits, _per_request(setting.test, hits))
    other = replay(setting.test, policy="static", layer_slots=served.layer_slots.tolist(), train=setting.train)
    np.testing.assert_array_equal(served.outcome.hits, other.hits)


def _half_pinned(setting: Setting, served: Served) -> np.ndarray:
    """(layers, passes) misses: pinned experts always hit, the others go through an LRU list."""
    work = setting.test
    missing = np.zeros((work.num_layers, work.num_passes), np.int64)
    for layer in range(work.num_layers):
        pinned = set(np.flatnonzero(served.pinned[layer]).tolist())
        room, held = int(served.layer_slots[layer]) - len(pinned), []  # the oldest first
        for at, row in enumerate(work.ids[layer].tolist()):
            needed = [one for one in row if one >= 0 and one not in pinned]
            missing[layer, at] = sum(one not in held for one in needed)
            others = [one for one in held if one not in needed]
            held = [*others[max(len(others) + len(needed) - room, 0) :], *needed]
    return missing


@pytest.mark.parametrize("seed", range(6))
def test_half_pinned_caches_by_hand(seed: int) -> None:
    setting = drawn_setting(seed, experts=8)
    for slots in (8, 11, 14, 20):
        served = serve(setting, way_of("half_pinned"), slots=slots)
        assert served.layer_slots.sum() == slots
        assert served.pinned.sum() == min(slots // 2, slots - 2 * LAYERS)
        np.testing.assert_array_equal(served.outcome.missing, _half_pinned(setting, served))


@pytest.mark.parametrize("name", ["layers_cpu", "layers_load"])
def test_layers_are_there_as_a_whole_or_not_at_all(name: str) -> None:
    size = np.full((LAYERS, EXPERTS), 1e6)
    size[1, 3:] = 0  # layer 1 has three experts
    ids = np.stack([np.argsort(np.random.default_rng(at).random((4, 10, count)), axis=-1)[..., :2]
                    for at, count in enumerate((6, 3, 6))])  # fmt: skip
    work = of_selections(ids, EXPERTS)
    for slots, wanted in ((0, [0, 0, 0]), (5, [0, 0, 0]), (6, [6, 0, 0]), (8, [6, 0, 0]), (9, [6, 3, 0]),
                          (14, [6, 3, 0]), (15, [6, 3, 6])):  # fmt: skip
        served = serve(setting_for(work, work, size=size), way_of(name), slots=slots)
        assert served.layer_slots.tolist() == wanted
        there = np.array(wanted) > 0
        assert (served.outcome.missing[there] == 0).all()
        np.testing.assert_array_equal(served.outcome.missing[~there], work.needed[~there])


@given(slots=st.integers(0, 60), most=st.lists(st.integers(0, 12), min_size=1, max_size=6))
def test_slots_are_shared_out_evenly(slots: int, most: list[int]) -> None:
    given_ = _even(slots, np.array(most))
    assert given_.sum() == min(slots, sum(most))
    assert (given_ <= most).all()
    # Layers with room have as many as any other, but for what does not divide.
    assert (given_[given_ < most] >= given_.max() - 1).all()


def test_the_most_used_experts_are_counted_on_the_training_requests() -> None:
    train = of_selections([[[[0, 1], [0, 2]]], [[[3, 1], [3, 0]]]], 4)
    test = of_selections([[[[2, 3]]], [[[2, 3]]]], 4)
    setting = setting_for(train, test)
    assert np.argwhere(most_used(setting, 2)).tolist() == [[0, 0], [1, 3]]
    # Of those used once each, the first layer's come first, in order of their ids.
    assert np.argwhere(most_used(setting, 5)).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 3]]
    size = np.ones((2, 4))
    size[0, 3] = 0
    few = setting_for(train, test, size=size)
    assert most_used(few, 8).sum() == most_used(few, 7).sum() == 7
    assert not most_used(few, 8)[0, 3]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_with_room_for_all_only_first_uses_miss(way: Way) -> None:
    setting = drawn_setting(3)
    served = serve(setting, way, slots=LAYERS * EXPERTS)
    used = sum(len(np.unique(layer)) for layer in setting.test.ids)
    if way.policy == "static":
        assert served.outcome.missing.sum() == 0
        assert served.ms == pytest.approx(served.clock.resident_ms, rel=1e-12)
    elif way.pinned:
        free = sum(len(set(np.unique(setting.test.ids[layer]).tolist()) - set(np.flatnonzero(served.pinned[layer])))
                   for layer in range(LAYERS))  # fmt: skip
        assert served.outcome.missing.sum() == free < used
    else:
        assert served.outcome.missing.sum() == used


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
@pytest.mark.parametrize("seed", range(3))
def test_disks_never_save_time(way: Way, seed: int) -> None:
    setting = drawn_setting(seed)
    plain = serve(setting, way, slots=SLOTS)
    disk = np.random.default_rng(seed).random((LAYERS, EXPERTS)) < 0.3
    found = serve(setting, way, slots=SLOTS, disk=disk)
    assert (found.clock.pass_seconds >= plain.clock.pass_seconds - 1e-15).all()
    assert found.ms > plain.ms  # of so many experts, some are missing
    np.testing.assert_array_equal(found.outcome.missing, plain.outcome.missing)
    if way.policy == "static":  # what lies on disk is on the device, too
        assert serve(setting, way, slots=SLOTS, disk=plain.pinned).ms == plain.ms
    assert serve(setting, way, slots=SLOTS, disk=np.zeros_like(disk)).ms == plain.ms


def test_an_expert_on_disk_is_read_before_it_is_copied_or_run() -> None:
    work = of_selections([[[[0, 1]]]], 2)
    # 1 MB: 1 microsecond on the device, 1 ms over the link, 2 ms on the CPU, 10 ms from disk.
    machine = slow_machine(link=1e9, cpu=0.5e9)
    setting = setting_for(work, work, machine=machine, size=1e6)
    disk = np.array([[False, True]])
    held = way_of("static_cpu")
    assert serve(setting, held, slots=1).ms == pytest.approx(2.0, rel=1e-12)
    assert serve(setting, held, slots=1, disk=disk).ms == pytest.approx(10.0 + 2.0, rel=1e-12)
    moved = replace(held, misses="load")
    assert serve(setting, moved, slots=1).ms == pytest.approx(1.0 + 1e-3, rel=1e-12)
    assert serve(setting, moved, slots=1, disk=disk).ms == pytest.approx(10.0 + 1.0 + 1e-3, rel=1e-12)


def test_disks_that_cannot_be_are_refused() -> None:
    setting = drawn_setting(0)
    disk = np.ones((LAYERS, EXPERTS), np.bool_)
    with pytest.raises(PlanError, match="prefetching from disk is not simulated"):
        serve(setting, replace(way_of("lru"), prefetch="popularity"), slots=SLOTS, disk=disk)
    without = replace(setting, machine=replace(setting.machine, disk=None))
    with pytest.raises(PlanError, match="no disk is given"):
        serve(without, way_of("lru"), slots=SLOTS, disk=disk)
    serve(without, way_of("lru"), slots=SLOTS, disk=~disk)  # nothing on it


@pytest.mark.parametrize("name", ["popularity", "transitions"])
@pytest.mark.parametrize("batch", [1, 3])
def test_hits_with_prefetching_are_those_of_its_clock(name: str, batch: int) -> None:
    setting = drawn_setting(5, batch=batch, experts=12, requests=6)
    way = replace(way_of("lru"), name=f"lru+{name}", prefetch=name)  # type: ignore[arg-type]
    served = serve(setting, way, slots=8 * LAYERS)
    np.testing.assert_array_equal(served.outcome.missing, served.clock.missing)
    assert served.outcome.hit_rate == pytest.approx(served.clock.hit_rate, rel=1e-12)
    assert served.clock.prefetches > 0
    plain = serve(setting, way_of("lru"), slots=8 * LAYERS)
    assert served.outcome.hits.sum() != plain.outcome.hits.sum()  # and not those of LRU alone


def test_ways_are_asked_for_by_name() -> None:
    assert [way_of(one.name) for one in WAYS] == list(WAYS)
    with pytest.raises(PlanError, match="no way to serve 'fifo'; there are layers_cpu"):
        way_of("fifo")


# --- intervals and domains ---


def test_intervals_hold_the_estimate_and_are_the_same_each_time() -> None:
    served = serve(drawn_setting(1, requests=30, length=6), way_of("lru"), slots=SLOTS)
    low, high = served.interval(seed=4)
    assert low < served.ms < high
    assert served.interval(seed=4) == (low, high) != served.interval(seed=5)
    wide = served.interval(seed=4, coverage=0.99)
    assert wide[0] < low and high < wide[1]
    hit_low, hit_high = served.hit_interval(seed=4)
    assert hit_low < served.outcome.hit_rate < hit_high


def test_intervals_are_those_of_a_plain_bootstrap() -> None:
    """Within each domain, whole requests drawn with replacement."""
    test = replace(drawn_workload(7, requests=12, length=5, skew=0.4), domains=tuple("aab" * 4))
    served = serve(setting_for(drawn_workload(6), test), way_of("lru"), slots=SLOTS)
    generator = np.random.default_rng(0)
    groups = [[at for at, name in enumerate(test.domains) if name == one] for one in "ab"]
    found = []
    for _ in range(4000):
        drawn = np.concatenate([generator.choice(group, len(group)) for group in groups])
        found.append(1e3 * served.request_seconds[drawn].sum() / served.request_tokens[drawn].sum())
    low, high = served.interval(resamples=4000)
    width = high - low
    assert low == pytest.approx(np.quantile(found, 0.025), abs=0.06 * width)
    assert high == pytest.approx(np.quantile(found, 0.975), abs=0.06 * width)


def test_intervals_shrink_with_more_requests() -> None:
    widths = []
    for requests in (8, 32, 128):
        served = serve(drawn_setting(2, requests=requests, length=8), way_of("lru"), slots=SLOTS)
        low, high = served.interval()
        widths.append(high - low)
    assert widths[0] > 1.4 * widths[1] > 1.4 * 1.4 * widths[2]  # about 2 times each: the root of 4


def test_domains_of_one_request_each_still_vary() -> None:
    test = replace(drawn_workload(7, requests=4), domains=("a", "b", "c", "d"))
    served = serve(setting_for(drawn_workload(6), test), way_of("lru"), slots=SLOTS)
    low, high = served.interval()
    assert high > low


@pytest.mark.parametrize("name", ["lru", "static_cpu", "lru_shared"])
def test_domains_add_up_to_the_whole(name: str) -> None:
    test = replace(drawn_workload(7, requests=5), domains=("a", "b", "a", "c", "b"))
    served = serve(setting_for(drawn_workload(6), test), way_of(name), slots=SLOTS)
    found = served.by_domain()
    assert list(found) == ["a", "b", "c"]
    tokens = {"a": 20, "b": 20, "c": 10}
    assert sum(tokens[one] * ms for one, (_, ms) in found.items()) / 50 == pytest.approx(served.ms, rel=1e-12)
    hits = sum(tokens[one] * rate for one, (rate, _) in found.items()) / 50
    assert hits == pytest.approx(served.outcome.hit_rate, rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), slots=st.integers(0, 18), name=st.sampled_from([way.name for way in WAYS]))
def test_no_cache_holds_more_than_it_is_given(seed: int, slots: int, name: str) -> None:
    """Of layers of different sizes, too, and at sizes that cannot hold one step."""
    way = way_of(name)
    size = np.full((LAYERS, EXPERTS), 1e6)
    size[2, 4:] = 0
    ids = np.stack([np.argsort(np.random.default_rng([seed, at]).random((3, 6, count)), axis=-1)[..., :2]
                    for at, count in enumerate((6, 6, 4))])  # fmt: skip
    work = of_selections(ids, EXPERTS)
    setting = setting_for(work, work, size=size)
    slots = min(slots, setting.all_slots)
    if way.split == "fitted" and way.policy != "static" and slots < setting.least_slots:
        with pytest.raises(PlanError, match="slots cannot be split"):
            serve(setting, way, slots=slots)
        return
    served = serve(setting, way, slots=slots)
    assert served.layer_slots.sum() <= slots
    assert (served.layer_slots <= (size > 0).sum(axis=1)).all()
    assert (served.pinned.sum(axis=1) <= served.layer_slots).all()
    assert not served.pinned[size == 0].any()
    if way.scope == "layer" and way.policy != "static" and slots >= setting.least_slots:
        assert served.layer_slots.sum() == slots


@pytest.mark.parametrize("name", ["static_cpu", "half_pinned"])
def test_what_is_missing_takes_as_long_as_its_own_width_does(name: str) -> None:
    """Experts that stay on the device are four times as large as the others, which alone are copied or left to it."""
    even = drawn_setting(3)
    pinned = serve(even, way_of(name), slots=SLOTS).pinned
    size = np.where(pinned, 1e6, 0.25e6)
    setting = drawn_setting(3, size=size)
    served = serve(setting, way_of(name), slots=SLOTS)
    np.testing.assert_array_equal(served.pinned, pinned)
    missing = served.outcome.missing
    if name == "static_cpu":  # 1 TB/s on the device, 1 GB/s on the CPU
        device, cpu = (setting.test.needed - missing) * 1e6 / 1e12, missing * 0.25e6 / 1e9
        np.testing.assert_allclose(served.clock.seconds, np.maximum(device, cpu), rtol=1e-9)
    else:  # what was cached and evicted is narrow, too
        assert served.clock.bytes == pytest.approx(0.25e6 * missing.sum(), rel=1e-12)
    assert Bound.of(setting).ms(SLOTS) <= served.ms


def test_prefetching_is_for_lru_caches_per_layer_without_pins() -> None:
    assert {way.name for way in WAYS if way.can_prefetch} == {"lru", "lru_split"}
