"""Evenness of load against scipy and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from simulators import random_selections, real_lengths

from moescope.errors import MetricError
from profiler.metrics.controls import uniform_experts
from profiler.metrics.load import Balance, balance, dead_experts, load_balance_loss, local_balance, noise_cv, share

COUNTS = np.random.default_rng(0).integers(0, 500, size=(4, 16))


def test_equals_scipy() -> None:
    found = balance(load=COUNTS)
    for layer, counts in enumerate(COUNTS):
        shares = counts / counts.sum()
        assert found.entropy[layer] == pytest.approx(stats.entropy(counts), abs=1e-12)
        assert found.effective_experts[layer] == pytest.approx(np.exp(stats.entropy(counts)))
        assert found.normalised_entropy[layer] == pytest.approx(stats.entropy(counts, base=16), abs=1e-12)
        assert found.kl_uniform[layer] == pytest.approx(stats.entropy(shares, np.full(16, 1 / 16)), abs=1e-12)
        assert found.cv[layer] == pytest.approx(stats.variation(counts), abs=1e-12)
        pairs = np.abs(shares[:, None] - shares).mean() / (2 * shares.mean())  # Gini by its definition
        assert found.gini[layer] == pytest.approx(pairs, abs=1e-12)
        assert found.max_over_mean[layer] == pytest.approx(counts.max() / counts.mean())
        assert found.max_violation[layer] == pytest.approx(counts.max() / counts.mean() - 1)
        assert found.min_over_mean[layer] == pytest.approx(counts.min() / counts.mean())
    np.testing.assert_allclose(share(load=COUNTS).sum(axis=1), 1)


def test_even_and_one_expert() -> None:
    even = balance(load=np.full((1, 8), 7))
    alone = balance(load=np.eye(1, 8))
    assert (even.gini[0], even.cv[0], even.kl_uniform[0]) == pytest.approx((0, 0, 0), abs=1e-12)
    assert even.effective_experts[0] == pytest.approx(8)
    assert (alone.entropy[0], alone.effective_experts[0]) == pytest.approx((0, 1))
    assert (alone.gini[0], alone.cv[0], alone.max_over_mean[0]) == pytest.approx((7 / 8, np.sqrt(7), 8))
    assert balance(load=np.ones((1, 1))).normalised_entropy[0] == 1


@given(arrays(np.int64, (2, 6), elements=st.integers(0, 1000)))
def test_ranges_and_scale(counts: Any) -> None:
    found, doubled = balance(load=counts), balance(load=2.0 * counts)
    for name in Balance.__dataclass_fields__:
        np.testing.assert_allclose(getattr(found, name), getattr(doubled, name), atol=1e-9)
    some = counts.sum(axis=1) > 0
    assert np.isnan(found.entropy[~some]).all() and np.isnan(found.gini[~some]).all()
    assert ((found.gini[some] >= -1e-12) & (found.gini[some] <= 5 / 6 + 1e-12)).all()
    assert ((found.effective_experts[some] >= 1 - 1e-9) & (found.effective_experts[some] <= 6 + 1e-9)).all()
    assert (found.cv[some] <= np.sqrt(5) + 1e-9).all()


def test_dead_experts_and_what_chance_explains() -> None:
    found = dead_experts(counts=[[0, 1, 50, 49], [25, 25, 25, 25]], top_k=2, threshold=0.05)
    assert found.dead.tolist() == [[True, False, False, False], [False] * 4]
    assert found.nearly_dead.tolist() == [[True, True, False, False], [False] * 4]  # 1 < 0.05 x 25
    np.testing.assert_allclose(found.zero_probability, 0.5**50)
    few = dead_experts(counts=[[0, 2, 2, 2]], top_k=2, tokens=3)
    assert few.expected_dead[0] == pytest.approx(4 * 0.5**3)


def test_noise_matches_uniform_routing() -> None:
    some = np.zeros((40, 1, 256, 2), dtype=np.int16)
    drawn = uniform_experts(selections=some, num_experts=32, seed=0)
    counts = [np.bincount(layer.ravel(), minlength=32) for layer in drawn]
    # experts of one token exclude each other, which takes a few per cent off; 40 layers
    assert balance(load=counts).cv.mean() == pytest.approx(noise_cv(num_experts=32, top_k=2, tokens=256), rel=0.06)


@pytest.mark.parametrize("window", [None, 1, 4])
def test_local_balance_averages_windows(window: int | None) -> None:
    selections = random_selections(8)
    found = local_balance(selections=selections, num_experts=6, window=window)
    for layer in range(2):
        parts = []
        for sequence, length in enumerate(real_lengths(selections)):
            step = window or length
            for start in range(0, length - step + 1, step):
                ids = selections[layer, sequence, start : start + step]
                parts.append(np.bincount(ids[ids >= 0], minlength=6))
        each = balance(load=[part for part in parts if part.sum()])
        for name in Balance.__dataclass_fields__:
            assert getattr(found, name)[layer] == pytest.approx(getattr(each, name).mean(), abs=1e-12)


def test_local_imbalance_under_global_balance() -> None:
    selections = np.repeat(np.arange(4), 10).reshape(1, 4, 10, 1)  # each text its own expert
    counts = np.bincount(selections.ravel(), minlength=4)[None]
    assert balance(load=counts).effective_experts[0] == pytest.approx(4)
    assert local_balance(selections=selections, num_experts=4).effective_experts[0] == pytest.approx(1)


def test_load_balance_loss_in_both_forms() -> None:
    generator = np.random.default_rng(0)
    p = generator.dirichlet(np.ones(8), size=200)
    chosen = np.argsort(-p, axis=1)[:, :2]
    counts = np.bincount(chosen.ravel(), minlength=8)
    expected = 8 * sum(np.mean((chosen == e).any(axis=1)) * p[:, e].mean() for e in range(8))
    found = load_balance_loss(counts=counts[None], probability_sums=p.sum(axis=0)[None], tokens=200, top_k=2)
    assert found.sum_form[0] == pytest.approx(expected)
    assert found.mean_form[0] == pytest.approx(expected / 2)
    even = load_balance_loss(counts=np.full((1, 8), 50), probability_sums=np.full((1, 8), 25.0), tokens=200, top_k=2)
    assert (even.sum_form[0], even.mean_form[0]) == pytest.approx((2, 1))


@pytest.mark.parametrize(
    ("load", "message"),
    [
        ([[1.0, np.nan]], "load of layer 0, expert 1 is nan; loads are finite, from 0"),
        ([[1, 2], [3, -4]], r"load of layer 1, expert 1 is -4\.0"),
        ([1, 2, 3], r"load has shape \(3,\); it takes \(layers, experts\)"),
        (np.empty((2, 0)), "at least one expert"),
    ],
)
def test_says_what_is_wrong(load: Any, message: str) -> None:
    with pytest.raises(MetricError, match=message):
        balance(load=load)


def test_says_what_is_wrong_with_settings() -> None:
    with pytest.raises(MetricError, match="top_k is 9 with 4 experts"):
        dead_experts(counts=[[1, 2, 3, 4]], top_k=9)
    with pytest.raises(MetricError, match="threshold is 5"):
        dead_experts(counts=[[1, 2, 3, 4]], top_k=1, threshold=5)
    with pytest.raises(MetricError, match="window is 15; it takes 1 to 14 tokens"):
        local_balance(selections=random_selections(0), num_experts=6, window=15)
    with pytest.raises(MetricError, match="they go together"):
        load_balance_loss(counts=[[1, 2]], probability_sums=[[1, 2, 3]], tokens=3, top_k=1)
    assert balance(load=np.empty((0, 4))).entropy.shape == (0,)
