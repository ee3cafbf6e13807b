"""Nested widths: 2, 3 and 4 bits from one file, each bit a binary residual of the one before (D2MoE, arXiv 2504.15299).

The planner finds which expert is read at which width; the file serves all of them.
"""

from __future__ import annotations

from typing import Unpack

import numpy as np

from compressor.plan import Bits
from moescope.errors import PlanError
from planner.probes import Weigh, layer_weights
from planner.quantize.costs import columns_of, told
from planner.quantize.errors import layer_errors
from planner.quantize.grid import Granularity, Grid, Widths, widths_of
from planner.quantize.units import units_of
from planner.task import Draft, Task, rounded

NESTED: tuple[Bits, ...] = (2, 3, 4)

_SEPARATE = "The run has no errors of nested widths: those of separate ones stand for them."


def draft(
    task: Task,
    *,
    widths: Widths = NESTED,
    granularity: Granularity = "expert",
    weigh: Weigh = "influence",
    **grid: Unpack[Grid],
) -> Draft:
    """The least weighed sum of squared output errors within the bits, by the errors of nested widths.

    Args:
        task: what to plan.
        widths: of 2, 3 and 4.
        granularity: expert or layer; a run has no nested errors of single projections.
        weigh: what makes layers comparable, see :func:`planner.probes.layer_weights`.
        grid: see :class:`planner.quantize.grid.Grid`; ``shared_bits`` is 4 unless given.

    Raises:
        PlanError: other widths, granularity projection, a run without errors, or bits that cannot be met.
    """
    shared = grid.get("shared_bits", 4)
    wrong = [one for one in (*widths_of(widths), *([] if shared is None else [shared])) if one not in NESTED]
    if wrong:
        raise PlanError(f"nested widths are made from 2 bits by residuals: use 2, 3 and 4, not {wrong[0]}")
    if granularity in ("matrix", "projection"):
        raise PlanError("a run knows nested errors of whole experts: use granularity expert or layer")
    own: Grid = {"shared_bits": 4, **grid}
    units = units_of(task, widths=widths, granularity=granularity, nested=2, **own)
    errors = layer_errors(task)
    known = not any(np.isnan(one.nested).any() for one in errors.values())
    weights, note = layer_weights(task, weigh)
    at = [NESTED.index(int(one)) for one in units.widths] if known else columns_of(units.widths)
    costs = {key: (one.nested if known else one.errors["all"])[:, at] * weights[key[0]] for key, one in errors.items()}
    columns = units.choose(rounded(units.of({key: {"all": one} for key, one in costs.items()})))
    narrowest = units.per_expert({key: one[:, 0] for key, one in costs.items()})
    notes = [note] if known else [note, _SEPARATE]
    return Draft(
        steps=(units.step("nested", columns),),
        score=f"output error at {units.widths[0]} bits, nested",
        unit="weighed part of the layer's squared output",
        values={key: rounded(one) for key, one in narrowest.items()},
        notes=(*told(units, columns, errors), *notes, "One file serves every width: its experts can be read wider."),
    )
