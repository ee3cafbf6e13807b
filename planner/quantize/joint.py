"""Mixed: for every expert, whether it stays and at how many bits, in one exact choice. Ours.

To go is a width of no bits: an expert that goes costs what it added to the stream, and what the experts add that take
its tokens; one that stays costs what its width changes. Both are parts of the stream that is added to
(:mod:`planner.estimate.stream`), so that they compare, across layers too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Unpack

import numpy as np

from compressor.plan import DropStep, LayerKey, QuantizeStep
from moescope.errors import PlanError
from planner.allocation import drop_layers
from planner.estimate.stream import gone_cost, streams
from planner.quantize import knapsack
from planner.quantize.costs import columns_of, told
from planner.quantize.errors import layer_errors
from planner.quantize.grid import Grid, Widths
from planner.quantize.programme import Floats, Whole
from planner.quantize.units import Units, units_of
from planner.task import Array, Draft, Task, rounded


def draft(
    task: Task,
    *,
    widths: Widths = (2, 3, 4, 8),
    drop: float = 1.0,
    **grid: Unpack[Grid],
) -> Draft:
    """The least summed change of the stream within the bits, over all experts of the source.

    Args:
        task: what to plan; nothing may come before.
        widths: that experts may have.
        drop: what an expert that goes costs against what the sums say; 0 and less = none goes. Dropping is not tried
            where routers limit themselves to groups, which have to stay alike.
        grid: see :class:`planner.quantize.grid.Grid`.

    Raises:
        PlanError: a run that did not see the stream, or bits that cannot be met.
    """
    if task.before:
        raise PlanError("preset 'mixed' decides itself which experts go: take it alone")
    units = units_of(task, widths=widths, granularity="expert", **grid)
    weights = task.layer_factors
    values = {key: rounded(cost * weights[key] * max(drop, 1e-9)) for key, cost in _gone_costs(task).items()}
    gone = _where_allowed(task, values, drop)
    columns = _choose(units, np.column_stack([gone, _width_costs(units, weights)]))
    return _draft(task, units, columns, values, bool(np.isfinite(gone).any()))


def _width_costs(units: Units, weights: Mapping[LayerKey, float]) -> Floats:
    """(units, widths) what each width changes."""
    errors, known, at = layer_errors(units.task), streams(units.task), columns_of(units.widths)
    values = {}
    for key, one in errors.items():
        relative = np.zeros_like(one.errors["all"])
        np.divide(one.errors["all"], one.energy[:, None], out=relative, where=one.energy[:, None] > 0)
        values[key] = {"all": relative[:, at] * known[key].part[:, None] * weights[key]}
    return rounded(units.of(values))


def _gone_costs(task: Task) -> dict[LayerKey, Array]:
    """(layer, step) -> (experts,) what going costs."""
    return {key: gone_cost(stream, list(range(len(stream.part)))) for key, stream in streams(task).items()}


def _where_allowed(task: Task, costs: Mapping[LayerKey, Array], drop: float) -> Floats:
    """(experts of all layers,) the costs; infinity for those that stay: super experts, and the k that cost most."""
    found = []
    for shape in task.source.layers:
        cost = costs[shape.key].copy()
        kept = sorted(range(len(cost)), key=lambda expert: (-cost[expert], expert))[: shape.top_k]
        cost[[*kept, *task.guard.experts(shape.key)]] = np.inf
        found.append(cost if shape.groups == 1 and drop > 0 else np.full_like(cost, np.inf))
    return np.concatenate(found)


def _choose(units: Units, costs: Floats) -> Whole:
    """(units,) 0 = it goes, else 1 + the place of its width."""
    pinned = np.column_stack([costs[:, 0], units.pinned(costs[:, 1:])])
    sizes = np.column_stack([np.zeros(len(costs), dtype=np.int64), units.sizes])
    least = int(np.where(np.isfinite(pinned), sizes, np.iinfo(np.int64).max).min(1).sum())
    if least > units.capacity:
        raise PlanError(
            f"{units.task.bits:g} bits per weight cannot be met: what has to stay takes at least"
            f" {units.effective(least):.4g}"
        )
    return knapsack.solve(costs=pinned, sizes=sizes, capacity=units.capacity).widths


def _draft(task: Task, units: Units, columns: Whole, values: dict[LayerKey, Array], drops: bool) -> Draft:
    stays = columns > 0
    gone: dict[LayerKey, list[int]] = {}
    for unit, one in zip(units.units, stays.tolist(), strict=True):
        if not one:
            gone.setdefault(unit.key, []).extend(unit.experts)
    step: QuantizeStep = units.step("mixed", np.maximum(columns - 1, 0), whole=np.flatnonzero(~stays))
    notes = []
    if not drops:
        notes.append("No expert may go: routers limit themselves to groups, or dropping was switched off.")
    if gone:
        count = sum(map(len, gone.values()))
        notes.append(f"{count} of {len(columns)} experts go; bits are counted over the weights of all of them.")
    known = told(units, np.maximum(columns - 1, 0), layer_errors(task))[1:]
    cut = [DropStep(method="mixed", form="per_layer", layers=drop_layers(gone))] if gone else []
    return Draft(
        steps=(*cut, step),
        score="change of the stream",
        unit="part of its square, if the expert goes",
        values=values,
        notes=(*notes, *known),
    )
