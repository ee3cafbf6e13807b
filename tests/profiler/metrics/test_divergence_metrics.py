"""Means over items with their intervals, against plain formulas and known cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moescope.errors import MetricError
from profiler.metrics.divergence import accuracy_difference, kl_divergence, top1_agreement


def test_all_tokens_count_alike() -> None:
    rng = np.random.default_rng(0)
    tokens = [rng.exponential(0.1, length) for length in rng.integers(1, 50, 40)]
    found = kl_divergence(divergence_sum=[part.sum() for part in tokens], predictions=[len(part) for part in tokens])
    assert found.value == pytest.approx(np.concatenate(tokens).mean())
    assert found.low < found.value < found.high


def test_the_interval_covers() -> None:
    # 300 draws of 60 sequences from a known mean: a 95 % interval misses it about 15 times.
    rng = np.random.default_rng(1)
    hits = 0
    for draw in range(300):
        agreed = rng.binomial(20, 0.7, 60)
        found = top1_agreement(agreed=agreed, predictions=np.full(60, 20), num_resamples=400, seed=draw)
        hits += found.low <= 0.7 <= found.high
    assert 270 <= hits <= 298


def test_the_interval_of_equal_sequences_has_no_width() -> None:
    found = kl_divergence(divergence_sum=np.array([2.0, 4.0, 8.0, 0.0]), predictions=[1, 2, 4, 0])
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)


def test_its_width_is_that_of_the_mean() -> None:
    rng = np.random.default_rng(2)
    values = rng.normal(1.0, 0.3, 2000)
    found = kl_divergence(divergence_sum=values * 10, predictions=np.full(2000, 10))
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.3 / np.sqrt(2000), rel=0.1)


def test_pairs_are_sharper_than_their_parts() -> None:
    rng = np.random.default_rng(3)
    base = rng.binomial(100, rng.uniform(0.2, 0.8, 50))
    hits = np.maximum(base - 5, 0)
    found = accuracy_difference(hits=hits, base_hits=base, items=np.full(50, 100))
    assert found.value == found.low == found.high == pytest.approx(-0.05)
    alone = top1_agreement(agreed=base, predictions=np.full(50, 100))
    assert alone.high - alone.low > 0.05


def test_one_sequence_has_no_interval() -> None:
    found = top1_agreement(agreed=[3], predictions=[4])
    assert found.value == 0.75 and np.isnan(found.low) and np.isnan(found.high)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"divergence_sum": [1.0], "predictions": [1, 2]}, "one value per sequence"),
        ({"divergence_sum": [0.0, 0.0], "predictions": [0, 0]}, "nothing to take a mean of"),
        ({"divergence_sum": [np.nan, 0.0], "predictions": [1, 1]}, "NaN or infinity"),
        ({"divergence_sum": [1.0, 0.0], "predictions": [-1, 1]}, "0 or more"),
        ({"divergence_sum": [1.0, 0.0], "predictions": [1, 1], "confidence": 1.0}, "confidence is 1.0"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MetricError, match=message):
        kl_divergence(**arguments)
