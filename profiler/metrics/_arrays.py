"""Array types, a division that says what 0 / 0 is, and n log n."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
Ids = NDArray[np.signedinteger[Any]]


def ratio(numerator: ArrayLike, denominator: ArrayLike, *, empty: float = np.nan) -> FloatArray:
    """numerator / denominator, broadcast; ``empty`` where the denominator is not positive."""
    above, below = np.broadcast_arrays(np.asarray(numerator, dtype=np.float64), np.asarray(denominator, np.float64))
    result = np.full(above.shape, empty, dtype=np.float64)
    np.divide(above, below, out=result, where=below > 0)
    return result


def x_log_x(values: ArrayLike) -> FloatArray:
    """x log2 x of every entry, 0 for 0: what entropies are sums of."""
    numbers = np.asarray(values, dtype=np.float64)
    result: FloatArray = numbers * np.log2(np.where(numbers > 0, numbers, 1.0))
    return result
