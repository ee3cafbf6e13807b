"""Which stored activation matrix is most like the request so far. Imports numba; import it where it is needed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from planner.simulate._cache import Flags, Ids, Times
from profiler.metrics._stack import compiled

_EQUAL = 1e-9  # likenesses that differ by less are equal: the order of additions must not choose


@compiled
def most_alike(ids: Ids, tokens: NDArray[np.uint16], starts: Flags, unit: NDArray[np.float64]) -> Times:
    """(passes,) the matrix with the largest sum of cosines over layers; of equals the first; at a request's first pass
    the number of matrices.

    ids, tokens: (layers, passes, width). starts: (passes,) a request begins. unit: (layers, E, matrices) rows of each
    matrix and layer, of length 1.
    """
    layers, passes, width = ids.shape
    experts, matrices = unit.shape[1:]
    counts, squares = np.zeros((layers, experts)), np.zeros(layers)
    products, likeness = np.zeros((layers, matrices)), np.zeros(matrices)
    result = np.empty(passes, np.int64)
    for at in range(passes):
        if starts[at]:
            counts[:], squares[:], products[:] = 0.0, 0.0, 0.0
            result[at] = matrices
        else:
            likeness[:] = 0.0
            for layer in range(layers):
                if squares[layer] > 0:
                    length = np.sqrt(squares[layer])
                    for one in range(matrices):
                        likeness[one] += products[layer, one] / length
            result[at] = 0
            for one in range(1, matrices):
                if likeness[one] > likeness[result[at]] + _EQUAL:
                    result[at] = one
        for layer in range(layers):
            for rank in range(width):
                expert = ids[layer, at, rank]
                if expert < 0:
                    continue
                more = float(tokens[layer, at, rank])
                squares[layer] += more * (2.0 * counts[layer, expert] + more)
                counts[layer, expert] += more
                for one in range(matrices):
                    products[layer, one] += more * unit[layer, expert, one]
    return result
