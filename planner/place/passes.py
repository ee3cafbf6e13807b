"""Forward passes one by one: how much the devices of a group have to do in each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from planner.place.dispatch import Dispatch, passes_of, sent
from planner.place.slots import Placement
from planner.place.stream import Part, Requests, over_parts
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
    work: Requests, placement: Placement, *, batch: int = 64, chunk: int | None = None, dispatch: Dispatch = "local"
) -> Passes:
    """What :func:`planner.place.score.score` adds up over passes, before it is added up; arguments as there.

    Raises:
        PlanError: as :func:`planner.place.dispatch.passes_of`.
    """
    one = partial(_of_part, placement=placement, batch=batch, chunk=chunk, dispatch=dispatch)
    found = over_parts(work, one, multiple=batch if chunk is None else 1)
    tokens, every, most = (np.concatenate(kind) for kind in zip(*found, strict=True))
    return Passes(tokens, every, most, placement.devices)


def _of_part(
    part: Part, *, placement: Placement, batch: int, chunk: int | None, dispatch: Dispatch
) -> tuple[IntArray, IntArray, IntArray]:
    """(passes,) tokens, pairs and pairs of the busiest devices of one part."""
    devices, turn = placement.devices, passes_of(part.work, batch=batch, chunk=chunk)
    count, home = int(turn.max(initial=-1)) + 1, (part.work.request_of_pass + part.first) % devices
    pairs, largest = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for token, device in sent(part, placement, home=home, dispatch=dispatch):
        load = np.bincount(turn[token] * devices + device, minlength=count * devices).reshape(count, devices)
        pairs += load.sum(axis=1)
        largest += load.max(axis=1)
    return np.bincount(turn, minlength=count).astype(np.int64), pairs, largest
