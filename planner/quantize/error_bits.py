"""Error bits: the widths whose output errors add up to the least, in one budget for the whole model. Ours.

What narrower weights of different experts do to a layer's output adds up nearly independently, so squared errors are
summed; they are made comparable by the residual stream that they are added to. The choice is exact.
"""

from __future__ import annotations

from typing import Literal, Unpack

from moescope.errors import PlanError
from planner.quantize.costs import EVEN, CostWeigh, error_costs, told
from planner.quantize.errors import layer_errors
from planner.quantize.grid import Granularity, Grid, Widths
from planner.quantize.units import units_of
from planner.task import Draft, Task


def draft(
    task: Task,
    *,
    widths: Widths = (2, 3, 4, 8),
    granularity: Granularity = "matrix",
    budget: Literal["model", "layer"] = "model",
    weigh: CostWeigh = "stream",
    even: float = EVEN,
    **grid: Unpack[Grid],
) -> Draft:
    """The least weighed sum of squared output errors within the bits.

    Args:
        task: what to plan.
        widths: that units may have.
        granularity: what has a width of its own.
        budget: ``model`` = one for all; ``layer`` = every layer has the same bits per weight.
        weigh: what makes layers comparable, see :data:`planner.quantize.costs.CostWeigh`.
        even: part of what each expert adds that is taken to be spread evenly over its layer, see
            :data:`planner.quantize.costs.EVEN`.
        grid: see :class:`planner.quantize.grid.Grid`.

    Raises:
        PlanError: a run without errors and activations, a word that is not known, or bits that cannot be met.
    """
    if budget not in ("model", "layer"):
        raise PlanError(f"budget {budget!r} is not known: use model or layer")
    units = units_of(task, widths=widths, granularity=granularity, **grid)
    costs, values, notes = error_costs(units, weigh, even=even)
    columns = units.choose(costs, per_layer=budget == "layer")
    return Draft(
        steps=(units.step("error_bits", columns),),
        score=f"output error at {units.widths[0]} bits",
        unit="weighed part of the layer's squared output",
        values=values,
        notes=(*told(units, columns, layer_errors(task)), *notes),
    )
