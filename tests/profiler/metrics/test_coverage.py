"""Whether the text is enough: hand-computed values, and drawn texts whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from moescope.errors import MetricError
from profiler.metrics import coverage
from profiler.metrics.agreement import spearman


def test_reach_by_hand() -> None:
    found = coverage.reach(counts=[100, 90, 9, 1, 0], top_k=2, tokens=100)
    assert (found.balanced, found.threshold) == (40.0, 4.0)
    assert found.starved.tolist() == [False, False, False, True, True]
    assert found.unused.tolist() == [False, False, False, False, True]
    # One token in a hundred: four take four hundred. Of none: a rate below 3 in 100, so at least 4 x 100 / 3.
    assert found.needed.tolist() == pytest.approx([100, 100, 100, 400, 400 / 3])


def test_errors_by_hand_and_by_drawing() -> None:
    assert coverage.tokens_for_error(error=0.1, variation=2.0) == pytest.approx(400)
    values = np.random.default_rng(0).gamma(2.0, size=5000)
    found = coverage.token_error(counts=[5000], sums=[values.sum()], square_sums=[(values**2).sum()])
    assert found[0] == pytest.approx(values.std(ddof=1) / values.mean() / np.sqrt(5000), rel=1e-9)


def test_part_error_is_what_repeated_texts_show() -> None:
    generator = np.random.default_rng(1)
    parts, texts = 16, 4000
    counts = generator.poisson(40.0, size=(texts, parts)) + 1
    sums = counts * 3.0 + generator.normal(size=counts.shape) * np.sqrt(counts)
    ratio = sums.sum(1) / counts.sum(1)
    truth = ratio.std() / ratio.mean()
    found = coverage.part_error(sums=sums, counts=counts)
    # Each estimate rests on 15 differences; their mean is within a few per cent.
    assert float(np.mean(found)) == pytest.approx(truth, rel=0.05)
    total = sums.sum(1)
    assert float(np.mean(coverage.part_error(sums=sums))) == pytest.approx(total.std() / total.mean(), rel=0.05)


def test_scores_of_chosen_parts() -> None:
    parts = {"tokens": np.array([[1, 3], [0, 2]]), "norm_sum": np.array([[2.0, 6.0], [0.0, 8.0]])}
    chosen = np.array([[True, False], [True, True]])
    np.testing.assert_allclose(coverage.score(parts=parts, name="frequency", chosen=chosen), [[1, 0], [4, 2]])
    np.testing.assert_allclose(coverage.score(parts=parts, name="man", chosen=chosen), [[2, 0], [2, 4]])
    assert coverage.available(parts) == ["frequency", "ean", "man"]
    with pytest.raises(MetricError, match="takes gate_sum"):
        coverage.score(parts=parts, name="gate_mass")
    with pytest.raises(MetricError, match="no score 'x'"):
        coverage.score(parts=parts, name="x")


def test_pairs_are_disjoint_and_of_their_sizes() -> None:
    first, second = coverage.draw_pairs(num_parts=16, size=3, other=8, num_draws=50)
    assert (first.sum(1) == 3).all() and (second.sum(1) == 8).all() and not (first & second).any()
    with pytest.raises(MetricError, match="cannot be drawn"):
        coverage.draw_pairs(num_parts=16, size=9, other=8, num_draws=1)


def test_spearman_brown_by_hand() -> None:
    assert float(coverage.lengthened(agreement=0.5, factor=2)) == pytest.approx(2 / 3)
    assert float(coverage.length_for(agreement=0.5, target=2 / 3)) == pytest.approx(2.0)
    assert float(coverage.lengthened(agreement=0.7, factor=1)) == pytest.approx(0.7)
    assert np.isinf(coverage.length_for(agreement=0.0)) and np.isnan(coverage.length_for(agreement=np.nan))
    with pytest.raises(MetricError, match="target is 1.5"):
        coverage.length_for(agreement=0.5, target=1.5)


def test_the_text_that_is_asked_for_is_enough() -> None:
    """Experts with true rates: texts of the length that halves of a short one ask for agree as far as they should."""
    generator = np.random.default_rng(2)
    rates = generator.gamma(30.0, size=64)
    rates /= rates.sum()
    short = 2_000
    agreements = []
    for _ in range(200):
        counts = generator.multinomial(short // 2, rates, size=2)
        agreements.append(float(spearman(first=counts[0], second=counts[1])))
    whole = coverage.lengthened(agreement=np.mean(agreements), factor=2)
    length = int(short * float(coverage.length_for(agreement=whole, target=0.9)))
    assert length > 3 * short  # the short text is far from enough, so this extrapolates
    long = generator.multinomial(length, rates, size=(200, 2))
    reached = np.mean([float(spearman(first=one, second=other)) for one, other in long])
    assert reached == pytest.approx(0.9, abs=0.03)


def test_counts_by_part() -> None:
    counts = np.array([[1, 0], [2, 5], [4, 1]])
    found = coverage.parts_of_counts(counts=counts, part=np.array([1, 0, 1]), num_parts=3)
    assert found.tolist() == [[2, 5, 0], [5, 1, 0]]
