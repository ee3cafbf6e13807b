"""Forward passes one by one: how much the devices of a group have to do in each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.place.dispatch import Dispatch, devices_of, homes_of, passes_of, routes
from planner.place.slots import Placement
from planner.simulate.workload import Workload
from profiler.metrics._arrays import FloatArray, IntArray, ratio


@dataclass(frozen=True)
class Passes:
    """Sums over the layers of each forward pass. A pair is a token and one of its experts.

    Attributes:
        tokens: (passes,) tokens that run together.
        pairs: (passes,) pairs that all devices compute.
        largest: (passes,) pairs of the busiest device of each layer, added up over layers.
        devices: D.
    """

    tokens: IntArray
    pairs: IntArray
    largest: IntArray
    devices: int

    def balancedness(self) -> FloatArray:
        """(passes,) part of the devices' time that is used if every layer waits for its busiest device, 0..1."""
        return ratio(self.pairs / self.devices, self.largest)


def passes(
    work: Workload, placement: Placement, *, batch: int = 64, chunk: int | None = None, dispatch: Dispatch = "local"
) -> Passes:
    """What :func:`planner.place.score.score` adds up over passes, before it is added up; arguments as there.

    Raises:
        PlanError: as :func:`planner.place.dispatch.passes_of`.
    """
    turn = passes_of(work, batch=batch, chunk=chunk)
    count, devices = int(turn.max(initial=-1)) + 1, placement.devices
    home, route = homes_of(work, devices), routes(placement)
    pairs, largest = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for layer, ids in enumerate(work.ids):
        token, rank = np.nonzero(ids >= 0)
        device = devices_of(
            placement, route[layer], layer, token=token, expert=ids[token, rank], home=home[token], dispatch=dispatch
        )
        load = np.bincount(turn[token] * devices + device, minlength=count * devices).reshape(count, devices)
        pairs += load.sum(axis=1)
        largest += load.max(axis=1)
    return Passes(np.bincount(turn, minlength=count).astype(np.int64), pairs, largest, devices)
