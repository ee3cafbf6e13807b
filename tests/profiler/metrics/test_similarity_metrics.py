"""Similarity of experts: invariances, brute force over the definition of HSIC, and the Mantel test."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from scipy.stats import spearmanr

from moescope.errors import MetricError
from profiler.metrics.similarity import (
    angular,
    cosine_matrix,
    linear_hsic,
    logit_correlation,
    normalised_gram,
    random_absolute_cosine,
    redundancy,
    shifted,
)
from profiler.metrics.similarity_agreement import agreement, clustered_order, nearest

Array = NDArray[np.float64]


def _cka(outputs: Array) -> tuple[Array, Array]:
    biased, unbiased = linear_hsic(outputs=outputs)
    return normalised_gram(gram=biased), normalised_gram(gram=unbiased)


def _hsic_by_definition(first: Array, second: Array) -> float:
    """The U-statistic of HSIC: the mean over ordered quadruples of distinct tokens of
    K_ij L_ij + K_ij L_qr - 2 K_ij L_iq, linear kernels (Song et al. 2012, equation 2)."""
    kernel, other = first @ first.T, second @ second.T
    terms = [
        kernel[i, j] * other[i, j] + kernel[i, j] * other[q, r] - 2 * kernel[i, j] * other[i, q]
        for i, j, q, r in permutations(range(len(first)), 4)
    ]
    return float(np.mean(terms))


def test_unbiased_hsic_is_its_definition() -> None:
    outputs = np.random.default_rng(0).normal(size=(3, 6, 4)) + 5.0
    biased, unbiased = linear_hsic(outputs=outputs)
    centring = np.eye(6) - 1 / 6
    for i in range(3):
        for j in range(3):
            assert unbiased[i, j] == pytest.approx(_hsic_by_definition(outputs[i], outputs[j]), rel=1e-9)
            kernels = [centring @ outputs[k] @ outputs[k].T @ centring for k in (i, j)]
            assert biased[i, j] == pytest.approx(np.trace(kernels[0] @ kernels[1]) / 25, rel=1e-9)


def test_unbiased_hsic_is_the_published_formula() -> None:
    outputs, n = np.random.default_rng(1).normal(size=(2, 9, 30)) + 2.0, 9
    kernels = [rows @ rows.T * (1 - np.eye(n)) for rows in outputs]
    ones = np.ones(n)
    expected = (
        np.trace(kernels[0] @ kernels[1])
        + ones @ kernels[0] @ ones * (ones @ kernels[1] @ ones) / ((n - 1) * (n - 2))
        - 2 / (n - 2) * (ones @ kernels[0] @ kernels[1] @ ones)
    ) / (n * (n - 3))
    assert linear_hsic(outputs=outputs)[1][0, 1] == pytest.approx(expected, rel=1e-9)


def test_rotating_and_scaling_change_nothing() -> None:
    rng = np.random.default_rng(2)
    one = rng.normal(size=(20, 8))
    rotation, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    for found in _cka(np.stack([one, one @ rotation, -3.0 * one + 7.0, one])):
        assert_allclose(found, 1.0, rtol=1e-10)


def test_cka_is_the_ratio_of_frobenius_norms() -> None:
    outputs = np.random.default_rng(3).normal(size=(2, 12, 5))
    x, y = (rows - rows.mean(0) for rows in outputs)
    expected = np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    assert _cka(outputs)[0][0, 1] == pytest.approx(expected, rel=1e-10)


def test_unrelated_outputs_look_alike_to_the_biased_form_only() -> None:
    outputs = np.random.default_rng(4).normal(size=(24, 32, 256))  # fewer tokens than channels
    pairs = np.tril_indices(24, -1)
    biased, unbiased = (found[pairs] for found in _cka(outputs))
    assert biased.mean() == pytest.approx(256 / (31 + 256), abs=0.02)
    assert abs(unbiased.mean()) < 0.02
    assert np.abs(unbiased).max() < 0.3


def test_groups_add_up_before_the_ratio() -> None:
    rng = np.random.default_rng(5)
    shared = rng.normal(size=(64, 6))
    outputs = np.stack([shared @ rng.normal(size=(6, 40)) + 3 * rng.normal(size=(64, 40)) for _ in range(3)])
    whole = normalised_gram(gram=linear_hsic(outputs=outputs)[1])
    parts = [linear_hsic(outputs=part)[1] for part in np.split(outputs, 4, axis=1)]
    assert_allclose(normalised_gram(gram=np.sum(parts, axis=0)), whole, atol=0.1)
    with pytest.raises(MetricError, match="4 or more tokens"):
        linear_hsic(outputs=outputs[:, :3])


def test_cosines_by_hand() -> None:
    rows = np.array([[3.0, 4.0], [4.0, -3.0], [-6.0, -8.0], [0.0, 0.0], [1e-200, 0.0]])
    found = cosine_matrix(rows=rows)
    assert_allclose(found[:3, :3], [[1, 0, -1], [0, 1, 0], [-1, 0, 1]], atol=1e-15)
    assert found[0, 4] == pytest.approx(0.6)
    assert np.isnan(found[3]).all()
    angles = np.array([0.0, np.pi / 3, np.pi / 2, np.pi])
    assert_allclose(angular(np.cos(angles)), 1 - angles / np.pi, atol=1e-7)
    assert_allclose(shifted(np.array([-1.0, 0.0, 1.0])), [0, 0.5, 1])
    with pytest.raises(MetricError, match="experts, width"):
        cosine_matrix(rows=np.zeros(3))


def test_logit_correlation_is_that_of_the_logits() -> None:
    logits = np.random.default_rng(6).normal(size=(50, 4)) + np.array([9.0, -4, 0, 2])
    logits[:, 3] = 2.0  # which never changes
    found = logit_correlation(products=logits.T @ logits, sums=logits.sum(0), tokens=50)
    assert_allclose(found[:3, :3], np.corrcoef(logits[:, :3].T), atol=1e-10)
    assert np.isnan(found[3]).all()
    with pytest.raises(MetricError, match="do not fit"):
        logit_correlation(products=np.eye(3), sums=np.zeros(2), tokens=5)


def test_weighted_outputs_are_bounded_by_meeting() -> None:
    # Two experts that answer alike with equal weight, on 10 tokens each, of which 5 in common.
    outputs, weights = np.ones((15, 3)), np.zeros((15, 2))
    weights[:10, 0], weights[5:, 1] = 0.5, 0.5
    gated = weights[:, :, None] * outputs[:, None]
    gram = np.einsum("tid,tjd->ij", gated, gated)
    assert normalised_gram(gram=gram)[0, 1] == pytest.approx(0.5)


@pytest.mark.parametrize("width", [1, 3, 64, 4096])
def test_random_directions(width: int) -> None:
    rng = np.random.default_rng(7)
    rows = rng.normal(size=(4000, width))
    cosine = np.abs((rows[::2] * rows[1::2]).sum(1)) / np.linalg.norm(rows[::2], axis=1)
    cosine /= np.linalg.norm(rows[1::2], axis=1)
    assert random_absolute_cosine(width) == pytest.approx(cosine.mean(), rel=0.06)
    assert random_absolute_cosine(width) == pytest.approx(np.sqrt(2 / (np.pi * width)), rel=0.26 / width)


def test_redundancy_by_hand() -> None:
    nan = np.nan
    matrix = np.array([[1, 0.95, 0.2, nan], [0.95, 1, 0.6, nan], [0.2, 0.6, 1, nan], [nan] * 4])
    found = redundancy(similarity=matrix)
    assert (found.pairs, found.first, found.second, found.largest) == (3, 0, 1, 0.95)
    assert found.mean == pytest.approx(1.75 / 3)
    assert found.above.tolist() == [2, 1, 1]
    assert found.quantiles[2] == 0.6
    assert redundancy(similarity=np.full((3, 3), nan)).pairs == 0
    with pytest.raises(MetricError, match="experts by experts"):
        redundancy(similarity=np.zeros((2, 3)))


def _symmetric(rng: np.random.Generator, size: int) -> Array:
    values = rng.normal(size=(size, size))
    return values + values.T


def test_agreement_and_its_chance() -> None:
    rng = np.random.default_rng(8)
    one, noise, other = (_symmetric(rng, 12) for _ in range(3))
    found = {
        (pair.first, pair.second): pair
        for pair in agreement(similarities={"one": one, "near": one + 0.5 * noise, "other": other, "cubed": one**3})
    }
    assert len(found) == 6
    lower = np.tril_indices(12, -1)
    near = found["one", "near"]
    assert near.spearman == pytest.approx(spearmanr(one[lower], (one + 0.5 * noise)[lower]).statistic)
    assert near.r_squared == pytest.approx(np.corrcoef(one[lower], (one + 0.5 * noise)[lower])[0, 1] ** 2)
    assert near.p_value == pytest.approx(1 / 500)
    assert near.spearman > near.high > 0 > near.low
    assert (found["one", "cubed"].spearman, found["one", "cubed"].kendall) == (pytest.approx(1), pytest.approx(1))
    assert found["one", "other"].p_value > 0.05
    assert found["one", "other"].low < found["one", "other"].spearman < found["one", "other"].high
    assert near.pairs == 66


def test_the_mantel_test_is_that_over_all_renamings() -> None:
    rng = np.random.default_rng(9)
    one = _symmetric(rng, 5)
    other = one + 1.5 * _symmetric(rng, 5)
    lower = np.tril_indices(5, -1)
    real = spearmanr(one[lower], other[lower]).statistic
    every = [spearmanr(one[lower], other[np.ix_(order, order)][lower]).statistic for order in permutations(range(5))]
    (found,) = agreement(similarities={"one": one, "other": other}, permutations=4000, seed=1)
    assert found.p_value == pytest.approx(np.mean(np.array(every) >= real - 1e-12), abs=0.025)
    assert found.low == pytest.approx(np.quantile(every, 0.025), abs=0.06)
    assert found.high == pytest.approx(np.quantile(every, 0.975), abs=0.06)


def test_shared_experts_do_not_pass_for_agreement() -> None:
    """Two matrices in which every pair depends on its experts alone: a test of pairs would be sure, renaming is not."""
    rng, sure, below = np.random.default_rng(10), 0, 0
    for _ in range(60):
        one, other = (np.add.outer(size, size) for size in rng.normal(size=(2, 14)))
        (pair,) = agreement(similarities={"one": one, "other": other}, permutations=99)
        lower = np.tril_indices(14, -1)
        sure += spearmanr(one[lower], other[lower]).pvalue < 0.05
        below += pair.p_value <= 0.05
    assert sure > 15
    assert below <= 9


def test_pairs_that_are_missing_are_left_out() -> None:
    rng = np.random.default_rng(11)
    one = _symmetric(rng, 10)
    few = np.where(np.abs(one) > np.quantile(np.abs(one), 0.6), one, np.nan)
    (found,) = agreement(similarities={"one": one, "few": few})
    lower = np.tril_indices(10, -1)
    assert found.pairs == np.isfinite(few[lower]).sum() < 45
    assert found.spearman == pytest.approx(1.0)
    assert found.p_value == pytest.approx(1 / 500)
    (none,) = agreement(similarities={"one": one, "same": np.ones((10, 10))})
    assert np.isnan(none.spearman)
    assert np.isnan(none.p_value)
    assert agreement(similarities={}) == []
    with pytest.raises(MetricError, match="experts by experts"):
        agreement(similarities={"one": one, "small": np.ones((4, 4))})


def test_clustered_order_keeps_groups_together() -> None:
    group = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2])
    matrix = np.where(group[:, None] == group[None], 0.9, 0.1) + 0.01 * _symmetric(np.random.default_rng(12), 9)
    ordered = group[clustered_order(similarity=matrix)]
    assert (np.diff(ordered) != 0).sum() == 2
    assert sorted(clustered_order(similarity=matrix)) == list(range(9))
    # A chain: optimal leaf ordering puts it in its order, whatever the tree.
    chain = -np.abs(np.subtract.outer(np.arange(8), np.arange(8))).astype(float)
    shuffle = np.random.default_rng(13).permutation(8)
    found = shuffle[clustered_order(similarity=chain[np.ix_(shuffle, shuffle)])]
    assert found.tolist() in (list(range(8)), list(range(8))[::-1])
    missing: Any = np.full((4, 4), np.nan)
    assert clustered_order(similarity=missing).tolist() == [0, 1, 2, 3]
    missing[0, 2] = missing[2, 0] = 0.5
    assert abs(int(np.diff(np.argsort(clustered_order(similarity=missing))[[0, 2]])[0])) == 1


def test_nearest_neighbours() -> None:
    nan = np.nan
    matrix = np.array([[1, 0.2, 0.9, 0.2], [0.2, 1, nan, nan], [0.9, nan, 1, 0.9], [0.2, nan, 0.9, 1]])
    assert nearest(similarity=matrix, count=2).tolist() == [[2, 1], [0, -1], [0, 3], [2, 0]]
    assert nearest(similarity=np.ones((1, 1)), count=3).shape == (1, 0)
