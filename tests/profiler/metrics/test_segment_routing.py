"""SRP against published values, by hand, by brute force, and in closed form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_values import NAMES, reference
from simulators import best_f1, random_selections, real_lengths, windows

from moescope.errors import MetricError
from profiler.metrics._intervals import interval, resample_weights
from profiler.metrics._segment_bootstrap import _resampled_best
from profiler.metrics._segments import best_threshold
from profiler.metrics.controls import uniform_experts
from profiler.metrics.local_consistency import (
    Scope,
    srp,
    srp_bootstrap,
    srp_bootstrap_table,
    srp_expert_choice,
    srp_table,
    srp_uniform,
)

ONE_EXPERT = np.array([0, 0, -1, 0, -1, -1, -1, 0]).reshape(1, 1, 8, 1)


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_reference(name: str) -> None:
    selections, experts, values = reference(name)
    lengths = [int(length) for length in values["srp"]]
    table = srp_table(selections=selections, num_experts=experts, segment_lengths=lengths)
    for length in lengths:
        expected = values["srp"][str(length)]
        model, layer, expert = (table[length, scope] for scope in ("model", "layer", "expert"))
        np.testing.assert_allclose(
            [model.value, model.router_size, model.threshold], expected["model"], atol=1e-9, rtol=0
        )
        found = np.stack([layer.value, layer.router_size, layer.threshold], axis=1)
        np.testing.assert_allclose(found, expected["layer"], atol=1e-9, rtol=0)
        np.testing.assert_allclose(expert.value, expected["expert_srp"], atol=1e-9, rtol=0)


@pytest.mark.parametrize(("m", "value", "size", "threshold"), [(2, 0.75, 5 / 3, 1), (4, 0.625, 1, 2), (8, 2 / 3, 2, 0)])
def test_one_expert_by_hand(m: int, value: float, size: float, threshold: int) -> None:
    found = srp(selections=ONE_EXPERT, num_experts=1, segment_length=m)
    assert float(found.value) == pytest.approx(value, abs=1e-12)
    assert float(found.router_size) == pytest.approx(size, abs=1e-12)
    assert int(found.threshold) == threshold
    assert found.value.dtype == np.float64
    assert (found.windows, found.sequences_used) == (9 - m, 1)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("m", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("skip_first", [False, True])
def test_equals_brute_force_on_ragged_traces(seed: int, m: int, skip_first: bool) -> None:
    selections, experts = random_selections(seed), 6
    table = srp_table(selections=selections, num_experts=experts, segment_lengths=[m], skip_first=skip_first)
    f = {
        (layer, expert): windows(selections, layer, expert, m, first=int(skip_first))
        for layer in range(2)
        for expert in range(experts)
    }
    expert = table[m, "expert"]
    for place, values in f.items():
        expected = best_f1(values, m)
        assert (expert.value[place], expert.router_size[place], expert.threshold[place]) == pytest.approx(expected)
        assert expert.activation_ratio[place] == pytest.approx(sum(values) / (m * len(values)))
    for layer in range(2):
        expected = best_f1(sum((f[layer, expert] for expert in range(experts)), []), m)
        one = table[m, "layer"]
        assert (one.value[layer], one.router_size[layer], one.threshold[layer]) == pytest.approx(expected)
    model = table[m, "model"]
    assert (model.value, model.router_size, model.threshold) == pytest.approx(best_f1(sum(f.values(), []), m))
    assert model.sequences_used == sum(length - skip_first >= m for length in real_lengths(selections))
    assert model.windows == len(f[0, 0])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), m=st.integers(1, 12), ragged=st.booleans())
def test_bounds_and_threshold(seed: int, m: int, ragged: bool) -> None:
    selections = random_selections(seed, tokens=12, experts=5, ragged=ragged)
    for scope in ("model", "layer", "expert"):
        found = srp(selections=selections, num_experts=5, segment_length=m, scope=scope)
        assert (found.value <= 1 + 1e-12).all()
        assert (found.value >= found.lower_bound - 1e-12).all()
        # it may lie lower where no window has f in between: the smallest threshold is taken
        assert (found.threshold <= np.ceil(m * found.value / 2 - 1e-9)).all()
        if m == 1:
            np.testing.assert_allclose(found.value, found.value > 0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("m", [3, 4, 10, 16, 64, 100])
def test_threshold_is_half_the_segment_times_srp(name: str, m: int) -> None:
    selections, experts, _ = reference(name)
    for scope in ("model", "layer"):
        found = srp(selections=selections, num_experts=experts, segment_length=m, scope=scope)
        np.testing.assert_array_equal(found.threshold, np.ceil(m * found.value / 2 - 1e-9))


UNIFORM = {  # E, k: (SRP, router size, threshold) at m = 4, 16, 64, 256
    (8, 2): [(0.5649, 1.05, 2), (0.4520, 2.38, 4), (0.4091, 3.04, 14), (0.4005, 3.87, 52)],
    (64, 8): [(0.4640, 3.31, 1), (0.3214, 2.58, 3), (0.2526, 3.26, 9), (0.2294, 5.40, 30)],
    (64, 6): [(0.4472, 3.47, 1), (0.2810, 1.97, 3), (0.2103, 4.20, 7), (0.1825, 5.67, 24)],
    (128, 8): [(0.4310, 3.64, 1), (0.2374, 4.23, 2), (0.1646, 3.36, 6), (0.1336, 5.40, 18)],
    (256, 8): [(0.4152, 3.82, 1), (0.1990, 2.81, 2), (0.1149, 4.48, 4), (0.0817, 5.79, 11)],
}


@pytest.mark.parametrize(("experts", "k"), UNIFORM)
def test_uniform_routing_in_closed_form(experts: int, k: int) -> None:
    for m, (value, size, threshold) in zip((4, 16, 64, 256), UNIFORM[experts, k], strict=True):
        found = srp_uniform(num_experts=experts, top_k=k, segment_length=m)
        assert float(found.value) == pytest.approx(value, abs=5.1e-5)
        assert float(found.router_size) == pytest.approx(size, abs=5.1e-3)
        assert int(found.threshold) == threshold
        assert found.lower_bound <= found.value


@pytest.mark.parametrize("m", [4, 16, 64])
def test_uniform_routing_simulated(m: int) -> None:
    some = np.zeros((2, 60, 200, 2), dtype=np.int16)
    selections = uniform_experts(selections=some, num_experts=16, seed=1)
    found = srp(selections=selections, num_experts=16, segment_length=m)
    expected = srp_uniform(num_experts=16, top_k=2, segment_length=m)
    # two experts of one token cannot be the same, so experts are very slightly dependent; 24,000 tokens
    assert float(found.value) == pytest.approx(float(expected.value), abs=0.004)


def test_unused_expert_reads_zero() -> None:
    found = srp(selections=ONE_EXPERT, num_experts=3, segment_length=4, scope="expert")
    assert found.value[0, 1:].tolist() == found.router_size[0, 1:].tolist() == found.threshold[0, 1:].tolist() == [0, 0]


def test_expert_choice_is_the_weighted_mean_of_experts() -> None:
    selections = random_selections(3, ragged=False)
    m, experts = 4, 6
    numerator = denominator = 0.0
    for layer in range(2):
        for expert in range(experts):
            f = windows(selections, layer, expert, m)
            value, size, _ = best_f1(f, m)
            slots = sum(f) * (1 + size)
            numerator, denominator = numerator + value * slots, denominator + slots
    arguments: dict[str, Any] = {"selections": selections, "num_experts": experts, "segment_length": m}
    assert float(srp_expert_choice(**arguments, scope="model")) == pytest.approx(numerator / denominator)
    assert srp_expert_choice(**arguments, scope="layer").shape == (2,)


def test_long_sequences_are_counted_in_blocks_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    selections = random_selections(5, tokens=40, experts=6)
    whole = srp_table(selections=selections, num_experts=6, segment_lengths=[3, 8])
    monkeypatch.setattr("profiler.metrics._segments._BLOCK", 80)
    parts = srp_table(selections=selections, num_experts=6, segment_lengths=[3, 8])
    for key, one in whole.items():
        np.testing.assert_array_equal(one.value, parts[key].value)
    bootstrap = srp_bootstrap(selections=selections, num_experts=6, segment_length=3, scope="expert", num_resamples=20)
    np.testing.assert_array_equal(bootstrap.estimate.value, whole[3, "expert"].value)


@pytest.mark.parametrize("scope", ["model", "layer", "expert"])
def test_bootstrap_resamples_whole_sequences(scope: Scope) -> None:
    selections, m, resamples = random_selections(2, sequences=5, tokens=20), 4, 7
    used = np.array(real_lengths(selections)) >= m
    weights = resample_weights(num_sequences=int(used.sum()), num_resamples=resamples, seed=3).astype(int)
    arguments: dict[str, Any] = {"num_experts": 6, "segment_length": m, "scope": scope}
    repeated = [np.repeat(selections[:, used], one, axis=1) for one in weights]
    resampled = [srp(selections=one, **arguments) for one in repeated]

    found = srp_bootstrap(
        selections=selections, **arguments, num_resamples=resamples, confidence=0.8, rule="percentile", seed=3
    )
    for ends, name in (
        ((found.lower, found.upper), "value"),
        ((found.router_size_lower, found.router_size_upper), "router_size"),
    ):
        expected = np.quantile([getattr(one, name) for one in resampled], [0.1, 0.9], axis=0)
        np.testing.assert_allclose(ends, expected, atol=1e-12)
    np.testing.assert_array_equal(found.estimate.value, srp(selections=selections, **arguments).value)


def test_basic_rule_takes_the_published_places() -> None:
    resampled = np.random.default_rng(0).permutation(1000).astype(np.float64)
    low, high = interval(estimate=np.array(500.0), resampled=resampled, confidence=0.95, rule="basic")
    assert (low, high) == (1000 - 975, 1000 - 25)
    low, high = interval(estimate=np.array(500.0), resampled=resampled, confidence=0.95, rule="percentile")
    assert (low, high) == pytest.approx((0.025 * 999, 0.975 * 999))


def test_bootstrap_table_equals_single_calls() -> None:
    selections, experts, _ = reference("trace-8x2")
    table = srp_bootstrap_table(selections=selections, num_experts=experts, segment_lengths=[4, 10], num_resamples=50)
    for (m, scope), one in table.items():
        alone = srp_bootstrap(
            selections=selections, num_experts=experts, segment_length=m, scope=scope, num_resamples=50
        )
        np.testing.assert_array_equal(one.lower, alone.lower)
        assert (one.lower <= one.estimate.value).all() and (one.estimate.value <= one.upper).mean() > 0.9
        assert one.lower.shape == one.estimate.value.shape == one.router_size_upper.shape


def test_no_lengths_give_an_empty_table() -> None:
    assert srp_table(selections=ONE_EXPERT, num_experts=1, segment_lengths=[]) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segment_length": 0}, "segment_length is 0; a segment has at least 1 token"),
        ({"segment_length": 9}, "longest sequence has 8 tokens"),
        ({"segment_length": 8, "skip_first": True}, "longest sequence has 7 tokens"),
        ({"scope": "domain"}, "scope is 'domain'; choose one of model, layer, expert"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"selections": ONE_EXPERT + 1}, "holds id 1; with 1 experts ids run from 0 to 0, -1 = none"),
        ({"selections": ONE_EXPERT - 1}, "holds id -2"),
        ({"selections": ONE_EXPERT.astype(float)}, "holds float64; expert ids are integers"),
        ({"selections": ONE_EXPERT[0]}, "has 3 axes; it takes 4"),
        ({"selections": ONE_EXPERT[:, :0]}, "selections is empty"),
        ({"selections": np.repeat(ONE_EXPERT, 2, axis=3)}, "holds 2 ids per token, but a layer has only 1 experts"),
        ({"selections": np.full_like(ONE_EXPERT, -1)}, "longest sequence has 0 tokens"),
        ({"num_resamples": 1}, "num_resamples is 1"),
        ({"confidence": 1.0}, r"confidence is 1\.0"),
        ({"rule": "bca"}, "rule is 'bca'; choose one of basic, percentile"),
    ],
)
def test_says_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MetricError, match=message):
        srp_bootstrap(**{"selections": ONE_EXPERT, "num_experts": 1, "segment_length": 2, **changes})


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), m=st.integers(1, 40), density=st.floats(0.02, 1.0))
def test_stepping_to_the_best_threshold_equals_trying_all(seed: int, m: int, density: float) -> None:
    generator = np.random.default_rng(seed)
    histogram = generator.integers(0, 30, size=(6, m + 1)) * (generator.random((6, m + 1)) < density)
    weights = resample_weights(num_sequences=6, num_resamples=50, seed=seed)
    value, size, _ = best_threshold(weights @ histogram, m)
    for start in (0, m // 2, m):
        found = _resampled_best(weights, histogram, m, start)
        np.testing.assert_allclose(found, np.stack([value, size], axis=1), atol=1e-9)
