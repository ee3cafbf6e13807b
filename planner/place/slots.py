"""Slots of an expert-parallel group: which expert lies in which, and what can be divided among how many devices."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from moescope.errors import PlanError
from profiler.metrics._arrays import FloatArray, IntArray


@dataclass(frozen=True)
class Placement:
    """Experts in slots. Device d has slots d * P / D to (d + 1) * P / D - 1 of the P slots of every layer.

    Attributes:
        experts: (layers, P) the expert in each slot; EPLB's physical_to_logical.
        num_experts: E.
        devices: D.
        nodes: among which the devices are divided evenly.
    """

    experts: IntArray
    num_experts: int
    devices: int
    nodes: int = 1

    def __post_init__(self) -> None:
        check_slots(self.experts.shape[1], self.num_experts, self.devices, self.nodes)
        unplaced = np.argwhere(self.counts() == 0)
        if len(unplaced):
            raise PlanError(f"expert {unplaced[0, 1]} of layer {unplaced[0, 0]} has no slot: give every expert one")

    @property
    def num_layers(self) -> int:
        """Layers."""
        return len(self.experts)

    @property
    def slots(self) -> int:
        """P, slots of a layer over all devices."""
        return int(self.experts.shape[1])

    @property
    def slots_per_device(self) -> int:
        """Of one layer."""
        return self.slots // self.devices

    @property
    def device_of_slot(self) -> IntArray:
        """(P,) the device that has each slot."""
        return np.arange(self.slots) // self.slots_per_device

    def counts(self) -> IntArray:
        """(layers, E) slots of each expert; EPLB's logical_count."""
        counts = np.zeros((self.num_layers, self.num_experts), np.int64)
        np.add.at(counts, (np.arange(self.num_layers)[:, None], self.experts), 1)
        return counts

    def copies(self) -> IntArray:
        """(layers, D, E) slots of each device that hold an expert."""
        copies = np.zeros((self.num_layers, self.devices, self.num_experts), np.int64)
        np.add.at(copies, (np.arange(self.num_layers)[:, None], self.device_of_slot[None, :], self.experts), 1)
        return copies

    def load(self, counts: ArrayLike) -> FloatArray:
        """(..., layers, D) load of each device if an expert's tokens are shared evenly among its slots.

        counts (..., layers, E): tokens of each expert.
        """
        shares = self.copies() / self.counts()[:, None, :]
        load: FloatArray = np.einsum("...le,lde->...ld", np.asarray(counts, np.float64), shares)
        return load

    def idle_slots(self) -> int:
        """Slots, over all layers, that hold an expert which their device already has: they serve nothing."""
        copies = self.copies()
        return int(np.maximum(copies - 1, 0).sum())

    def copied_from(self, other: Placement) -> int:
        """Experts, over all layers, that a device holds and did not hold in ``other``: what has to be sent to it."""
        return int(((self.copies() > 0) & (other.copies() == 0)).sum())

    def changed_slots(self, other: Placement) -> int:
        """Slots, over all layers, that hold another expert than in ``other``."""
        if self.slots != other.slots:
            raise PlanError(f"placements of {self.slots} and {other.slots} slots cannot be compared slot by slot")
        return int((self.experts != other.experts).sum())


def contiguous(*, num_layers: int, num_experts: int, devices: int, nodes: int = 1, slots: int = 0) -> Placement:
    """The map that engines start from: expert s in slot s, then again from the first, as vLLM begins.

    Raises:
        PlanError: as :func:`check_slots`.
    """
    row = np.arange(slots or num_experts) % num_experts
    return Placement(np.tile(row, (num_layers, 1)), num_experts, devices, nodes)


def by_device(device: IntArray, *, devices: int, nodes: int = 1) -> Placement:
    """One slot per expert, on the devices given, (layers, E) with as many on each; ascending on each device.

    Raises:
        PlanError: a device has more experts than another.
    """
    held = np.stack([np.bincount(row, minlength=devices) for row in device])
    if held.shape[1] > devices or (held != held[0, 0]).any():
        raise PlanError(f"devices hold {held.min()} to {held.max()} experts of a layer; all hold as many")
    return Placement(np.argsort(device, axis=1, kind="stable"), device.shape[1], devices, nodes)


def check_slots(slots: int, num_experts: int, devices: int, nodes: int = 1) -> None:
    """Refuse slots, devices and nodes that cannot be divided evenly.

    Raises:
        PlanError: with the nearest counts that would do.
    """
    for what, value in (("experts", num_experts), ("devices", devices), ("nodes", nodes)):
        if value < 1:
            raise PlanError(f"{value} {what} cannot be: give at least 1")
    if slots < num_experts:
        least = -(-num_experts // devices) * devices
        raise PlanError(f"{slots} slots cannot hold {num_experts} experts: give {least} or more")
    if devices > slots:
        raise PlanError(
            f"{devices} devices are more than the {slots} slots of a layer: use at most {slots} devices, or add"
            f" {devices - slots} redundant slots"
        )
    if slots % devices:
        raise PlanError(
            f"{slots} slots cannot be divided among {devices} devices: {_multiples(slots, devices, num_experts)} slots"
            f" would do (redundant experts make the difference), or {_divisors(slots, devices)} devices"
        )
    if devices % nodes:
        raise PlanError(
            f"{devices} devices cannot be divided among {nodes} nodes: {_divisors(devices, nodes)} nodes would do"
        )


def check_groups(num_experts: int, groups: int) -> None:
    """Refuse groups that experts cannot be divided into.

    Raises:
        PlanError: with the nearest counts that would do.
    """
    if groups < 1 or num_experts % groups:
        raise PlanError(
            f"{num_experts} experts cannot be divided into {groups} groups: {_divisors(num_experts, groups)} groups"
            " would do"
        )


def _multiples(value: int, step: int, least: int) -> str:
    """The multiples of ``step`` around a value, not below ``least``, in words."""
    below, above = value // step * step, -(-value // step) * step
    return f"{below} or {above}" if below >= least else f"{above}"


def _divisors(value: int, near: int) -> str:
    """The divisors of a value around a number, in words."""
    every = [one for one in range(1, value + 1) if value % one == 0]
    below = [one for one in every if one < near][-1:]
    above = [one for one in every if one > near][:1]
    return " or ".join(map(str, below + above))
