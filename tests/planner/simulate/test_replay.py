"""Replays against the stack kernel, published values, libcachesim, and what must hold for every policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moescope.errors import PlanError
from planner.simulate.bounds import bounds
from planner.simulate.outcome import Outcome
from planner.simulate.policies import POLICIES
from planner.simulate.replay import replay, residency
from planner.simulate.workload import Workload, batched, decode, prefill
from profiler.metrics.cache_hit_rate import hit_rate_curve
from tests.planner.simulate.set_caches import fewest_misses, random_workload, steps_of

REFERENCE = Path(__file__).parents[2] / "reference"
TRACES = ["trace-8x2", "trace-16x2", "trace-32x4"]
PER_LAYER = [one.name for one in POLICIES]
SHARED = [one.name for one in POLICIES if one.name not in ("mixtral_offloading", "fate")]
STACK = {"lru": "lru", "lfu": "lfu", "min_set": "belady"}


def reference(name: str) -> tuple[NDArray[Any], int]:
    with np.load(REFERENCE / f"{name}.npz") as archive:
        experts = archive["experts"]
    return experts, json.loads((REFERENCE / f"{name}.json").read_text())["shape"]["num_experts"]


def served(work: Workload, policy: str, slots: int, *, shared: bool = False, **options: Any) -> Outcome:
    """A replay with what fitted policies need."""
    return replay(work, policy=policy, slots=slots, shared=shared, train=work, **options)


class TestAgainstTheStackKernel:
    @pytest.mark.parametrize("policy", STACK)
    def test_every_size_cold(self, policy: str) -> None:
        experts, num_experts = reference("trace-16x2")
        clean = hit_rate_curve(
            selections=experts, num_experts=num_experts, policy=STACK[policy], compulsory_free=False, convention="clean"
        )  # type: ignore[call-overload]
        work = decode(selections=experts, num_experts=num_experts)
        for slots in range(2, num_experts + 1):
            done = served(work, policy, slots, warm=False)
            np.testing.assert_allclose(done.per_layer(), clean[:, slots - 1], atol=1e-14)

    @pytest.mark.parametrize("policy", STACK)
    def test_warm_and_shared(self, policy: str) -> None:
        experts, num_experts = reference("trace-8x2")
        layers, sequences, tokens, k = experts.shape
        assert (experts >= 0).all()  # so that the sequences can be joined without gaps
        joined = experts.reshape(layers, 1, sequences * tokens, k)
        clean = hit_rate_curve(
            selections=joined, num_experts=num_experts, policy=STACK[policy], compulsory_free=False, convention="clean",
            shared=True,
        )  # type: ignore[call-overload]  # fmt: skip
        work = decode(selections=experts, num_experts=num_experts)
        for slots in range(2, layers * num_experts + 1):
            done = served(work, policy, slots, shared=True)
            assert done.hit_rate == pytest.approx(clean[slots - 1], abs=1e-14)


@pytest.mark.parametrize("name", TRACES)
def test_published_lru_hit_rates(name: str) -> None:
    """The published harness serves a token's experts one by one; from k slots on LRU then holds the same experts.

    It counts a first use as a hit while the cache is not full, and takes the mean over sequences. Its LFU and Belady
    may evict what the token itself still needs, which no replay here does: they have no counterpart.
    """
    experts, num_experts = reference(name)
    published = json.loads((REFERENCE / f"{name}.json").read_text())["cache_hit_rate"]["lru"]["layer"]
    work = decode(selections=experts, num_experts=num_experts)
    k = experts.shape[-1]
    for slots in range(k, num_experts + 1, 3):
        done = served(work, "lru", slots, warm=False)
        free = np.minimum(distinct(work), slots)
        rates = (done.hits + free) / done.uses
        np.testing.assert_allclose(rates.mean(axis=0), np.array(published)[:, slots - 1], atol=1e-6)


@pytest.mark.parametrize("name", TRACES)
def test_published_lru_hit_rates_of_a_shared_cache(name: str) -> None:
    """The published harness looks a token up in all layers together: one step of L * k experts."""
    experts, num_experts = reference(name)
    published = json.loads((REFERENCE / f"{name}.json").read_text())["cache_hit_rate"]["lru"]["shared"]
    layers, sequences, tokens, k = experts.shape
    objects = experts + num_experts * np.arange(layers)[:, None, None, None]
    together = objects.transpose(1, 2, 0, 3).reshape(1, sequences, tokens, layers * k)
    work = decode(selections=together, num_experts=layers * num_experts)
    for slots in range(layers * k, layers * num_experts + 1, 5):
        done = served(work, "lru", slots, warm=False)
        rates = (done.hits + np.minimum(distinct(work), slots)) / done.uses
        assert rates.mean() == pytest.approx(published[slots - 1], abs=1e-6)


def distinct(work: Workload) -> NDArray[np.int64]:
    """(requests, layers) different experts that each request used."""
    spans = [slice(*work.offsets[one : one + 2]) for one in range(work.num_requests)]
    return np.array([[len(np.unique(ids[ids >= 0])) for ids in work.ids[:, span]] for span in spans])


@pytest.mark.parametrize(
    ("policy", "theirs"), [("lru", "LRU"), ("lfu_in_cache", "LFU"), ("arc", "ARC"), ("min_set", "Belady")]
)
def test_libcachesim_where_one_expert_is_a_step(policy: str, theirs: str) -> None:
    libcachesim = pytest.importorskip("libcachesim", reason="an oracle that nobody needs to install")
    generator = np.random.default_rng(1)
    stream = generator.choice(40, 3000, p=generator.dirichlet(np.full(40, 0.5))).tolist()
    for at in range(1, len(stream)):
        if generator.random() < 0.3:
            stream[at] = stream[generator.integers(max(0, at - 20), at)]
    again, following = [0] * len(stream), dict.fromkeys(stream, 2**62)
    for at in range(len(stream) - 1, -1, -1):
        again[at], following[stream[at]] = following[stream[at]], at
    work = decode(selections=np.array(stream)[None, None, :, None], num_experts=40)
    for slots in (3, 5, 8, 16, 25):
        cache = getattr(libcachesim, theirs)(cache_size=slots, hashpower=12)
        hits = [
            cache.get(libcachesim.Request(obj_size=1, obj_id=item + 1, clock_time=at, next_access_vtime=again[at]))
            for at, item in enumerate(stream)
        ]
        assert served(work, policy, slots).hits.sum() == sum(hits), slots


class TestBounds:
    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 10**6), st.booleans(), st.booleans())
    def test_min_set_is_the_curve_of_all_sizes(self, seed: int, shared: bool, warm: bool) -> None:
        work = random_workload(seed)
        curve = bounds(work, names=["min_set"], shared=shared, warm=warm)["min_set"]
        for slots in range(2, curve.hits.shape[-1] + 1):
            done = served(work, "min_set", slots, shared=shared, warm=warm)
            assert done.hits.sum() == curve.hits[..., slots - 1].sum()

    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 10**6), st.integers(2, 4))
    def test_min_set_loads_least_of_all_that_could_be_done(self, seed: int, slots: int) -> None:
        work = random_workload(seed, tokens=6)
        done = served(work, "min_set", slots)
        for layer, requests in enumerate(steps_of(work, shared=False)):
            steps = [step for request in requests for step in request]
            assert done.missing[layer].sum() == fewest_misses(steps, slots, bypass=False)

    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 10**6), st.integers(0, 2))
    def test_where_no_step_fits_it_is_the_bound_that_admits_what_it_likes(self, seed: int, slots: int) -> None:
        work = random_workload(seed, tokens=6, k=3, ragged=False)
        done = served(work, "min_set", slots)
        for layer, requests in enumerate(steps_of(work, shared=False)):
            steps = [step for request in requests for step in request]
            assert done.missing[layer].sum() == fewest_misses(steps, slots, bypass=True)

    @pytest.mark.parametrize("shared", [False, True])
    def test_nothing_beats_it(self, shared: bool) -> None:
        for seed in range(4):
            work = random_workload(seed, tokens=30, k=3)
            for slots in (1, 3, 4, 5) if not shared else (3, 4, 7, 10):
                best = served(work, "min_set", slots, shared=shared).missing.sum()
                for policy in SHARED if shared else PER_LAYER:
                    if (policy == "fate" and slots < 3) or policy == "static":  # static starts full, and admits nothing
                        continue
                    assert served(work, policy, slots, shared=shared).missing.sum() >= best, policy

    def test_with_room_for_one_token_nothing_is_to_be_chosen(self) -> None:
        experts, num_experts = reference("trace-32x4")
        work = decode(selections=experts, num_experts=num_experts)
        best = served(work, "min_set", 4)
        for policy in [name for name in PER_LAYER if name != "static"]:
            assert (served(work, policy, 4).missing == best.missing).all(), policy

    def test_foresight_narrows_the_gap(self) -> None:
        experts, num_experts = reference("trace-32x4")
        work = decode(selections=experts, num_experts=num_experts)
        for shared, slots in ((False, 8), (True, 20)):
            loads = [
                int(served(work, "window", slots, shared=shared, foresight=passes).missing.sum())
                for passes in (0, 1, 4, 16, work.num_passes)
            ]
            assert loads == sorted(loads, reverse=True)
            assert loads[0] == served(work, "lru", slots, shared=shared).missing.sum()
            assert loads[-1] == served(work, "min_set", slots, shared=shared).missing.sum() < loads[0]


class TestEveryPolicy:
    @pytest.mark.parametrize("policy", PER_LAYER)
    def test_room_for_all_leaves_first_uses_only(self, policy: str) -> None:
        work = random_workload(1, tokens=20)
        done = served(work, policy, 6)
        first = sum(len(np.unique(ids[ids >= 0])) for ids in work.ids)
        assert done.missing.sum() == (0 if policy == "static" else first)
        assert served(work, policy, 60).slots == done.slots == 12

    @pytest.mark.parametrize("policy", [name for name in PER_LAYER if name != "fate"])
    def test_no_slots_hit_nothing(self, policy: str) -> None:
        work = random_workload(1, tokens=20)
        done = served(work, policy, 0)
        assert (done.missing == work.needed).all() and done.hits.sum() == 0
        assert done.overflow == (work.needed > 0).sum()
        assert done.stalled_share == 1

    @pytest.mark.parametrize("shared", [False, True])
    def test_stack_policies_gain_by_every_slot(self, shared: bool) -> None:
        work = random_workload(7, tokens=40, sequences=4)
        for policy in ("lru", "lfu", "weighted", "static", "window", "min_set"):
            sizes = range(2, 13 if shared else 7)
            loads = [int(served(work, policy, slots, shared=shared).missing.sum()) for slots in sizes]
            assert loads == sorted(loads, reverse=True), policy

    @pytest.mark.parametrize("policy", SHARED)
    def test_a_shared_cache_of_one_layer_is_a_cache_of_its_own(self, policy: str) -> None:
        work = random_workload(9, layers=1, tokens=40)
        for slots in (2, 3, 5):
            own, shared = served(work, policy, slots), served(work, policy, slots, shared=True)
            assert (own.missing == shared.missing).all()

    @pytest.mark.parametrize("policy", PER_LAYER)
    def test_a_cold_cache_serves_every_request_as_if_it_were_alone(self, policy: str) -> None:
        work = random_workload(11, sequences=4, tokens=15)
        done = replay(work, policy=policy, slots=3, warm=False, train=work)
        alone = [replay(work.requests([one]), policy=policy, slots=3, train=work) for one in range(4)]
        assert done.missing.tolist() == np.concatenate([one.missing for one in alone], axis=1).tolist()
        assert done.hits.tolist() == np.concatenate([one.hits for one in alone]).tolist()

    @pytest.mark.parametrize("policy", PER_LAYER)
    def test_it_gives_the_same_twice(self, policy: str) -> None:
        work = random_workload(13, tokens=20)
        first, second = served(work, policy, 3), served(work, policy, 3)
        assert (first.missing == second.missing).all()

    @pytest.mark.parametrize("policy", [name for name in PER_LAYER if name != "fate"])  # which splits them itself
    def test_layers_of_different_sizes(self, policy: str) -> None:
        work = random_workload(15, tokens=20)
        done = replay(work, policy=policy, layer_slots=[2, 5], train=work)
        for layer, slots in enumerate((2, 5)):
            assert (done.missing[layer] == served(work, policy, slots).missing[layer]).all()


class TestOutcome:
    def test_sums_are_of_the_steps(self) -> None:
        work = random_workload(2, tokens=20, sequences=4)
        done = served(work, "lru", 2)
        owner = work.request_of_pass
        for request, layer in np.ndindex(4, 2):
            mine = owner == request
            missing, needed = done.missing[layer, mine].astype(int), work.needed[layer, mine]
            assert done.uses[request, layer] == needed.sum()
            assert done.hits[request, layer] == (needed - missing).sum()
            assert done.stalled[request, layer] == (missing > 0).sum()
            assert done.steps[request, layer] == (needed > 0).sum()
        assert done.missing.dtype == np.uint16 and done.slots == 4 and done.overflow == 0

    def test_steps_that_need_more_than_there_is_are_counted_and_keep_what_fits(self) -> None:
        ids = np.array([[[[0, 1, 2], [0, 1, 2], [2, 1, 0], [3, -1, -1]]]])
        done = served(decode(selections=ids, num_experts=4), "lru", 2)
        assert done.missing.tolist() == [[3, 1, 1, 1]]  # 0 and 1 were admitted first, and stay: all slots are pinned
        assert done.overflow == 3
        batch = prefill(random_workload(3, tokens=30, k=3), chunk=10)
        each = served(batch, "lru", 3)
        assert each.overflow == (batch.needed > 3).sum() > 0
        together = served(batch, "lru", 3, shared=True)
        assert together.overflow == (batch.needed > 3).sum()

    def test_a_batch_loads_what_it_needs_once(self) -> None:
        work = random_workload(4, tokens=30, sequences=4)
        done = served(batched(work, size=4), "lru", 6)
        assert done.missing.sum() == sum(len(np.unique(ids[ids >= 0])) for ids in work.ids)

    def test_residency_of_a_stretch(self) -> None:
        work = random_workload(5, tokens=30)
        for policy in SHARED:
            for shared in (False, True):
                done = served(work, policy, 4, shared=shared)
                there = residency(work, policy=policy, slots=4, shared=shared, passes=range(3, 9), train=work)
                assert there.shape == (2, 6, 2)
                assert (there.sum(axis=2) == (work.needed - done.missing)[:, 3:9]).all(), policy
                assert not there[work.ids[:, 3:9] < 0].any()


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"policy": "lruu", "slots": 3}, "did you mean 'lru'"),
            ({"policy": "lru"}, "takes slots"),
            ({"policy": "lru", "slots": -1}, "a cache of -1 slots cannot be"),
            ({"policy": "lru", "slots": 3, "foresight": 2}, "policy 'lru' has no parameter 'foresight'; it takes none"),
            ({"policy": "hobbit", "slots": 3, "weight": 1}, "it takes weights, distance, thresholds, narrow_slots"),
            ({"policy": "lru", "layer_slots": [1]}, "layer_slots has 1 entries; the workload has 2 MoE layers"),
            ({"policy": "lru", "layer_slots": [1, 1], "slots": 3}, "leave the others out"),
            ({"policy": "static", "slots": 3}, "give a training workload"),
            ({"policy": "static", "slots": 3, "placement": "hot"}, "placement is 'hot'"),
            ({"policy": "moe_infinity", "slots": 3}, "give a training workload"),
            ({"policy": "moe_infinity", "slots": 3, "behaviour": "paper"}, "'priority' or 'released'"),
            ({"policy": "mixtral_offloading", "slots": 3, "shared": True}, "ask for 'lru'"),
            ({"policy": "mixtral_offloading", "slots": 3, "offload_per_layer": 9}, "a layer has 6 experts"),
            ({"policy": "fate", "slots": 3, "shared": True}, "caches per layer"),
            ({"policy": "fate", "slots": 3, "eviction": "lfu"}, "fate takes 'arc' or 'lru'"),
            ({"policy": "edgemoe", "slots": 3, "distance": "paper"}, "'corrected' or 'printed'"),
            ({"policy": "window", "slots": 3, "foresight": -1}, "at least 0"),
            ({"policy": "hobbit", "slots": 3, "weights": (1, 1, 0, 0)}, "sum to 1"),
            ({"policy": "hobbit", "slots": 3, "distance": "printed"}, "'corrected' or 'paper'"),
            ({"policy": "hobbit", "slots": 3, "thresholds": (0.9, 0.6), "narrow_slots": 1}, "must ascend within 0..1"),
            ({"policy": "hobbit", "slots": 3, "thresholds": (0.6, 0.9)}, "give narrow_slots"),
        ],
    )
    def test_in_one_line(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(PlanError, match=message.replace("(", r"\(")) as caught:
            replay(random_workload(1), **options)
        assert "\n" not in str(caught.value)

    def test_thresholds_without_gate_weights_or_of_several_tokens(self) -> None:
        options: dict[str, Any] = {"policy": "hobbit", "slots": 3, "thresholds": (0.6, 0.9), "narrow_slots": 1}
        bare = decode(selections=np.array([[[[0, 1]]]]), num_experts=2)
        with pytest.raises(PlanError, match="the trace has none"):
            replay(bare, **options)
        with pytest.raises(PlanError, match="passes hold several"):
            replay(batched(random_workload(1), size=2), **options)

    def test_training_on_another_model(self) -> None:
        with pytest.raises(PlanError, match="take both from one model"):
            replay(random_workload(1), policy="lru", slots=3, train=random_workload(1, experts=7))

    @pytest.mark.parametrize("passes", [range(3, 99), range(4, 2), range(0, 4, 2)])
    def test_a_stretch_outside_the_workload(self, passes: range) -> None:
        with pytest.raises(PlanError, match="no stretch"):
            residency(random_workload(1), policy="lru", slots=3, passes=passes)
