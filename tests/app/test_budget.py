"""What is kept between reruns is bounded by its bytes, made once, and gone with its run."""

from __future__ import annotations

import gc
import threading

import numpy as np
import plotly.graph_objects as go
import polars as pl
import pytest

from app.budget import Budget, Kept, size_of

MIB = 1 << 20


def array(mib: int) -> np.ndarray:
    return np.zeros(mib * MIB, np.uint8)


def test_the_longest_unasked_goes_first() -> None:
    budget, places, made = Budget(10 * MIB), [Kept("a") for _ in range(4)], []

    def take(number: int) -> np.ndarray:
        def make() -> np.ndarray:
            made.append(number)
            return array(3)

        return places[number].take(make, budget)

    for number in (0, 1, 2, 0, 3, 0, 1):
        assert take(number).nbytes == 3 * MIB
        assert budget.bytes <= 10 * MIB
    assert made == [0, 1, 2, 3, 1]  # 1 had to go for 3, 0 was asked for in between
    assert [bool(place) for place in places] == [True, True, False, True]


def test_what_is_larger_than_all_is_kept_until_the_next() -> None:
    budget, large, small = Budget(MIB), Kept("a"), Kept("a")
    first = large.take(lambda: array(2), budget)
    assert large.take(lambda: array(2), budget) is first
    small.take(lambda: array(1), budget)
    assert not large and small


def test_it_goes_with_its_run_and_with_its_place() -> None:
    budget, places = Budget(), [Kept("a"), Kept("b"), Kept("b")]
    for place in places:
        place.take(lambda: array(1), budget)
    budget.let_go("b")
    assert [bool(place) for place in places] == [True, False, False] and budget.bytes == MIB + size_of(None)
    del places[0], place
    gc.collect()
    assert budget.bytes == 0


def test_of_those_who_ask_at_once_one_makes_it() -> None:
    budget, place, made, both = Budget(), Kept("a"), [], threading.Barrier(4)

    def ask() -> None:
        both.wait()
        place.take(lambda: made.append(threading.get_ident()) or array(1), budget)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_an_error_is_not_kept() -> None:
    budget, place = Budget(), Kept("a")
    with pytest.raises(ZeroDivisionError):
        place.take(lambda: 1 / 0, budget)
    assert place.take(lambda: 2, budget) == 2


def test_sizes_are_near_the_truth() -> None:
    frame = pl.DataFrame({"a": np.zeros(MIB), "b": ["text"] * MIB})
    assert size_of({"x": frame, "y": [frame]}) >= 2 * frame.estimated_size() > 16 * MIB
    figure = go.Figure(go.Scatter(y=np.zeros(MIB)))
    assert 8 * MIB <= size_of(figure) < 9 * MIB
    rows = [{"name": "n" * 100, "value": 1.5} for _ in range(10_000)]
    assert 3 * MIB < size_of(rows) < 6 * MIB
    ring: list[object] = []
    ring.append(ring)
    assert size_of(ring) < 1000
