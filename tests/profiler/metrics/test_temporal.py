"""Repeat rates against a count of pairs."""

from __future__ import annotations

import numpy as np
import pytest
from simulators import random_selections, real_lengths

from moescope.errors import MetricError
from profiler.metrics.controls import uniform_experts
from profiler.metrics.temporal import repeat_rates


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("lag", [1, 3])
def test_equals_counting_pairs(seed: int, lag: int) -> None:
    selections = random_selections(seed, k=3)
    found = repeat_rates(selections=selections, num_experts=6, lag=lag)
    for layer in range(2):
        first, overlap, mean = [], [], []
        for sequence, length in enumerate(real_lengths(selections)):
            for token in range(lag, length):
                before = [e for e in selections[layer, sequence, token - lag] if e >= 0]
                after = [e for e in selections[layer, sequence, token] if e >= 0]
                if before and after:
                    common = set(before) & set(after)
                    first.append(before[0] == after[0])
                    overlap.append(bool(common))
                    mean.append(len(common) / len(after))
        assert found.pairs[layer] == len(first)
        expected = [np.mean(first), np.mean(overlap), np.mean(mean)]
        assert [found.first_choice[layer], found.any_overlap[layer], found.mean_overlap[layer]] == pytest.approx(
            expected
        )


def test_chance_values() -> None:
    drawn = uniform_experts(selections=np.zeros((1, 20, 1000, 2), dtype=np.int16), num_experts=8, seed=0)
    found = repeat_rates(selections=drawn, num_experts=8)
    assert found.first_choice_chance == 1 / 8
    assert found.any_overlap_chance == pytest.approx(0.464, abs=5e-4)  # printed for 8 experts, top 2
    assert found.mean_overlap_chance == 1 / 4
    assert found.first_choice[0] == pytest.approx(1 / 8, abs=0.012)
    assert found.any_overlap[0] == pytest.approx(found.any_overlap_chance, abs=0.018)
    assert found.mean_overlap[0] == pytest.approx(1 / 4, abs=0.012)


def test_layers_without_pairs_are_nan() -> None:
    selections = random_selections(0, ragged=False)
    selections[1] = -1
    found = repeat_rates(selections=selections, num_experts=6)
    assert np.isnan(found.mean_overlap[1]) and found.pairs[1] == 0


@pytest.mark.parametrize("lag", [0, 14])
def test_says_what_is_wrong(lag: int) -> None:
    with pytest.raises(MetricError, match=f"lag is {lag}; the longest sequence has 14 tokens"):
        repeat_rates(selections=random_selections(0), num_experts=6, lag=lag)
