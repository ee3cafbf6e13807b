"""Kernels on the router probabilities of one token: exponentials, entropy, the largest entries.

Exponentials and logarithms are polynomials, which run in the vector unit: relative error below 2e-7, where stored
logits are rounded to 16 bits. Numbers from 0 on are compared as the integers that their bits spell: same order.

This module imports numba; import it inside the function that needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

from profiler.metrics._arrays import IntArray
from profiler.metrics._stack import compiled

Ids = NDArray[np.int16]
Values32 = NDArray[np.float32]
Bits = NDArray[np.signedinteger[Any]]
_Function = TypeVar("_Function", bound=Callable[..., Any])

GROUP = 16
"""Entries that are looked at together; rows for :func:`take` are padded to a multiple, with -1."""

_LOG2E, _LN2_HIGH, _LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
_MAGIC, MAGIC_BITS = np.float32(12582912.0), np.int32(0x4B400000)  # 1.5 x 2^23: what is added to it becomes whole
_E2, _E3, _E4 = np.float32(5.0000001201e-1), np.float32(1.6666665459e-1), np.float32(4.1665795894e-2)
_E5, _E6, _E7 = np.float32(8.3334519073e-3), np.float32(1.3981999507e-3), np.float32(1.9875691500e-4)
_ROOT_HALF = np.int32(0x3F3504F3)
_LN2, _ONE = np.float32(0.69314718), np.float32(1)
_THIRD, _FIFTH, _SEVENTH = np.float32(1 / 3), np.float32(1 / 5), np.float32(1 / 7)


def reordered(function: _Function) -> _Function:
    """As ``compiled``; sums may be taken in any order and divisors are not looked at first, so that both run in the
    vector unit."""
    options: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc", "contract"}, "error_model": "numpy"}
    try:
        return cast(_Function, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # a read-only installation without a writable home
        return cast(_Function, numba.njit(**options)(function))


def within(function: _Function) -> _Function:
    """To become part of the kernels that call it: called once for each token."""
    return cast(_Function, numba.njit(inline="always", error_model="numpy")(function))


@compiled
def exponentials(values: Values32, shifted: Values32, least: float) -> None:
    """Replace values by e^value / 2^n and write n, in the low bits of a number, to ``shifted``.

    Args:
        values: (n,) of at most 80.
        least: smaller ones count as this.
    """
    floor = np.float32(least)
    for place in range(len(values)):
        value = max(values[place], floor)
        whole = value * _LOG2E + _MAGIC
        shifted[place] = whole
        number = whole - _MAGIC
        part = value - number * _LN2_HIGH - number * _LN2_LOW
        tail = ((((_E7 * part + _E6) * part + _E5) * part + _E4) * part + _E3) * part + _E2
        values[place] = tail * part * part + part + _ONE


@compiled
def scale_32(values: Values32, whole: NDArray[np.int32], powers: NDArray[np.int32], factors: Values32) -> None:
    """Multiply by 2^n: ``whole`` are the bits of what :func:`exponentials` wrote, ``powers`` those of ``factors``."""
    for place in range(len(values)):
        powers[place] = (whole[place] - MAGIC_BITS + np.int32(127)) << np.int32(23)
    for place in range(len(values)):
        values[place] *= factors[place]


@within
def entropy(
    values: Values32, bits: NDArray[np.int32], powers: NDArray[np.int32], rest: NDArray[np.int32], mantissas: Values32
) -> float:
    """-sum v ln v of values from 0 on; ``bits`` are those of ``values``, ``powers`` and ``rest``, the bits of
    ``mantissas``, are scratch."""
    for place in range(len(values)):
        shifted = bits[place] - _ROOT_HALF
        powers[place] = shifted >> np.int32(23)
        rest[place] = (shifted & np.int32(0x7FFFFF)) + _ROOT_HALF
    total = np.float32(0)
    for place in range(len(values)):
        # ln m = 2 artanh((m - 1) / (m + 1)), m from sqrt(1/2) to sqrt(2)
        near = (mantissas[place] - _ONE) / (mantissas[place] + _ONE)
        square = near * near
        tail = _ONE + square * (_THIRD + square * (_FIFTH + square * _SEVENTH))
        total -= values[place] * (np.float32(powers[place]) * _LN2 + (near + near) * tail)
    return float(total)


@within
def _insert(item: int, value: int, size: int, wanted: int, worth: IntArray, chosen: IntArray) -> int:
    """Put an expert among the ``wanted`` best so far, behind those of equal worth; return how many there are."""
    at = size if size < wanted else size - 1
    while at > 0 and worth[at - 1] < value:
        worth[at] = worth[at - 1]
        chosen[at] = chosen[at - 1]
        at -= 1
    worth[at] = value
    chosen[at] = item
    return size + 1 if size < wanted else size


@within
def take(bits: Bits, ids: Ids, first: int, wanted: int, worth: IntArray, chosen: IntArray) -> None:
    """Write the ``wanted`` experts with the largest values to ``chosen``, in descending order.

    Of equal values the expert is taken that stands first among the ``first`` first ``ids``; the others come after, in
    order.

    Args:
        bits: (E,) of the values, padded; used up.
        ids: (m,) experts that are likely.
        worth, chosen: (wanted,) or longer.
    """
    size, least = 0, -1
    for place in range(first):
        item = ids[place]
        if item < 0:
            break
        value = bits[item]
        bits[item] = -1
        if size < wanted or value > least:
            size = _insert(item, value, size, wanted, worth, chosen)
            if size == wanted:
                least = worth[size - 1]
    for start in range(0, len(bits), GROUP):
        most = bits[start]
        for item in range(start + 1, start + GROUP):
            most = max(most, bits[item])
        if most <= least or most < 0:
            continue
        for item in range(start, start + GROUP):
            value = bits[item]
            if value > least and value >= 0:
                size = _insert(item, value, size, wanted, worth, chosen)
                if size == wanted:
                    least = worth[size - 1]
