"""The loop that compares tokens with earlier ones, compiled.

This module imports numba; import it inside the function that needs it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._arrays import FloatArray, IntArray
from ._stack import compiled


@compiled
def count_repeats(
    ids: NDArray[Any], offsets: IntArray, lags: IntArray, group: IntArray, num_experts: int, sums: FloatArray
) -> None:
    """Add to sums (lags, groups, 4), for every pair of tokens of a sequence a lag apart that both use experts: whether
    their first choices agree, whether they share an expert, shared experts over those of the later token, and 1.

    ids (tokens, k), -1 = none, sequence after sequence; offsets (sequences + 1,); group (sequences,).
    """
    seen = np.full(num_experts, -1, np.int64)
    for sequence in range(len(offsets) - 1):
        mine = group[sequence]
        for earlier in range(offsets[sequence], offsets[sequence + 1]):
            used = False
            for expert in ids[earlier]:
                if expert >= 0:
                    seen[expert] = earlier
                    used = True
            if not used:
                continue
            for index in range(len(lags)):
                later = earlier + lags[index]
                if later >= offsets[sequence + 1]:
                    continue
                shared, wanted = 0, 0
                for expert in ids[later]:
                    if expert >= 0:
                        wanted += 1
                        shared += seen[expert] == earlier
                if not wanted:
                    continue
                row = sums[index, mine]
                row[0] += ids[earlier, 0] == ids[later, 0]
                row[1] += shared > 0
                row[2] += shared / wanted
                row[3] += 1
