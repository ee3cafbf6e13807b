"""Uniform bits: one width for all experts, the control that every mixture of widths has to beat."""

from __future__ import annotations

from typing import Unpack

import numpy as np

from moescope.errors import PlanError
from planner.quantize.costs import told
from planner.quantize.grid import Grid, Widths, widths_of
from planner.quantize.units import Units, units_of
from planner.task import Draft, Task


def draft(task: Task, *, widths: Widths = (2, 3, 4, 8), **grid: Unpack[Grid]) -> Draft:
    """The widest width that fits, for routed experts, and for shared ones unless ``shared_bits`` says otherwise.

    Super experts have the width of all others.

    Args:
        task: what to plan.
        widths: that may be taken.
        grid: see :class:`planner.quantize.grid.Grid`.

    Raises:
        PlanError: not even the narrowest fits.
    """
    found: Units | None = None
    for width in widths_of(widths):
        own: Grid = {"shared_bits": width, **grid}
        units = units_of(task, widths=[width], granularity="layer", **own)
        if int(units.sizes.sum()) <= units.capacity:
            found = units
        elif found is None:
            units.require_room(np.zeros(units.sizes.shape))
    if found is None:
        raise PlanError(f"no width fits into {task.bits:g} bits")
    columns = np.zeros(len(found.units), dtype=np.int64)
    return Draft(
        steps=(found.step("uniform_bits", columns),),
        score="none",
        unit="",
        values={},
        notes=(*told(found, columns), "All experts have one width: a control, not a choice."),
    )
