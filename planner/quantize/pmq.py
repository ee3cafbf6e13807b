"""PMQ: MC-MoE's programme over the experts of each layer (arXiv 2410.06270, ICLR 2025).

Per layer: the least sum of phi^alpha w^beta eps^gamma, one width per expert, so many bits in all, at least one expert
at each of the two widest widths. phi is the expert's share of the selections, w its share of the probabilities of the
router, eps the error of the layer's output when it alone is narrower. eps holds phi and w already: alpha = beta = 0
does not count them twice.

Published code and paper differ: the code raises eps to the power 1 and bounds the bits, the paper raises it to 2 and
asks for them exactly. eps is here the root of one sum of squares over all tokens, where the code adds up norms of
batches; its factor of 1,000 changes no choice.
"""

from __future__ import annotations

import math
from typing import Unpack

import numpy as np
import polars as pl

from compressor.plan import LayerKey
from moescope.errors import PlanError
from planner.quantize import knapsack
from planner.quantize.costs import columns_of, told
from planner.quantize.errors import layer_errors
from planner.quantize.grid import Granularity, Grid, Widths, nominal_bits
from planner.quantize.programme import Floats, Whole
from planner.quantize.units import Units, units_of
from planner.task import Array, Draft, Task, rounded


def draft(
    task: Task,
    *,
    alpha: float = 1.0,
    beta: float = 1.5,
    gamma: float = 2.0,
    equal: bool = True,
    widths: Widths = (1, 2, 3),
    granularity: Granularity = "expert",
    **grid: Unpack[Grid],
) -> Draft:
    """The programme of every layer, solved exactly.

    The programme counts nominal bits, the same in every layer; the task's are effective. Layers are given the most
    nominal bits at which the solution of each takes no more than the task's effective ones.

    Args:
        task: what to plan.
        alpha: exponent of the share of selections.
        beta: exponent of the share of the router's probabilities.
        gamma: exponent of the error.
        equal: the nominal bits are met exactly, as in the paper; else they bound.
        widths: that experts may have.
        granularity: expert; the programme knows no other.
        grid: see :class:`planner.quantize.grid.Grid`.

    Raises:
        PlanError: another granularity, a run without errors, or bits that cannot be met.
    """
    if granularity != "expert":
        raise PlanError(f"PMQ's programme is over the experts of a layer: granularity expert, not {granularity!r}")
    units = units_of(task, widths=widths, granularity=granularity, **grid)
    errors = layer_errors(task)
    use, weight, note = _shares(task)
    phi, share = (units.of({key: {"all": one[:, None]} for key, one in values.items()}) for values in (use, weight))
    eps = np.sqrt(units.of({key: {"all": one.errors["all"]} for key, one in errors.items()}))
    costs = rounded(phi**alpha * share**beta * eps[:, columns_of(units.widths)] ** gamma)
    columns, bits = _solved(units, units.pinned(costs), equal)
    return Draft(
        steps=(units.step("pmq" if equal else "pmq_code", columns),),
        score=f"PMQ cost at {units.widths[0]} bits",
        unit=f"phi^{alpha:g} w^{beta:g} eps^{gamma:g}",
        values=units.by_expert(costs[:, 0]),
        notes=(*told(units, columns, errors), _budget(bits, equal), *note),
    )


def _shares(task: Task) -> tuple[dict[LayerKey, Array], dict[LayerKey, Array], list[str]]:
    """phi and w of every expert of the source, and what to note."""
    rows = task.run.table("expert_load").filter(
        (pl.col("kind") == "routed") & pl.col("domain").is_in([*task.domains, ""])
    )
    full = not rows.is_empty() and rows["probability_sum"].null_count() == 0
    column = "probability_sum" if full else "gate_sum"
    summed = rows.group_by("layer", "step", "expert").agg(pl.col("tokens", column).sum())
    found: list[dict[LayerKey, Array]] = [{}, {}]
    for shape in task.source.layers:
        mine = summed.filter(
            (pl.col("layer") == shape.layer) & (pl.col("step") == shape.step) & (pl.col("expert") < shape.num_experts)
        )
        for kept, name in zip(found, ("tokens", column), strict=True):
            values = np.zeros(shape.num_experts)
            values[mine["expert"].to_numpy()] = mine[name].to_numpy()
            kept[shape.key] = values / (values.sum() or 1.0)
    note = [] if full else ["w is the sum of gate weights: the run has no router probabilities before the choice of k."]
    return found[0], found[1], note


def _solved(units: Units, costs: Floats, equal: bool) -> tuple[Whole, list[tuple[int, int]]]:
    """(units,) columns; and (nominal bits, experts) of layers with as many experts, which share a budget.

    Raises:
        PlanError: no solution takes few enough bits.
    """
    nominal = np.array([nominal_bits(one) for one in units.widths])
    if not np.array_equal(nominal, nominal.round()):
        raise PlanError("PMQ counts whole bits: use widths 1, 2, 3, 4 and 8")
    minimum = np.zeros(len(nominal), dtype=np.int64)
    minimum[-2:] = 1
    units.require_room(costs, per_layer=True, minimum=minimum)
    columns, bits = np.zeros(len(costs), dtype=np.int64), []
    members = [np.flatnonzero(units.groups == group) for group in range(len(units.experts))]
    for count in sorted({len(mine) for mine in members}):
        alike = [group for group, mine in enumerate(members) if len(mine) == count]
        budget = _together(units, costs, nominal, minimum, [members[group] for group in alike], alike, equal, columns)
        bits.append((budget, count))
    return columns, bits


def _together(
    units: Units, costs: Floats, nominal: Floats, minimum: Whole, members: list[Whole], layers: list[int], equal: bool,
    columns: Whole,
) -> int:  # fmt: skip
    """Fill in the columns of layers with as many experts, at the most nominal bits that all of them can have.

    Raises:
        PlanError: there are none.
    """
    count = len(members[0])
    sizes = np.broadcast_to(nominal.astype(np.int64), (count, len(nominal)))
    rooms = units.layer_capacity[layers].tolist()
    takes = [
        (units.sizes[mine] / units.weights[mine, None] - nominal).min(1).sum() for mine in members
    ]  # scales, zeros
    most = min(
        math.floor(room / int(units.weights[mine[0]]) - least + 1e-9)
        for room, mine, least in zip(rooms, members, takes, strict=True)
    )
    for budget in range(min(most, int(nominal[-1]) * count), 0, -1):
        for mine, room in zip(members, rooms, strict=True):
            try:
                found = knapsack.solve(costs=costs[mine], sizes=sizes, capacity=budget, minimum=minimum, equal=equal)
            except PlanError:
                break
            if int(units.sizes[mine, found.widths].sum()) > room:
                break
            columns[mine] = found.widths
        else:
            return budget
    raise PlanError(f"no solution of PMQ's programme meets {units.task.bits:g} bits per weight: ask for more")


def _budget(bits: list[tuple[int, int]], equal: bool) -> str:
    each = sorted({budget / count for budget, count in bits})
    span = f"{each[0]:.4g}" if len(each) == 1 else f"{each[0]:.4g} to {each[-1]:.4g}"
    return (
        f"The programme counts nominal bits: {'exactly' if equal else 'at most'} {span} per expert in every layer, the"
        " most whose solution keeps to the effective bits, with at least one expert at each of the two widest widths."
    )
