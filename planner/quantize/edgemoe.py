"""EdgeMoE: the least sensitive experts are lowered first, until a budget or tolerance is reached (arXiv 2308.14352).

An expert's sensitivity is what the output changes by when it alone is lowered. The paper's own procedure was not
verified; this follows its description.
"""

from __future__ import annotations

from typing import Unpack

import numpy as np

from moescope.errors import PlanError
from planner.probes import Weigh
from planner.quantize.costs import error_costs, told
from planner.quantize.errors import layer_errors
from planner.quantize.grid import Granularity, Grid, Widths
from planner.quantize.programme import Floats, Whole
from planner.quantize.units import Units, units_of
from planner.task import Draft, Task


def draft(
    task: Task,
    *,
    tolerance: float | None = None,
    widths: Widths = (2, 4, 8),
    granularity: Granularity = "expert",
    weigh: Weigh = "influence",
    **grid: Unpack[Grid],
) -> Draft:
    """All units start at the widest width; the one least sensitive to its next narrower width gets it, and so on.

    Args:
        task: what to plan.
        tolerance: largest sum of weighed relative errors, at which lowering stops instead of at the budget, which has
            to be met by then; None = the budget alone.
        widths: that units may have.
        granularity: what has a width of its own.
        weigh: what makes layers comparable, see :func:`planner.probes.layer_weights`.
        grid: see :class:`planner.quantize.grid.Grid`.

    Raises:
        PlanError: a run without errors, bits that cannot be met, or not within the tolerance.
    """
    if tolerance is not None and not tolerance > 0:
        raise PlanError(f"tolerance {tolerance} allows nothing: give a sum of relative errors above 0, or leave it out")
    units = units_of(task, widths=widths, granularity=granularity, **grid)
    costs, values, notes = error_costs(units, weigh)
    units.require_room(units.pinned(costs))
    columns, error = _lowered(units, costs, tolerance)
    size = units.size(columns)
    if size > units.capacity:
        raise PlanError(
            f"lowering stops at a summed relative error of {error:.4g} and {units.effective(size):.4g} bits per weight:"
            f" raise the tolerance {tolerance:g}, or ask for more than {task.bits:g} bits"
        )
    notes.append(f"The summed relative error of the layers' outputs, layers weighed, is {error:.4g} by this choice.")
    return Draft(
        steps=(units.step("edgemoe", columns),),
        score=f"output error at {units.widths[0]} bits",
        unit="weighed part of the layer's squared output",
        values=values,
        notes=(*told(units, columns, layer_errors(task)), *notes),
    )


def _lowered(units: Units, costs: Floats, tolerance: float | None) -> tuple[Whole, float]:
    """(units,) columns, and the sum of their costs."""
    last = costs.shape[1] - 1
    columns = np.full(len(costs), last, dtype=np.int64)
    free = np.setdiff1d(np.arange(len(costs)), units.protected)
    # A unit passes through its widths in order: no narrower width comes before a wider one that costs more.
    reached = np.maximum.accumulate(costs[:, ::-1], axis=1)[:, ::-1]
    moves = [(reached[unit, column], unit, column) for column in range(last) for unit in free.tolist()]
    size, error = units.size(columns), float(costs[:, last].sum())
    for _, unit, column in sorted(moves, key=lambda move: (move[0], -move[2], move[1])):
        if tolerance is None and size <= units.capacity:
            break
        after = error + costs[unit, column] - costs[unit, columns[unit]]
        if tolerance is not None and after > tolerance:
            break
        size += int(units.sizes[unit, column] - units.sizes[unit, columns[unit]])
        columns[unit], error = column, float(after)
    return columns, error
