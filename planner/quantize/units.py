"""What gets a width of its own: the experts that stay, what widths take of the budget, and the step that results."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from compressor.plan import (
    BITS,
    PARTS,
    Bits,
    ExpertBits,
    LayerKey,
    NewExpert,
    Plan,
    QuantizeLayer,
    QuantizeStep,
    experts_after,
)
from moescope.errors import PlanError
from planner.estimate.parameters import sizes_after
from planner.quantize import knapsack
from planner.quantize.grid import (
    SHARED_BITS,
    Granularity,
    Widths,
    groups_in_words,
    require_form,
    require_known,
    template,
    widths_of,
)
from planner.quantize.programme import Floats, Whole
from planner.source import value_bytes
from planner.task import Array, Task

_PART = 1e-6  # of a bit: what products of floats may be off by


@dataclass(frozen=True)
class Unit:
    """What has one width.

    Attributes:
        key: its layer and step.
        experts: numbers of its experts in the source.
        parts: the projections of these.
        weights: of all of them.
    """

    key: LayerKey
    experts: tuple[int, ...]
    parts: tuple[str, ...]
    weights: int


@dataclass(frozen=True)
class Units:
    """Everything that is to be given widths.

    Attributes:
        task: what is planned.
        widths: that units may have, the narrowest first.
        grid: the step without layers: granularity, form and grids.
        shared_bits: width of shared experts; None = as they are.
        experts: (layer, step) -> the experts that stay.
        units: layer by layer.
        groups: (units,) place of each unit's layer in ``experts``.
        sizes: (units, widths) bits that a unit takes, scales and zero points counted.
        shared: (layers, 2) weights of shared experts, and bits that they take.
    """

    task: Task
    widths: tuple[Bits, ...]
    grid: QuantizeStep
    shared_bits: Bits | None
    experts: Mapping[LayerKey, list[NewExpert]]
    units: tuple[Unit, ...]
    groups: Whole
    sizes: Whole
    shared: Whole

    @cached_property
    def weights(self) -> Whole:
        """(units,) weights of each."""
        return np.array([unit.weights for unit in self.units])

    @property
    def layer_capacity(self) -> Whole:
        """(layers,) bits that the routed experts of each layer may take, where every layer has the task's bits."""
        whole = np.bincount(self.groups, weights=self.weights) + self.shared[:, 0]
        capacity: Whole = np.floor(self._bits * whole).astype(np.int64) - self.shared[:, 1]
        return capacity

    @cached_property
    def capacity(self) -> int:
        """Bits that all routed experts may take."""
        return math.floor(self._bits * int(self.weights.sum() + self.shared[:, 0].sum())) - int(self.shared[:, 1].sum())

    @property
    def _bits(self) -> float:
        if self.task.bits is None:
            raise PlanError("to how many bits? give effective bits per weight, such as 3.0")
        return self.task.bits

    def effective(self, size: int) -> float:
        """Bits per weight of all experts, shared ones too, where routed ones take so many bits."""
        whole = int(self.weights.sum() + self.shared[:, 0].sum())
        return (size + int(self.shared[:, 1].sum())) / whole

    def size(self, columns: Whole) -> int:
        """Bits that the routed experts take with these widths."""
        return int(self.sizes[np.arange(len(self.units)), columns].sum())

    def of(self, values: Mapping[LayerKey, Mapping[str, Array]]) -> Floats:
        """(units, n) sums over the experts and projections of each unit.

        Args:
            values: (layer, step) -> part (all, or gate, up, down) -> (experts of the source, n). Merged experts have
                the sum of their members'.
        """
        single = self.grid.granularity in ("matrix", "projection")
        part_of = PARTS if single else ("all",)
        parts = PARTS if self.task.source.gated else PARTS[1:]
        found: list[Array] = []
        for key, experts in self.experts.items():
            by_part = {part: values[key][part if part in values[key] else "all"] for part in part_of}
            if self.grid.granularity == "expert":
                found += [by_part["all"][list(one.members)].sum(0) for one in experts]
                continue
            if self.grid.granularity == "matrix":
                found += [by_part[part][list(one.members)].sum(0) for one in experts for part in parts]
                continue
            members = [member for one in experts for member in one.members]
            found += [by_part[part][members].sum(0) for part in (parts if single else ["all"])]
        return np.array(found)

    def per_expert(self, values: Mapping[LayerKey, Array]) -> dict[LayerKey, Array]:
        """(layer, step) -> (experts of the source,) values of what stays, NaN elsewhere; merged ones at their lead."""
        found = {}
        for key, experts in self.experts.items():
            found[key] = np.full(len(values[key]), np.nan)
            for one in experts:
                found[key][one.lead] = values[key][list(one.members)].sum()
        return found

    def by_expert(self, values: Floats) -> dict[LayerKey, Array]:
        """(layer, step) -> (experts of the source,) the value of each expert's unit, NaN where it does not stay.

        Args:
            values: (units,); of several units with one expert, the largest.
        """
        found = {shape.key: np.full(shape.num_experts, np.nan) for shape in self.task.source.layers}
        for unit, value in zip(self.units, values.tolist(), strict=True):
            mine = found[unit.key][list(unit.experts)]
            found[unit.key][list(unit.experts)] = np.fmax(mine, value)
        return found

    @property
    def protected(self) -> Whole:
        """Places of the units that hold a super expert."""
        return np.array(
            [i for i, unit in enumerate(self.units) if self.task.guard.experts(unit.key) & set(unit.experts)],
            dtype=np.int64,
        )

    def pinned(self, costs: Floats) -> Floats:
        """The costs where units with a super expert may have the widest width alone."""
        costs = costs.copy()
        costs[self.protected, :-1] = np.inf
        costs[self.protected, -1] = np.where(np.isfinite(costs[self.protected, -1]), costs[self.protected, -1], 0.0)
        return costs

    def require_room(self, costs: Floats, *, per_layer: bool = False, minimum: Whole | None = None) -> None:
        """Refuse a budget that not even the narrowest widths meet.

        Raises:
            PlanError: with the nearest budget that can be met.
        """
        least = knapsack.least_size(costs=costs, sizes=self.sizes, groups=self.groups, minimum=minimum)
        if np.all(least <= self.layer_capacity) if per_layer else least.sum() <= self.capacity:
            return
        needed = self.effective(int(least.sum()))
        if per_layer:
            whole = np.bincount(self.groups, weights=self.weights) + self.shared[:, 0]
            needed = float(((least + self.shared[:, 1]) / whole).max())
        raise PlanError(f"{self._bits:g} bits per weight cannot be met: {self._why()} take at least {_up(needed)}")

    def choose(self, costs: Floats, *, per_layer: bool = False) -> Whole:
        """(units,) columns of the least cost within the budget; units with super experts have the widest.

        Raises:
            PlanError: no choice meets the budget; the nearest that can be met is named.
        """
        costs = self.pinned(costs)
        self.require_room(costs, per_layer=per_layer)
        capacity: int | Whole = self.layer_capacity if per_layer else self.capacity
        return knapsack.solve(costs=costs, sizes=self.sizes, capacity=capacity, groups=self.groups).widths

    def step(self, method: str, columns: Whole, *, whole: Whole | None = None) -> QuantizeStep:
        """The step that gives the units their widths.

        Args:
            method: name of the planner.
            columns: (units,) places in ``widths``.
            whole: places of units that stay as they are.
        """
        left = set() if whole is None else set(whole.tolist())
        widths: dict[LayerKey, dict[int, dict[str, Any]]] = {key: {} for key in self.experts}
        for place, (unit, column) in enumerate(zip(self.units, columns.tolist(), strict=True)):
            for expert in unit.experts if place not in left else ():
                widths[unit.key].setdefault(expert, {}).update(dict.fromkeys(unit.parts, self.widths[column]))
        layers = []
        for (key, found), (shared, _) in zip(widths.items(), self.shared.tolist(), strict=True):
            entries = [ExpertBits(expert=expert, **bits) for expert, bits in sorted(found.items())]
            if shared and self.shared_bits is not None:
                bits: dict[str, Any] = dict.fromkeys(_parts(self.task), self.shared_bits)
                entries.append(ExpertBits(expert=0, role="shared", **bits))
            if entries:
                layers.append(QuantizeLayer(layer=key[0], step=key[1], experts=tuple(entries)))
        return self.grid.model_copy(update={"method": method, "layers": tuple(layers)})

    def _why(self) -> str:
        words = [f"widths {', '.join(map(str, self.widths))} in {groups_in_words(self.grid.group_size)}"]
        if self.shared[:, 0].any():
            words.append(f"shared experts at {self.shared_bits or 'full'} bits")
        if len(self.protected):
            words.append(f"{len(self.protected)} {self._noun()} with super experts at {self.widths[-1]} bits")
        return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)

    def _noun(self) -> str:
        return {"matrix": "matrices", "expert": "experts", "layer": "layers", "projection": "projections"}[
            self.grid.granularity
        ]


