"""Two widths by a ranking: QuantMoE-Bench's heuristics of where the wider one pays (arXiv 2406.08155).

``frequency``: experts that are chosen most. ``first_blocks``: the first layers. ``outlier``: weights with the largest
outliers, max |w| over mean |w| of an input channel. ``block_importance``: layers that turn the residual stream most,
whose cosine is measured here, where the benchmark trains a predictor of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Unpack

import numpy as np
import polars as pl

from compressor.plan import PARTS, LayerKey
from moescope.errors import PlanError
from planner.importance.statistics import Statistics, layers_of
from planner.probes import layer_weights
from planner.quantize.costs import told
from planner.quantize.grid import Granularity, Grid, Widths, widths_of
from planner.quantize.programme import Floats, Whole
from planner.quantize.units import Units, units_of
from planner.task import Array, Draft, Task, rounded

Score = Literal["frequency", "first_blocks", "outlier", "block_importance"]

_SCORES = {
    "frequency": ("frequency", "selections"),
    "first_blocks": ("place among the layers", "layers after it"),
    "outlier": ("outlier", "max |w| / mean |w|"),
    "block_importance": ("block importance", "1 - cosine of the residual stream before and after the experts"),
}


def draft(
    task: Task,
    *,
    score: Score,
    widths: Widths = (2, 4),
    granularity: Granularity = "expert",
    **grid: Unpack[Grid],
) -> Draft:
    """The units that score highest have the wider width, as many as fit; all others have the narrower.

    Args:
        task: what to plan.
        score: by what units are ranked; of equal ones the earlier comes first.
        widths: two, or one.
        granularity: what has a width of its own. The score of a layer is the sum over its experts (``outlier``: the
            largest).
        grid: see :class:`planner.quantize.grid.Grid`.

    Raises:
        PlanError: a score that is not known, more than two widths, a run that lacks the score, or bits that cannot be
            met.
    """
    if score not in _SCORES:
        raise PlanError(f"score {score!r} is not known: use {', '.join(_SCORES)}")
    if len(widths_of(widths)) > 2:
        raise PlanError(f"a ranking tells two widths apart, not {len(widths_of(widths))}: give two, such as 2 and 4")
    units = units_of(task, widths=widths, granularity=granularity, **grid)
    values, notes = _values(units, score)
    columns = highest(units, values)
    name, unit = _SCORES[score]
    wide = int((columns == len(units.widths) - 1).sum())
    notes.insert(0, f"{wide} of {len(columns)} units, the highest by {name}, have {units.widths[-1]} bits.")
    return Draft(
        steps=(units.step(f"{score}_bits" if score in ("frequency", "outlier") else score, columns),),
        score=name,
        unit=unit,
        values=units.by_expert(values),
        notes=(*told(units, columns), *notes),
    )


def highest(units: Units, values: Floats) -> Whole:
    """(units,) columns: the widest for units from the highest value down until the next one does not fit.

    Raises:
        PlanError: not even the narrowest widths fit.
    """
    units.require_room(units.pinned(np.zeros(units.sizes.shape)))
    columns = np.zeros(len(units.units), dtype=np.int64)
    columns[units.protected] = len(units.widths) - 1
    room = units.capacity - units.size(columns)
    ranked = np.argsort(-values, kind="stable")
    ranked = ranked[~np.isin(ranked, units.protected)]
    more = np.cumsum(units.sizes[ranked, -1] - units.sizes[ranked, 0])
    columns[ranked[: int(np.searchsorted(more, room, side="right"))]] = len(units.widths) - 1
    return columns


def _values(units: Units, score: str) -> tuple[Floats, list[str]]:
    """(units,) values to 6 digits, and what to note."""
    task = units.task
    if score == "frequency":
        return rounded(units.of({key: {"all": one[:, None]} for key, one in _selections(task).items()})[:, 0]), []
    if score == "outlier":
        return _outliers(units), []
    if score == "first_blocks":
        layers, notes = {shape.layer: float(task.source.num_layers - 1 - shape.layer) for shape in task.layers}, []
    else:
        weights, note = layer_weights(task, "influence")
        if set(weights.values()) == {1.0}:
            raise PlanError(f"run {task.run.name!r} does not know how far its layers turn the residual stream: {note}")
        layers, notes = weights, [note]
    return rounded(np.array([layers[unit.key[0]] for unit in units.units])), notes


def _selections(task: Task) -> Mapping[LayerKey, Array]:
    found: dict[LayerKey, Array] = {}
    for domain in task.domains:
        load = Statistics(task.run, level="routing", domain=domain).experts("expert_load", "tokens")
        for key, rows in layers_of(load):
            found[key] = found.get(key, np.zeros(len(rows))) + rows["tokens"].to_numpy()
    return found


def _outliers(units: Units) -> Floats:
    """(units,) the largest outlier among the matrices of a unit."""
    task = units.task
    table = task.run.table("expert_grid").filter((pl.col("kind") == "routed") & pl.col("outlier").is_not_null())
    if table.is_empty():
        raise PlanError(f"run {task.run.name!r} has no expert_grid.outlier: collect it with --level errors")
    known = {
        (layer, step, expert, part): value
        for layer, step, expert, part, value in table.select("layer", "step", "expert", "part", "outlier").iter_rows()
    }
    values = []
    for unit in units.units:
        own = [known.get((*unit.key, expert, part)) for expert in unit.experts for part in unit.parts if part in PARTS]
        if any(value is None for value in own):
            raise PlanError(f"run {task.run.name!r} lacks expert_grid.outlier of layer {unit.key[0]}: collect it again")
        values.append(max(value for value in own if value is not None))
    return rounded(np.array(values))
