"""Kendall's tau-b of many pairs of short rankings at once.

This module imports numba; import it inside the function that needs it.
"""

from __future__ import annotations

import numpy as np

from ._arrays import FloatArray
from ._stack import compiled


@compiled
def kendall_rows(first: FloatArray, second: FloatArray) -> FloatArray:
    """tau-b of each row, NaN where all experts of one side are tied; both (rows, experts)."""
    rows, experts = first.shape
    result = np.empty(rows)
    for row in range(rows):
        score, one_sided, other_sided = 0.0, 0, 0
        for i in range(1, experts):
            for j in range(i):
                a = np.sign(first[row, i] - first[row, j])
                b = np.sign(second[row, i] - second[row, j])
                score += a * b
                one_sided += a != 0
                other_sided += b != 0
        below = np.sqrt(float(one_sided) * float(other_sided))
        result[row] = score / below if below > 0 else np.nan
    return result
