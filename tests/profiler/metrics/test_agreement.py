"""Agreement of rankings, against scipy and against counting over all ways to break ties."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from moescope.errors import MetricError
from profiler.metrics.agreement import (
    chance_band,
    cut_correlation,
    cut_overlap,
    kendall,
    overlap,
    score_agreement,
    spearman,
)


def _pairs() -> list[tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(0)
    free = [(generator.normal(size=12), generator.normal(size=12)) for _ in range(4)]
    tied = [(generator.integers(0, 4, 12).astype(float), generator.integers(0, 3, 12).astype(float)) for _ in range(4)]
    return free + tied


@pytest.mark.parametrize(("first", "second"), _pairs())
def test_correlations_are_those_of_scipy(first: np.ndarray, second: np.ndarray) -> None:
    assert float(spearman(first=first, second=second)) == pytest.approx(stats.spearmanr(first, second).statistic)
    assert float(kendall(first=first, second=second)) == pytest.approx(stats.kendalltau(first, second).statistic)


def test_a_ranking_without_order_has_no_correlation() -> None:
    flat, other = np.ones(5), np.arange(5.0)
    assert np.isnan(spearman(first=flat, second=other)) and np.isnan(kendall(first=flat, second=other))


def _cuts(values: np.ndarray, size: int) -> list[set[int]]:
    """Every set that a cut could take when ties are broken by lot."""
    last = np.sort(values)[size - 1]
    sure = set(np.flatnonzero(values < last).tolist())
    tied = np.flatnonzero(values == last).tolist()
    return [sure | set(more) for more in itertools.combinations(tied, size - len(sure))]


@pytest.mark.parametrize("share", [0.25, 0.5, 0.01])
@pytest.mark.parametrize(("first", "second"), _pairs())
def test_overlap_is_the_mean_over_all_ways_to_break_ties(first: np.ndarray, second: np.ndarray, share: float) -> None:
    size = max(1, int(share * len(first)))
    ways = [len(one & other) / size for one in _cuts(first, size) for other in _cuts(second, size)]
    assert float(overlap(first=first, second=second, share=share)) == pytest.approx(np.mean(ways), abs=1e-12)


def test_cut_correlation_against_drawn_normals() -> None:
    generator = np.random.default_rng(1)
    for rho, share in [(0.3, 0.25), (0.8, 0.25), (0.6, 0.5)]:
        one = generator.normal(size=400_000)
        other = rho * one + np.sqrt(1 - rho**2) * generator.normal(size=one.size)
        both = (one < np.quantile(one, share)) & (other < np.quantile(other, share))
        # Standard error of the share of both is below 0.001.
        assert float(cut_overlap(correlation=rho, share=share)) == pytest.approx(both.mean() / share, abs=0.006)
    for rho in (-0.5, 0.0, 0.4, 0.95):
        there = cut_overlap(correlation=rho, share=0.25)
        assert float(cut_correlation(overlap=there, share=0.25)) == pytest.approx(rho, abs=1e-3)
    assert float(cut_overlap(correlation=0.0, share=0.25)) == pytest.approx(0.25, abs=1e-9)


def test_chance_bands_hold_what_chance_gives() -> None:
    band = chance_band(num_experts=[16, 16, 16], measure="spearman", num_draws=2000)
    # The variance of Spearman's rho over random rankings of n is 1 / (n - 1).
    assert (band.low, band.high) == pytest.approx((-1.96 / np.sqrt(45), 1.96 / np.sqrt(45)), abs=0.03)
    assert abs(band.mean) < 0.02
    assert chance_band(num_experts=[16], measure="0.25", num_draws=2000).mean == pytest.approx(0.25, abs=0.02)


def test_all_pairs_at_once() -> None:
    scores = np.random.default_rng(2).normal(size=(3, 10))
    scores[2] = -scores[0]
    found = score_agreement(scores=scores)
    assert found.spearman[0, 2] == pytest.approx(-1.0) and found.kendall[1, 1] == pytest.approx(1.0)
    assert found.overlap[1, 0, 2] == 0.0 and found.overlap.shape == (2, 3, 3)
    np.testing.assert_allclose(found.spearman, found.spearman.T)
    tied = np.random.default_rng(3).integers(0, 5, (3, 40)).astype(float)
    found = score_agreement(scores=tied)
    for one, other in itertools.product(range(3), repeat=2):
        assert found.kendall[one, other] == pytest.approx(stats.kendalltau(tied[one], tied[other]).statistic)
        assert found.spearman[one, other] == pytest.approx(stats.spearmanr(tied[one], tied[other]).statistic)
    assert np.isnan(score_agreement(scores=np.array([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]])).kendall[0]).all()


def test_a_value_that_is_no_number_has_no_rank() -> None:
    assert np.isnan(spearman(first=np.array([1.0, np.nan, 2.0]), second=np.arange(3.0)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spearman(first=np.ones(3), second=np.ones(4)), "same experts"),
        (lambda: overlap(first=np.ones(3), second=np.ones(3), share=1.5), "share is 1.5"),
        (lambda: score_agreement(scores=np.ones(3)), "shape"),
        (lambda: chance_band(num_experts=[1], measure="spearman"), "at least 2"),
        (lambda: chance_band(num_experts=[4], measure="pearson"), "measure is 'pearson'"),
    ],
)
def test_refusals(call: object, message: str) -> None:
    with pytest.raises(MetricError, match=message):
        call()  # type: ignore[operator]
