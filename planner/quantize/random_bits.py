"""Random bits: widths drawn at random, the control that every way of choosing has to beat."""

from __future__ import annotations

from typing import Unpack

import numpy as np

from planner.quantize.costs import told
from planner.quantize.grid import Granularity, Grid, Widths
from planner.quantize.units import units_of
from planner.task import Draft, Task


def draft(
    task: Task,
    *,
    seed: int = 0,
    widths: Widths = (2, 3, 4, 8),
    granularity: Granularity = "expert",
    **grid: Unpack[Grid],
) -> Draft:
    """All units start at the narrowest width; units drawn at random get the next wider one while it fits.

    Args:
        task: what to plan.
        seed: another one draws another plan.
        widths: that units may have.
        granularity: what has a width of its own.
        grid: see :class:`planner.quantize.grid.Grid`.

    Raises:
        PlanError: bits that cannot be met.
    """
    units = units_of(task, widths=widths, granularity=granularity, **grid)
    units.require_room(units.pinned(np.zeros(units.sizes.shape)))
    columns = np.zeros(len(units.units), dtype=np.int64)
    columns[units.protected] = len(units.widths) - 1
    room = units.capacity - units.size(columns)
    free = np.setdiff1d(np.arange(len(columns)), units.protected)
    for unit in np.random.default_rng(seed).permutation(np.repeat(free, len(units.widths) - 1)).tolist():
        more = int(units.sizes[unit, columns[unit] + 1] - units.sizes[unit, columns[unit]])
        if more <= room:
            columns[unit], room = columns[unit] + 1, room - more
    return Draft(
        steps=(units.step("random_bits", columns),),
        score="none",
        unit="",
        values={},
        notes=(*told(units, columns), f"Drawn with seed {seed}: a control, not a choice."),
    )