def units_of(
    task: Task,
    *,
    widths: Widths,
    granularity: Granularity = "expert",
    nested: Literal[2, 3, 4] | None = None,
    **grid: Any,
) -> Units:
    """The units of a task, after the steps that come first.

    Args:
        task: what is planned; its guard, bits, form and steps before count.
        widths: that units may have.
        granularity: what has a width of its own.
        nested: the narrowest of widths that one file serves.
        grid: see :class:`planner.quantize.grid.Grid`.

    Raises:
        PlanError: a parameter, width or granularity that is not known; a form that cannot hold the widths; a group size
            that does not divide.
    """
    if granularity not in ("matrix", "expert", "layer", "projection"):
        raise PlanError(f"granularity {granularity!r} is not known: use matrix, expert, layer or projection")
    require_known(grid)
    columns = widths_of(widths)
    shared_bits = grid.get("shared_bits", SHARED_BITS)
    if shared_bits is not None:
        (shared_bits,) = widths_of([shared_bits])
    plan = Plan.model_construct(source=task.source, steps=task.before)
    experts, sizes = experts_after(plan), sizes_after(plan)
    has_shared = any(sizes[key].shared_width for key in experts)
    if has_shared and shared_bits is not None and any(task.guard.experts(key, "shared") for key in experts):
        shared_bits = max(shared_bits, columns[-1], key=BITS.index)
    used = {*columns, *([shared_bits] if has_shared and shared_bits is not None else [])}
    require_form(task, used, nested)
    lengths = {task.source.expert_size, *(sizes[key].width for key in experts)}
    if has_shared and shared_bits is not None:
        lengths |= {task.source.hidden_size, *(sizes[key].shared_width for key in experts)} - {0}
    step = template(task, granularity, nested, lengths, grid)
    source = 8.0 * (value_bytes(task.run) or 2)
    units: list[Unit] = []
    bits: list[list[int]] = []
    groups: list[int] = []
    shared = np.zeros((len(experts), 2), dtype=np.int64)
    for place, (key, stays) in enumerate(experts.items()):
        own = {
            one: _bits_of_parts(task, step, one, sizes[key].width, task.source.expert_size, source) for one in columns
        }
        weights = sizes[key].width * task.source.expert_size
        for members, parts in _split(task, stays, granularity):
            units.append(Unit(key, members, parts, weights * len(parts) * len(members)))
            bits.append([math.ceil(sum(own[one][part] for part in parts) * len(members) - _PART) for one in columns])
            groups.append(place)
        if sizes[key].shared_width:
            width, channels = sizes[key].shared_width, task.source.hidden_size
            parts_of = _bits_of_parts(task, step, shared_bits, width, channels, source)
            shared[place] = width * channels * len(parts_of), math.ceil(sum(parts_of.values()) - _PART)
    return Units(task, columns, step, shared_bits, experts, tuple(units), np.array(groups),
                 np.array(bits, dtype=np.int64), shared)  # fmt: skip


def _bits_of_parts(
    task: Task, step: QuantizeStep, bits: Bits | None, width: int, channels: int, source: float
) -> dict[str, float]:
    """Projection -> bits that it takes, in an expert of so many neurons and channels."""
    inputs = {part: width if part == "down" else channels for part in _parts(task)}
    return {part: width * channels * step.stored(bits, one, source) for part, one in inputs.items()}


def _parts(task: Task) -> tuple[str, ...]:
    return PARTS if task.source.gated else PARTS[1:]


def _split(
    task: Task, stays: list[NewExpert], granularity: Granularity
) -> list[tuple[tuple[int, ...], tuple[str, ...]]]:
    """(experts, projections) of each unit of a layer."""
    leads, parts = tuple(one.lead for one in stays), _parts(task)
    if granularity == "matrix":
        return [((lead,), (part,)) for lead in leads for part in parts]
    if granularity == "expert":
        return [((lead,), parts) for lead in leads]
    return [(leads, parts)] if granularity == "layer" else [(leads, (part,)) for part in parts]


def _up(bits: float) -> str:
    """Four digits, rounded up: what is named can be met."""
    return f"{math.ceil(bits * 1e4 - 1e-6) / 1e4:g}"
