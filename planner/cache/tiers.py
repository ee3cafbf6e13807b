"""Which expert lies where, in which width: on the device for good, in its cache, in host memory, or on disk."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compressor.plan import Bits, CacheLayer, CacheStep, QuantizeStep
from moescope.errors import PlanError
from moescope.sizes import size
from planner.cache.setting import Setting
from planner.cache.ways import Flags, Served, Way
from planner.quantize.units import units_of
from planner.task import Task


@dataclass(frozen=True)
class Tiers:
    """Where experts lie.

    Attributes:
        device: (layers, E) those that never leave the device.
        held: experts that the device holds at most.
        disk: (layers, E) those that are neither there nor in host memory.
        device_bytes: of pinned experts and cache slots.
        ram_bytes: of host memory.
        disk_bytes: of what lies on disk alone.
    """

    device: Flags
    held: int
    disk: Flags
    device_bytes: float
    ram_bytes: float
    disk_bytes: float


def widths_by_tier(task: Task, *, near: Bits, far: Bits, device: Flags) -> QuantizeStep:
    """The step that gives experts on the device one width and all others another.

    Super experts have the wider one wherever they lie. Shared experts, which every token uses, have ``near``.

    Args:
        task: what is planned.
        near: width of experts that lie on the device.
        far: of all others; not wider.
        device: (layers, E) those that lie there.

    Raises:
        PlanError: widths that form packed cannot hold.
    """
    widths = [far, near] if near != far else [near]
    units = units_of(task, widths=widths, granularity="expert", shared_bits=near)
    place = {shape.key: row for row, shape in enumerate(task.source.layers)}
    near_units = np.array([device[place[unit.key], unit.experts[0]] for unit in units.units])
    near_units[units.protected] = True
    columns = np.where(near_units, len(widths) - 1, 0).astype(np.int64)
    return units.step("tiers" if near != far else "uniform_bits", columns)


def tiers_of(setting: Setting, way: Way, *, device: Flags, slots: int) -> Tiers:
    """Where experts lie for a way: what does not fit into host memory lies on disk, the least used first.

    Experts that move through a cache need their place in host memory all the same, so that nothing is written back.

    Args:
        setting: model and machine, in the widths that experts have.
        way: how misses are answered.
        device: (layers, E) experts that never leave the device.
        slots: experts that the device holds, pinned ones included.

    Raises:
        PlanError: the experts do not fit into host memory, and there is no disk or the CPU is to run them.
    """
    bytes_of = setting.sizes.bytes
    outside = (bytes_of > 0) & ~device
    need, ram = float(bytes_of[outside].sum()), float(setting.machine.ram)
    disk = np.zeros_like(device)
    if need > ram:
        if setting.machine.disk is None or way.misses == "cpu":
            why = "the CPU runs experts from host memory" if way.misses == "cpu" else "the machine has no disk for them"
            raise PlanError(f"{size(need)} of experts outside the device, {size(ram)} of host memory, and {why}")
        disk = _coldest(setting, outside, need - ram)
    pinned = int(device.sum())
    moving = 0 if way.policy == "static" else max(slots - pinned, 0)  # slots that hold nothing for good stay empty
    on_device = float(bytes_of[device].sum()) + moving * setting.slot_bytes
    ram, below = float(bytes_of[outside & ~disk].sum()), float(bytes_of[disk].sum())
    return Tiers(device, pinned + moving, disk, on_device, ram, below)


def _coldest(setting: Setting, outside: Flags, over: float) -> Flags:
    """The least used experts outside the device, as many as take ``over`` bytes; ties: higher ids first."""
    work = setting.train
    counts = np.stack([np.bincount(layer[layer >= 0], minlength=work.num_experts) for layer in work.ids]).ravel()
    order = np.lexsort((-np.arange(counts.size), counts, ~outside.ravel()))
    order = order[: int(outside.sum())]
    taken = np.cumsum(setting.sizes.bytes.ravel()[order])
    chosen = np.zeros(counts.size, np.bool_)
    chosen[order[: int(np.searchsorted(taken, over)) + 1]] = True
    return chosen.reshape(outside.shape)


def cache_step(setting: Setting, served: Served, tiers: Tiers, *, method: str) -> CacheStep:
    """The step of a plan that says so."""
    layers = []
    for row, (layer, step) in enumerate(setting.test.layers):
        pinned = tuple(np.flatnonzero(tiers.device[row]).tolist())
        held = len(pinned) if served.way.scope == "shared" else max(int(served.layer_slots[row]), len(pinned))
        layers.append(
            CacheLayer(
                layer=layer, step=step, slots=held, pinned=pinned,
                disk=tuple(np.flatnonzero(tiers.disk[row]).tolist()),
            )
        )  # fmt: skip
    way = served.way
    slots = served.slots if way.scope == "shared" else sum(one.slots for one in layers)
    return CacheStep(
        method=method, policy=way.policy, scope=way.scope, slots=slots, misses=way.misses, prefetch=way.prefetch,  # type: ignore[arg-type]
        layers=tuple(layers),
    )  # fmt: skip
