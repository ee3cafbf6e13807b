"""Flips by hand, and measures of generated text against texts that were counted by hand and brute force."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from moescope.errors import MetricError
from profiler.metrics.flips import flips
from profiler.metrics.generated_text import distinct_ngrams, first_difference, longest_loop, repeated_ngrams


def test_flips_by_hand() -> None:
    found = flips(selections=[10, 30], agreed=[6, 20], gone=[2, 4])
    assert found.selections == 40
    assert found.agreement.value == pytest.approx(26 / 40)
    assert found.forced.value == pytest.approx(6 / 40)
    assert found.free.value == pytest.approx(8 / 34)
    assert found.agreement.low <= found.agreement.value <= found.agreement.high


def test_where_no_expert_is_left_nothing_can_flip_freely() -> None:
    found = flips(selections=[3, 4], agreed=[0, 0], gone=[3, 4])
    assert (found.agreement.value, found.forced.value) == (0.0, 1.0)
    assert math.isnan(found.free.value)


def test_flips_that_cannot_be() -> None:
    with pytest.raises(MetricError, match="do not exceed"):
        flips(selections=[3, 4], agreed=[2, 2], gone=[2, 2])
    with pytest.raises(MetricError, match="one per sequence"):
        flips(selections=[3, 4], agreed=[2], gone=[1, 1])


def test_repetition_by_hand() -> None:
    # a b c d a b c d a: the 4-grams abcd bcda cdab dabc abcd bcda, 4 of 6 different.
    text = [1, 2, 3, 4, 1, 2, 3, 4, 1]
    assert repeated_ngrams(text, 4) == pytest.approx(2 / 6)
    assert distinct_ngrams(text, 1) == pytest.approx(4 / 9)
    assert distinct_ngrams(text, 2) == pytest.approx(4 / 8)
    assert repeated_ngrams(range(20), 4) == 0.0
    assert repeated_ngrams([7] * 20, 4) == pytest.approx(16 / 17)
    assert math.isnan(repeated_ngrams([1, 2, 3], 4)) and math.isnan(distinct_ngrams([], 1))


def test_loops_by_hand() -> None:
    assert longest_loop([1, 2, 3, 2, 3, 2, 4]) == 5  # 2 3 2 3 2
    assert longest_loop([5, 5]) == 2
    assert longest_loop([1, 2, 3, 1, 2]) == 0  # the piece 1 2 3 is not said twice
    assert longest_loop([1, 2, 3, 1, 2, 3]) == 6
    assert longest_loop(list(range(9))) == longest_loop([]) == longest_loop([1]) == 0
    assert longest_loop([9, *[1, 2] * 10, 8]) == 20


def test_loops_against_every_stretch() -> None:
    def by_brute_force(text: tuple[int, ...]) -> int:
        longest = 0
        for start, stop in product(range(len(text)), range(len(text) + 1)):
            part = text[start:stop]
            for period in range(1, len(part) // 2 + 1):
                if all(part[place] == part[place - period] for place in range(period, len(part))):
                    longest = max(longest, len(part))
        return longest

    rng = np.random.default_rng(0)
    for _ in range(60):
        text = tuple(rng.integers(0, 3, 14).tolist())
        assert longest_loop(text) == by_brute_force(text)


def test_where_two_texts_part() -> None:
    assert first_difference([1, 2, 3], [1, 2, 4]) == 2
    assert first_difference([1, 2, 3], [1, 2, 3]) == 3
    assert first_difference([1, 2, 3], [1, 2]) == 2
    assert first_difference([1], [2]) == first_difference([], [2]) == 0
