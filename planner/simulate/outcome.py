"""What a cache did on a workload: the one result that replays give, and that time, verdicts and charts read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from profiler.metrics._arrays import FloatArray, ratio

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Outcome:
    """Hits, loads and stalls of one policy at one size.

    Everything is counted, so that it adds up over requests and layers; rates are computed on reading.

    Attributes:
        policy: its name.
        slots: experts that the device holds at a time, over all layers.
        uses: (requests, layers) experts that steps needed.
        hits: of which were on the device.
        stalled: (requests, layers) steps in which at least one was missing.
        steps: (requests, layers) steps that needed any expert.
        overflow: steps that needed more experts at once than the cache has slots; those beyond were not admitted.
        missing: (layers, passes) uint16 experts that were missing in each step: what has to come over the link.
        narrow: of ``missing``, those that load a narrower version (HOBBIT); None where there is none.
        skipped: of ``missing``, those that are left out of the sum altogether (HOBBIT); None where none are.
    """

    policy: str
    slots: int
    uses: Counts
    hits: Counts
    stalled: Counts
    steps: Counts
    overflow: int
    missing: NDArray[np.uint16]
    narrow: NDArray[np.uint16] | None = None
    skipped: NDArray[np.uint16] | None = None

    @property
    def hit_rate(self) -> float:
        """Part of the uses that were on the device, 0..1; NaN without uses."""
        return float(ratio(self.hits.sum(), self.uses.sum()))

    @property
    def stalled_share(self) -> float:
        """Part of the steps that wait for at least one expert, 0..1."""
        return float(ratio(self.stalled.sum(), self.steps.sum()))

    def per_request(self) -> FloatArray:
        """(requests,) hit rate of each."""
        return ratio(self.hits.sum(axis=1), self.uses.sum(axis=1))

    def per_layer(self) -> FloatArray:
        """(layers,) hit rate of each."""
        return ratio(self.hits.sum(axis=0), self.uses.sum(axis=0))


@dataclass(frozen=True)
class Curve:
    """Hits of every cache size at once.

    Attributes:
        name: of the policy or bound.
        uses: (requests, layers); of one cache that all layers share, (requests, 1).
        hits: (requests, layers, sizes): [..., c - 1] = uses that a cache of c slots (per layer) answers; NaN at sizes
            that cannot hold what one step needs. Requests are those of the workload.
        shared: one cache for all layers; sizes are then 1..L * E.
    """

    name: str
    uses: Counts
    hits: FloatArray
    shared: bool = False

    def rates(self) -> FloatArray:
        """(sizes,) hit rate of caches of equal size in all layers, over all requests."""
        return ratio(self.hits.sum(axis=(0, 1)), self.uses.sum())

    def layer_rates(self) -> FloatArray:
        """(layers, sizes)."""
        return ratio(self.hits.sum(axis=0), self.uses.sum(axis=0)[:, None])
