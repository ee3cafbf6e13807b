"""Perplexity, its interval and its ratio against plain formulas, and the decay of attention sinks by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moescope.errors import MetricError
from profiler.metrics.perplexity import perplexity, perplexity_ratio, sink_decay


def test_all_tokens_count_alike() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 50, 40)
    tokens = [rng.exponential(2.0, length) for length in lengths]
    found = perplexity(loss_sum=[part.sum() for part in tokens], predictions=lengths)
    assert found.value == pytest.approx(np.exp(np.concatenate(tokens).mean()))
    assert found.low < found.value < found.high


def test_the_interval_covers() -> None:
    # 300 draws of 60 sequences from a known mean: a 95 % interval misses it about 15 times.
    rng = np.random.default_rng(1)
    hits = 0
    for draw in range(300):
        loss = rng.normal(2.0, 0.5, 60) * 20
        found = perplexity(loss_sum=loss, predictions=np.full(60, 20), num_resamples=400, seed=draw)
        hits += found.low <= np.exp(2.0) <= found.high
    assert 270 <= hits <= 298


def test_pairs_are_sharper_than_single_intervals() -> None:
    rng = np.random.default_rng(2)
    counts = np.full(50, 100)
    base = rng.normal(300, 60, 50)
    after = base + rng.normal(1.0, 0.2, 50)
    found = perplexity_ratio(loss_sum=after, base_loss_sum=base, predictions=counts)
    assert found.value == pytest.approx(np.exp((after - base).sum() / counts.sum()))
    assert 1.0 < found.low < found.value < found.high < 1.02
    assert perplexity(loss_sum=after, predictions=counts).low < perplexity(loss_sum=base, predictions=counts).value


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    found = perplexity(loss_sum=np.log(512) * np.array([3, 5, 0]), predictions=[3, 5, 0])
    assert found.value == found.low == found.high == pytest.approx(512)
    alone = perplexity(loss_sum=[4.0], predictions=[2])
    assert alone.value == pytest.approx(np.exp(2))
    assert np.isnan(alone.low) and np.isnan(alone.high)


def test_sink_decay_by_hand() -> None:
    assert sink_decay(sink_sum=[1.0, 3.0], base_sink_sum=[4.0, 4.0]) == pytest.approx(1 - (0.25 + 0.75) / 2)
    assert sink_decay(sink_sum=[4.0, 4.0], base_sink_sum=[4.0, 4.0]) == 0.0
    assert sink_decay(sink_sum=[0.0, 1.0], base_sink_sum=[4.0, 0.0]) == 1.0  # a head that never looked is left out
    assert sink_decay(sink_sum=[8.0], base_sink_sum=[4.0]) == -1.0
    assert np.isnan(sink_decay(sink_sum=[1.0], base_sink_sum=[0.0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_sum": [1.0], "predictions": [1, 2]}, "one value per sequence"),
        ({"loss_sum": [1.0, np.nan], "predictions": [1, 2]}, "NaN or infinity"),
        ({"loss_sum": [0.0], "predictions": [0]}, "at least two tokens"),
        ({"loss_sum": [1.0, 2.0], "predictions": [3, 4], "num_resamples": 1}, "at least 2"),
    ],
)
def test_says_what_is_wrong(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MetricError, match=message):
        perplexity(**arguments)


def test_heads_must_be_the_same() -> None:
    with pytest.raises(MetricError, match="one value per head"):
        sink_decay(sink_sum=[1.0], base_sink_sum=[1.0, 2.0])
