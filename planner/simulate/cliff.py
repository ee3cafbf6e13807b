"""Where a cache that all layers share begins to work under LRU.

Decoding sweeps through the layers. Between two visits of a layer the shared cache sees what one token needs in all
others, so that LRU evicts every expert before its layer comes round again, unless the cache holds a token's whole
cycle: the sum of k over the layers. Below, it hits next to nothing; caches per layer have no such cliff from k slots
on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moescope.errors import PlanError
from planner.simulate.outcome import Curve
from planner.simulate.workload import Workload
from profiler.metrics._arrays import FloatArray

_HALF = 0.5


@dataclass(frozen=True)
class Cliff:
    """The cliff of a shared cache, and shared against per-layer caches with as many slots in all.

    Attributes:
        cycle: slots that one pass uses, over all layers: the median over passes.
        jump: the smallest shared cache that reaches half the hit rate of one with twice the cycle; None where it
            never hits.
        before: hit rate of the shared cache below the cliff, one layer's share under the cycle.
        after: at the cycle.
        slots: (sizes,) slots over all layers, from k per layer to E.
        shared: (sizes,) hit rate of a shared cache with so many slots.
        per_layer: (sizes,) of equal caches per layer with so many slots in all.
    """

    cycle: int
    jump: int | None
    before: float
    after: float
    slots: NDArray[np.int64]
    shared: FloatArray
    per_layer: FloatArray

    @property
    def sharing_pays_from(self) -> int | None:
        """Slots over all layers from which on a shared cache hits at least as much at every size; None if never.

        The last size, which holds every expert and where both are the same, does not count.
        """
        worse = np.flatnonzero(self.shared[:-1] < self.per_layer[:-1])
        first = int(worse[-1]) + 1 if len(worse) else 0
        return int(self.slots[first]) if first < len(self.slots) - 1 else None


def cliff(workload: Workload, *, shared: Curve, per_layer: Curve) -> Cliff:
    """Where the shared curve of a policy jumps, beside its curve with a cache per layer.

    Args:
        workload: that both were made of.
        shared: curve of one cache for all layers.
        per_layer: curve of the same policy with a cache per layer.

    Raises:
        PlanError: curves the wrong way round, or of two policies.
    """
    if not shared.shared or per_layer.shared or shared.name != per_layer.name:
        raise PlanError("the cliff takes a shared curve and one per layer, both of the same policy")
    layers, rates = workload.num_layers, shared.rates()
    cycle = int(np.median(workload.needed.sum(axis=0)))
    reached = np.flatnonzero(np.nan_to_num(rates) >= _HALF * rates[min(2 * cycle, len(rates)) - 1])
    jump = int(reached[0]) + 1 if rates[-1] > 0 and len(reached) else None
    each = per_layer.rates()
    sizes = np.flatnonzero(~np.isnan(each)) + 1
    below = max(cycle - -(-cycle // layers), 1)
    return Cliff(
        cycle=cycle, jump=jump, before=float(rates[below - 1]), after=float(rates[cycle - 1]), slots=sizes * layers,
        shared=rates[sizes * layers - 1], per_layer=each[sizes - 1],
    )  # fmt: skip
