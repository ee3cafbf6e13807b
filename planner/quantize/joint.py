"""Mixed: for every expert, whether it stays and at how many bits, in one choice; then each matrix by itself. Ours.

To go is a width of no bits: an expert that goes costs what it added to the stream, and what the experts add that take
its tokens; one that stays costs what its width changes. Both are parts of the stream that is added to
(:mod:`planner.estimate.stream`), so that they compare, across layers too. Who goes is decided so; the widths of what
stays are then those of preset ``error_bits`` in the same bytes, which may give each matrix its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Unpack

import numpy as np

from compressor.plan import DropStep, LayerKey
from moescope.errors import PlanError
from planner.allocation import drop_layers
from planner.estimate.stream import gone_cost, streams
from planner.quantize import error_bits, knapsack
from planner.quantize.costs import EVEN, error_costs
from planner.quantize.grid import Grid, Widths
from planner.quantize.programme import Floats, Whole
from planner.quantize.units import Units, units_of
from planner.task import Array, Draft, Task, rounded


def draft(
    task: Task,
    *,
    widths: Widths = (2, 3, 4, 8),
    drop: float = 1.0,
    even: float = EVEN,
    **grid: Unpack[Grid],
) -> Draft:
    """The least summed change of the stream within the bits, over all experts of the source.

    Args:
        task: what to plan; nothing may come before.
        widths: that experts may have.
        drop: what an expert that goes costs against what the sums say; 0 and less = none goes. Dropping is not tried
            where routers limit themselves to groups, which have to stay alike.
        even: part of what each expert adds that is taken to be spread evenly over its layer.
        grid: see :class:`planner.quantize.grid.Grid`.

    Raises:
        PlanError: a run that did not see the stream, or bits that cannot be met.
    """
    if task.before:
        raise PlanError("preset 'mixed' decides itself which experts go: take it alone")
    units = units_of(task, widths=widths, granularity="expert", **grid)
    values = {key: rounded(cost * max(drop, 1e-9)) for key, cost in _gone_costs(task, even).items()}
    going = _where_allowed(task, values, drop)
    kept, _, _ = error_costs(units, "stream", even=even)
    gone = _choose(units, np.column_stack([going, kept]))
    cut = (DropStep(method="mixed", form="per_layer", layers=drop_layers(gone)),) if gone else ()
    rest = error_bits.draft(_left(task, units, cut), widths=widths, even=even, **grid)
    notes = []
    if not np.isfinite(going).any():
        notes.append("No expert may go: routers limit themselves to groups, or dropping was switched off.")
    if gone:
        count = sum(map(len, gone.values()))
        notes.append(f"{count} of {len(units.units)} experts go; the budget is that of all of them.")
    steps = tuple(step.model_copy(update={"method": "mixed"}) for step in rest.steps)
    return Draft(
        steps=(*cut, *steps),
        score="change of the stream",
        unit="part of its square, if the expert goes",
        values=values,
        notes=(*notes, *rest.notes),
    )


def _left(task: Task, units: Units, cut: tuple[DropStep, ...]) -> Task:
    """What is to be given widths once experts have gone: fewer weights in the same bytes."""
    gone = sum(len(layer.experts) for step in cut for layer in step.layers)
    if not gone or task.bits is None:
        return replace(task, before=cut)
    sizes = {(unit.key, unit.experts[0]): unit.weights for unit in units.units}
    out = sum(sizes[(layer.layer, layer.step), one] for step in cut for layer in step.layers for one in layer.experts)
    whole = int(units.weights.sum() + units.shared[:, 0].sum())
    return replace(task, before=cut, bits=task.bits * whole / (whole - out))


def _gone_costs(task: Task, even: float) -> dict[LayerKey, Array]:
    """(layer, step) -> (experts,) what going costs."""
    return {
        key: gone_cost(stream.evened(even), list(range(len(stream.part)))) * task.layer_factors[key]
        for key, stream in streams(task).items()
    }


def _where_allowed(task: Task, costs: Mapping[LayerKey, Array], drop: float) -> Floats:
    """(experts of all layers,) the costs; infinity for those that stay: super experts, and the k that cost most."""
    found = []
    for shape in task.source.layers:
        cost = costs[shape.key].copy()
        kept = sorted(range(len(cost)), key=lambda expert: (-cost[expert], expert))[: shape.top_k]
        cost[[*kept, *task.guard.experts(shape.key)]] = np.inf
        found.append(cost if shape.groups == 1 and drop > 0 else np.full_like(cost, np.inf))
    return np.concatenate(found)


def _choose(units: Units, costs: Floats) -> dict[LayerKey, list[int]]:
    """(layer, step) -> experts that go."""
    pinned = np.column_stack([costs[:, 0], units.pinned(costs[:, 1:])])
    sizes = np.column_stack([np.zeros(len(costs), dtype=np.int64), units.sizes])
    least = int(np.where(np.isfinite(pinned), sizes, np.iinfo(np.int64).max).min(1).sum())
    if least > units.capacity:
        raise PlanError(
            f"{units.task.bits:g} bits per weight cannot be met: what has to stay takes at least"
            f" {units.effective(least):.4g}"
        )
    columns: Whole = knapsack.solve(costs=pinned, sizes=sizes, capacity=units.capacity).widths
    gone: dict[LayerKey, list[int]] = {}
    for unit, column in zip(units.units, columns.tolist(), strict=True):
        if column == 0:
            gone.setdefault(unit.key, []).extend(unit.experts)
    return gone
