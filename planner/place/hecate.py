"""Replicas for one pass, no more than can be copied while attention runs: Hecate (arXiv 2502.02581, read second-hand,
not verified).

Hecate is for training; what serves here is its limit. Every device keeps its own experts. While a layer's attention
runs, t = floor(attention time x bandwidth / bytes of an expert) more can be copied to it unnoticed, and its memory has
to hold them. Which ones, the loads of the last passes say. They are dropped after the layer: every pass copies anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from moescope.errors import PlanError
from planner.place.score import balancedness
from planner.place.slots import Placement, check_slots
from profiler.metrics._arrays import FloatArray, IntArray, ratio

WINDOW = 5
"""Passes whose loads the next placement rests on, as in the paper."""


@dataclass(frozen=True)
class Hidden:
    """What copying under attention gives, pass by pass.

    Attributes:
        load: (passes, layers, D) of each device with the replicas.
        fixed: (passes, layers, D) of each device without.
        copies: (passes, layers) experts that were copied, over all devices.
        limits: (layers,) experts that a device could take.
    """

    load: FloatArray
    fixed: FloatArray
    copies: IntArray
    limits: IntArray

    @property
    def balancedness(self) -> float:
        """Mean over largest load, summed over passes and layers before they are divided, 0..1."""
        return float(ratio(self.load.mean(-1).sum(), self.load.max(-1).sum()))

    @property
    def balancedness_without(self) -> float:
        """The same without replicas."""
        return float(ratio(self.fixed.mean(-1).sum(), self.fixed.max(-1).sum()))

    def per_pass(self) -> FloatArray:
        """(passes, layers) mean over largest load; NaN without load."""
        return balancedness(self.load)

    def bytes_copied(self, expert_bytes: int) -> int:
        """Bytes over all links, passes and layers."""
        return int(self.copies.sum()) * expert_bytes


def hidden_replicas(
    *, attention: ArrayLike, bandwidth: float, expert_bytes: int, free_slots: int, layers: int
) -> IntArray:
    """(layers,) experts that a device can be sent while a layer's attention runs and that its memory holds.

    Args:
        attention: seconds of a layer's attention in one pass, one number or (layers,).
        bandwidth: bytes per second to each device.
        expert_bytes: of one expert.
        free_slots: experts beside its own that the memory of a device holds at a time.
        layers: their number.

    Raises:
        PlanError: a number that cannot be.
    """
    seconds = np.broadcast_to(np.asarray(attention, np.float64), (layers,))
    if not (seconds >= 0).all() or not np.isfinite(seconds).all():
        raise PlanError(f"attention takes {seconds.min():g} seconds: give 0 or more")
    if not (bandwidth > 0 and math.isfinite(bandwidth)) or expert_bytes < 1 or free_slots < 0:
        raise PlanError(
            f"bandwidth {bandwidth:g}, {expert_bytes} bytes per expert and {free_slots} free slots cannot be: give a"
            " bandwidth and bytes above 0, and slots of 0 or more"
        )
    # 1e-9: what is n experts on paper shall not become n - 1 by rounding
    count = np.floor(seconds * bandwidth / expert_bytes + 1e-9).astype(np.int64)
    return np.minimum(count, free_slots)


def hecate(
    *, loads: ArrayLike, devices: int, limits: ArrayLike, window: int = WINDOW, own: IntArray | None = None
) -> Hidden:
    """Replay passes: each with the replicas that the passes before it ask for.

    Args:
        loads: (passes, layers, E) tokens of each expert in each pass.
        devices: D, a divisor of E.
        limits: (layers,) experts that a device can take beside its own, see :func:`hidden_replicas`.
        window: passes before that count; the first pass has none and takes no replicas.
        own: (layers, E) the device that keeps each expert; None = contiguous.

    Raises:
        PlanError: what cannot be divided.
    """
    counts = np.asarray(loads, np.float64)
    if counts.ndim != 3 or window < 1:
        raise PlanError(f"loads of shape {counts.shape} in windows of {window}: give (passes, layers, experts) and 1+")
    passes, layers, experts = counts.shape
    check_slots(experts, experts, devices)
    room = np.broadcast_to(np.asarray(limits, np.int64), (layers,))
    home = np.tile(np.arange(experts) * devices // experts, (layers, 1)) if own is None else own
    fixed = np.stack([_by_device(counts[:, layer], home[layer], devices) for layer in range(layers)], axis=1)
    load, copies = fixed.copy(), np.zeros((passes, layers), np.int64)
    sums = np.concatenate([np.zeros((1, layers, experts)), np.cumsum(counts, axis=0)])
    for at in range(1, passes):
        recent = sums[at] - sums[max(at - window, 0)]
        for layer in np.flatnonzero(room > 0):
            holds = materialised(load=recent[layer], home=home[layer], devices=devices, limit=int(room[layer]))
            shares = holds / holds.sum(axis=0)
            load[at, layer] = shares @ counts[at, layer]
            copies[at, layer] = holds.sum() - experts
    return Hidden(load, fixed, copies, room)


def materialised(*, load: FloatArray, home: IntArray, devices: int, limit: int) -> IntArray:
    """(D, E) 1 where a device holds an expert for one pass: its own, and up to ``limit`` replicas.

    Two ways are tried, and the one taken whose busiest device has less to do: EPLB's choice of replicas, each placed
    where there is least to do; and one replica after another, each the best relief of the busiest device. EPLB's alone
    would make it worse at times: it reckons that all replicas may be moved, and here every device keeps its own.

    load, home (E,).
    """
    from planner.place._loops import add_replicas, spread_replicas

    weight = np.ascontiguousarray(load, np.float64)
    best, least = np.zeros((devices, len(load)), np.int64), np.inf
    for way in (add_replicas, spread_replicas):
        holds = np.zeros((devices, len(load)), np.int64)
        holds[home, np.arange(len(load))] = 1
        way(weight, holds, np.full(devices, limit, np.int64))
        most = float((holds @ (weight / holds.sum(axis=0))).max())
        if most < least * (1 - 1e-12):
            best, least = holds, most
    return best


def lasting(*, load: FloatArray, devices: int, limit: int) -> Placement:
    """Replicas that stay, for engines that cannot change them from pass to pass: those that the whole load asks for.

    Every device keeps its contiguous experts and has ``limit`` slots beside them. A slot that no replica helps in holds
    an expert once more that only this device has, so that it takes no load from others.

    load (layers, E).

    Raises:
        PlanError: as :func:`hecate`, or more replicas than there are other experts.
    """
    experts = load.shape[1]
    check_slots(experts, experts, devices)
    own = experts // devices
    if not 0 <= limit <= experts - own:
        raise PlanError(f"a device that keeps {own} of {experts} experts cannot take {limit} others")
    home, rows = np.arange(experts) // own, []
    for weight in load:
        holds = materialised(load=weight, home=home, devices=devices, limit=limit)
        for device in range(devices):
            mine = np.arange(device * own, (device + 1) * own)
            added = np.flatnonzero((holds[device] > 0) & (home != device))
            alone = mine[holds[:, mine].sum(axis=0) == 1]
            spare = np.resize(alone if len(alone) else mine, limit - len(added))
            rows.append(np.concatenate([mine, added, spare]))
    return Placement(np.array(rows).reshape(len(load), -1), experts, devices)


def _by_device(load: FloatArray, home: IntArray, devices: int) -> FloatArray:
    """(..., D) from load (..., E)."""
    summed: FloatArray = load @ np.eye(devices)[home]
    return summed
