"""What every control keeps, and what it destroys."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from simulators import random_selections, real_lengths

from moescope.errors import MetricError
from profiler.metrics.controls import shuffle_across_sequences, shuffle_within_sequences, uniform_experts
from profiler.metrics.local_consistency import srp

CONTROLS = [shuffle_within_sequences, shuffle_across_sequences, uniform_experts]


def tokens(selections: NDArray[np.int64], sequence: int) -> list[tuple[int, ...]]:
    """The tokens of a sequence, all layers of each, sorted."""
    length = real_lengths(selections)[sequence]
    return sorted(tuple(selections[:, sequence, token].ravel()) for token in range(length))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_shuffles_keep_every_token_whole(seed: int) -> None:
    selections = random_selections(seed)
    real = np.arange(selections.shape[2]) < np.array(real_lengths(selections))[:, None]
    selections[0, :, :, 0] = np.where(real, np.maximum(selections[0, :, :, 0], 0), -1)  # no token without any expert
    within = shuffle_within_sequences(selections=selections, num_experts=6, seed=seed)
    across = shuffle_across_sequences(selections=selections, num_experts=6, seed=seed)
    for shuffled in (within, across):
        assert shuffled.shape == selections.shape and shuffled.dtype == selections.dtype
    for sequence in range(selections.shape[1]):
        assert tokens(within, sequence) == tokens(selections, sequence)
    everything = [sum((tokens(one, sequence) for sequence in range(3)), []) for one in (selections, across)]
    assert sorted(everything[0]) == sorted(everything[1])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 6))
def test_uniform_keeps_padding_and_numbers(seed: int, k: int) -> None:
    selections = random_selections(seed, k=k)
    drawn = uniform_experts(selections=selections, num_experts=6, seed=seed)
    np.testing.assert_array_equal(drawn >= 0, selections >= 0)
    assert drawn.max() < 6 and drawn.dtype == selections.dtype
    for used in drawn.reshape(-1, k):
        assert len(set(used[used >= 0])) == (used >= 0).sum()


def test_uniform_is_uniform() -> None:
    drawn = uniform_experts(selections=np.zeros((1, 1, 60_000, 3), dtype=np.int16), num_experts=5, seed=2)
    for rank in range(3):
        shares = np.bincount(drawn[..., rank].ravel(), minlength=5) / 60_000
        np.testing.assert_allclose(shares, 0.2, atol=0.008)  # 5 standard deviations


@pytest.mark.parametrize("control", CONTROLS)
def test_seeded(control: Callable[..., NDArray[np.int64]]) -> None:
    selections = random_selections(0, tokens=30)
    first, again, other = (control(selections=selections, num_experts=6, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_each_control_takes_its_share() -> None:
    """Texts with topics, in phases: each control removes one cause of local consistency."""
    generator = np.random.default_rng(0)
    sequence, position = np.indices((60, 128))
    topic = (sequence * 2 + position // 64) % 8  # each half of a text has its own pair of experts
    topic = np.where(generator.random(topic.shape) < 0.2, 0, topic)
    selections = np.stack([2 * topic, 2 * topic + 1], axis=-1)[None]
    found = [srp(selections=selections, num_experts=16, segment_length=16)]
    for control in CONTROLS:
        shuffled = control(selections=selections, num_experts=16, seed=0)
        found.append(srp(selections=shuffled, num_experts=16, segment_length=16))
    values = [float(one.value) for one in found]
    assert values[0] > values[1] + 0.05 > values[2] + 0.1 > values[3] + 0.12


@pytest.mark.parametrize("control", CONTROLS)
def test_says_what_is_wrong(control: Callable[..., NDArray[np.int64]]) -> None:
    with pytest.raises(MetricError, match="holds id 6; with 6 experts"):
        control(selections=np.full((1, 1, 2, 1), 6), num_experts=6, seed=0)
