"""SCH, LRU, LFU and Belady against published values, by hand, and by simulating every cache on its own."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_values import NAMES, reference
from simulators import cache_hits, random_selections, streams

from moescope.errors import MetricError
from profiler.metrics._intervals import resample_weights
from profiler.metrics.local_consistency import (
    CachePolicy,
    Convention,
    hit_rate_bootstrap,
    hit_rate_curve,
    slots_at_ratio,
)

CURVES: list[tuple[CachePolicy, int | None]] = [("sch", 1), ("sch", 3), ("lru", None), ("lfu", None), ("belady", None)]
BY_HAND = {  # requests: {(policy, m): hits for 1, 2, 3, 4 slots}
    "one expert per token": (
        [[0], [1], [2], [0], [1], [3], [0], [2]],
        {
            ("sch", 1): [1, 2, 6, 8],
            ("sch", 2): [1, 4, 6, 8],
            ("sch", 4): [1, 4, 7, 8],
            ("sch", 8): [1, 4, 7, 8],
            ("lru", None): [1, 2, 6, 8],
            ("lfu", None): [1, 2, 6, 8],
            ("belady", None): [1, 4, 7, 8],
        },
    ),
    "two experts per token": (
        [[0, 1], [0, 2], [1, 2], [3, 0], [0, 1], [2, 3]],
        {
            ("sch", 1): [3, 5, 9, 12],
            ("sch", 2): [3, 7, 10, 12],
            ("sch", 4): [3, 6, 10, 12],
            ("sch", 8): [3, 6, 10, 12],
            ("lru", None): [3, 5, 9, 12],
            ("lfu", None): [3, 5, 10, 12],
            ("belady", None): [3, 7, 10, 12],
        },
    ),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["fsf4", "fsf16", "lru", "lfu", "belady"])
@pytest.mark.parametrize("shared", [False, True])
def test_equals_the_reference(name: str, key: str, shared: bool) -> None:
    selections, experts, values = reference(name)
    policy: dict[str, Any] = {"policy": key}
    if key.startswith("fsf"):
        policy = {"policy": "sch", "segment_length": int(key.removeprefix("fsf"))}
    found = hit_rate_curve(selections=selections, num_experts=experts, shared=shared, **policy)
    expected = values["cache_hit_rate"][key]["shared" if shared else "layer"]
    np.testing.assert_allclose(found, expected, atol=1e-7, rtol=0)
    assert found.dtype == np.float64


@pytest.mark.parametrize("case", BY_HAND)
def test_by_hand(case: str) -> None:
    requests, curves = BY_HAND[case]
    selections = np.array(requests)[None, None]
    for (policy, length), hits in curves.items():
        found = hit_rate_curve(selections=selections, num_experts=4, policy=policy, segment_length=length)  # type: ignore[arg-type]
        np.testing.assert_allclose(found[0] * selections.size, hits, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("policy", "length"), CURVES)
@pytest.mark.parametrize("convention", ["reference", "clean"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("free", [False, True])
def test_equals_simulated_caches(
    seed: int, policy: CachePolicy, length: int | None, convention: Convention, shared: bool, free: bool
) -> None:
    experts, layers = 6, 2
    selections = random_selections(seed, k=1 + seed % 3)
    clean = convention == "clean"
    steps_per_token = layers if shared and clean else 1
    window = (length or 1) * steps_per_token + 1 if clean else length or 1
    found = hit_rate_curve(
        selections=selections,
        num_experts=experts,
        policy=policy,
        segment_length=length,
        shared=shared,
        compulsory_free=free,
        convention=convention,
    )
    for cache, sequences in enumerate(streams(selections, experts, shared=shared, by_layer=clean)):
        asked = np.array([sum(map(len, stream)) for stream in sequences])
        for slots in range(1, experts * (layers if shared else 1) + 1):
            hits = np.array([cache_hits(one, slots, policy, window, pinned=clean, free=free) for one in sequences])
            expected = hits.sum() / asked.sum() if clean else (hits[asked > 0] / asked[asked > 0]).mean()
            curve = found if shared else found[cache]
            assert curve[slots - 1] == pytest.approx(expected, abs=1e-12), f"{slots} slots"


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 3), shared=st.booleans(), ragged=st.booleans())
def test_invariants(seed: int, k: int, shared: bool, ragged: bool) -> None:
    trace: dict[str, Any] = {
        "selections": random_selections(seed, k=k, ragged=ragged),
        "num_experts": 6,
        "shared": shared,
    }
    lru = hit_rate_curve(**trace, policy="lru")
    np.testing.assert_array_equal(hit_rate_curve(**trace, policy="sch", segment_length=1), lru)
    for policy, length in CURVES:
        curve = hit_rate_curve(**trace, policy=policy, segment_length=length)
        np.testing.assert_allclose(curve[..., -1], 1.0)
        assert (np.diff(curve, axis=-1) >= -1e-12).all()
        cold = hit_rate_curve(**trace, policy=policy, segment_length=length, compulsory_free=False)
        assert (cold <= curve + 1e-12).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), m=st.integers(1, 8))
def test_belady_is_best_for_one_expert_per_token(seed: int, m: int) -> None:
    trace: dict[str, Any] = {"selections": random_selections(seed, k=1, ragged=False), "num_experts": 6}
    best = hit_rate_curve(**trace, policy="belady")
    for policy, length in [("sch", m), ("lru", None), ("lfu", None)]:
        assert (hit_rate_curve(**trace, policy=policy, segment_length=length) <= best + 1e-12).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), m=st.integers(1, 8), shared=st.booleans(), k=st.integers(1, 3))
def test_clean_belady_is_best_from_k_slots_on(seed: int, m: int, shared: bool, k: int) -> None:
    trace: dict[str, Any] = {"selections": random_selections(seed, k=k), "num_experts": 6, "shared": shared}
    trace["convention"] = "clean"
    best = hit_rate_curve(**trace, policy="belady")[..., k - 1 :]
    for policy, length in [("sch", m), ("lru", None), ("lfu", None)]:
        other = hit_rate_curve(**trace, policy=policy, segment_length=length)[..., k - 1 :]
        assert (other <= best + 1e-12).all()


def test_per_sequence_curves_average_to_the_curve() -> None:
    selections = random_selections(1)
    trace: dict[str, Any] = {"selections": selections, "num_experts": 6, "policy": "lfu"}
    for shared in (False, True):
        each = hit_rate_curve(**trace, shared=shared, per_sequence=True)
        whole = hit_rate_curve(**trace, shared=shared)
        assert each.shape == (3, *whole.shape)
        np.testing.assert_allclose(np.nanmean(each, axis=0), whole)


def test_empty_sequences_and_layers() -> None:
    selections = random_selections(1, ragged=False)
    more = np.concatenate([selections, np.full_like(selections[:, :1], -1)], axis=1)
    trace: dict[str, Any] = {"num_experts": 6, "policy": "lru"}
    np.testing.assert_array_equal(
        hit_rate_curve(selections=more, **trace), hit_rate_curve(selections=selections, **trace)
    )
    assert np.isnan(hit_rate_curve(selections=more, **trace, per_sequence=True)[-1]).all()
    bootstrap = hit_rate_bootstrap(selections=more, **trace, num_resamples=5)
    np.testing.assert_allclose(bootstrap.estimate, hit_rate_curve(selections=selections, **trace))
    selections[1] = -1
    assert np.isnan(hit_rate_curve(selections=selections, **trace)[1]).all()


def test_parts_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    trace: dict[str, Any] = {"selections": random_selections(4, sequences=9), "num_experts": 6, "policy": "sch"}
    whole = hit_rate_curve(**trace, segment_length=4, shared=True)
    monkeypatch.setattr("profiler.metrics.cache_hit_rate._TASK_REQUESTS", 10)
    np.testing.assert_allclose(hit_rate_curve(**trace, segment_length=4, shared=True), whole, atol=1e-15)


@pytest.mark.parametrize("convention", ["reference", "clean"])
@pytest.mark.parametrize("shared", [False, True])
def test_bootstrap_resamples_whole_sequences(convention: Convention, shared: bool) -> None:
    selections = random_selections(6, sequences=4)
    arguments: dict[str, Any] = {"num_experts": 6, "policy": "lru", "convention": convention, "shared": shared}
    weights = resample_weights(num_sequences=4, num_resamples=9, seed=5).astype(int)
    resampled = [hit_rate_curve(selections=np.repeat(selections, one, axis=1), **arguments) for one in weights]
    found = hit_rate_bootstrap(
        selections=selections, **arguments, num_resamples=9, confidence=0.8, rule="percentile", seed=5
    )
    low, high = np.quantile(resampled, [0.1, 0.9], axis=0)
    np.testing.assert_allclose(found.lower, low, atol=1e-12)
    np.testing.assert_allclose(found.upper, high, atol=1e-12)
    np.testing.assert_allclose(found.estimate, hit_rate_curve(selections=selections, **arguments), atol=1e-12)


def test_slots_at_ratio() -> None:
    assert slots_at_ratio(ratio=2, top_k=8) == 16
    assert slots_at_ratio(ratio=1.5, top_k=4, num_layers=24) == 144
    assert slots_at_ratio(ratio=0.01, top_k=4) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": "fifo"}, "policy is 'fifo'; choose one of sch, lru, lfu, belady"),
        ({"policy": "sch"}, "segment_length is None; policy 'sch' takes a number of tokens from 1"),
        ({"policy": "sch", "segment_length": 0}, "segment_length is 0"),
        ({"segment_length": 4}, "segment_length is 4, but policy 'lru' looks at no segment"),
        ({"convention": "paper"}, "convention is 'paper'; choose one of reference, clean"),
        ({"selections": np.full((1, 2, 3, 1), -1)}, "no token that uses an expert"),
        ({"selections": np.full((1, 2, 3, 1), 9)}, "holds id 9; with 4 experts"),
        ({"num_resamples": 0}, "num_resamples is 0"),
    ],
)
def test_says_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MetricError, match=message):
        hit_rate_bootstrap(**{"selections": np.zeros((1, 2, 3, 1), int), "num_experts": 4, "policy": "lru", **changes})


def test_compiles_without_a_place_for_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    import numba

    from profiler.metrics._stack import compiled

    real = numba.njit

    def without_cache(*, cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return real(**options)

    monkeypatch.setattr(numba, "njit", without_cache)
    assert compiled(lambda x: x + 1)(2) == 3


def test_metrics_import_nothing_heavy() -> None:
    program = (
        "import sys, profiler.metrics as m\n"
        "[getattr(m, name) for name in m.__all__]\n"
        "heavy = {'torch', 'streamlit', 'duckdb', 'polars', 'numba', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run(
        [sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
