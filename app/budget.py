"""What is kept between reruns, bounded by its bytes: what was not asked for the longest goes first."""

from __future__ import annotations

import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl

BYTES = 512 << 20
"""Of everything that is kept. What is larger than that alone is kept until something else is."""

_SAMPLE = 100
"""Entries of a long list that its size is estimated from."""
_NOTHING = object()


class Kept:
    """A place for one result, which is made when it is first asked for, and again after it had to go."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.size = 0
        self._value: Any = _NOTHING
        self._lock = threading.RLock()

    def __bool__(self) -> bool:
        """Whether it holds something."""
        return self._value is not _NOTHING

    def take(self, make: Callable[[], Any], budget: Budget) -> Any:
        """What it holds; made first where it holds nothing, by one of those who ask at once."""
        with self._lock:
            value = self._value
            if value is _NOTHING:
                value = self._value = make()
                self.size = size_of(value)
        budget.used(self)
        return value

    def let_go(self) -> None:
        """Hold nothing; who has taken it before keeps it."""
        self._value, self.size = _NOTHING, 0


class Budget:
    """All that is kept in one process.

    Args:
        most: bytes that it may hold.
    """

    def __init__(self, most: int = BYTES) -> None:
        self.most = most
        self._order: OrderedDict[int, weakref.ref[Kept]] = OrderedDict()
        self._lock = threading.Lock()

    def used(self, kept: Kept) -> None:
        """Note that something was asked for, and let go what is over."""
        with self._lock:
            self._order[id(kept)] = weakref.ref(kept)
            self._order.move_to_end(id(kept))
            held = self._held()
            over = sum(one.size for one in held if one) - self.most
            for one in held[:-1]:
                if over <= 0:
                    break
                over -= one.size
                self._let_go(one)

    def let_go(self, path: str) -> None:
        """Let go of everything that came from a run that is not there any more, or is there anew."""
        with self._lock:
            for one in self._held():
                if one.path == path:
                    self._let_go(one)

    @property
    def bytes(self) -> int:
        """What is held now."""
        with self._lock:
            return sum(one.size for one in self._held() if one)

    def _held(self) -> list[Kept]:
        found = {number: one() for number, one in self._order.items()}
        for number in [number for number, one in found.items() if one is None]:
            del self._order[number]
        return [one for one in found.values() if one is not None]

    def _let_go(self, one: Kept) -> None:
        one.let_go()
        self._order.pop(id(one), None)


def size_of(value: Any) -> int:
    """About how many bytes a result takes: frames and arrays exactly, long lists from their first entries."""
    return _size(value, set())


def _size(value: Any, seen: set[int]) -> int:
    if isinstance(value, pl.DataFrame | pl.Series):
        return int(value.estimated_size())
    if isinstance(value, np.ndarray):
        return int(value.nbytes)
    if value is None or isinstance(value, int | float | type) or callable(value):
        return 0
    if isinstance(value, str | bytes):
        return sys.getsizeof(value)
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, go.Figure):
        return _size([value._data, value._layout], seen)
    if isinstance(value, Mapping):
        return sys.getsizeof(value) + _many([*value.values()], seen)
    if isinstance(value, list | tuple | set | frozenset):
        return sys.getsizeof(value) + _many([*value], seen)
    return sys.getsizeof(value) + _size(getattr(value, "__dict__", None), seen)


def _many(values: list[Any], seen: set[int]) -> int:
    few = values[:_SAMPLE]
    return int(sum(_size(one, seen) for one in few) * (len(values) / len(few))) if few else 0
