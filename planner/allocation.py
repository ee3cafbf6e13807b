"""How many experts each layer loses: the same everywhere, or where it costs least; and which, where a score says so."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from compressor.plan import DropLayer, LayerKey, LayerShape
from moescope.errors import PlanError
from planner.probes import Weigh, layer_weights
from planner.task import Array, Task

Allocation = Literal["uniform", "budgeted"]

_ROUNDING = 1e-9  # 0.29 of 100 is 29, whatever its binary digits say


def part(count: int, share: float) -> int:
    """``int(count * share)``, without the errors of binary fractions."""
    return math.floor(count * share + _ROUNDING)


def blocks(shape: LayerShape) -> list[NDArray[np.int64]]:
    """The experts of each group that the router limits itself to; without groups, all experts."""
    return np.split(np.arange(shape.num_experts), shape.groups)


def least_kept(shape: LayerShape) -> int:
    """The fewest experts that a layer works with: k, and enough in every group."""
    if shape.groups == 1:
        return shape.top_k
    # Routers that limit themselves to groups rank these by their two best experts.
    return shape.groups * max(2, math.ceil(shape.top_k / shape.chosen_groups))


def removed(task: Task, shape: LayerShape) -> int:
    """Experts that a layer loses at the task's share: the same number from every group, not more than the share.

    Raises:
        PlanError: that is none, leaves too few, or more are protected than would stay.
    """
    where = f"layer {shape.layer}"
    count = part(shape.num_experts, task.share)
    if count < 1:
        raise PlanError(
            f"share {task.share:g} of {shape.num_experts} experts removes none from {where}: ask for at least"
            f" {1 / shape.num_experts:.4g}"
        )
    count -= count % shape.groups
    if count < 1:
        raise PlanError(
            f"share {task.share:g} removes fewer experts than {where} has groups, {shape.groups}, and groups lose the"
            f" same number: ask for at least {shape.groups / shape.num_experts:.4g}"
        )
    kept, least = shape.num_experts - count, least_kept(shape)
    if kept < least:
        raise PlanError(
            f"share {task.share:g} would keep {kept} of {shape.num_experts} experts of {where}, which needs {least}:"
            f" ask for at most {1 - least / shape.num_experts:.4g}"
        )
    room = most_removed(shape, task.guard.experts(shape.key))
    if count > room:
        protected = len(task.guard.experts(shape.key))
        raise PlanError(
            f"{where} protects {protected} super experts and would keep {kept} of {shape.num_experts}, so that at most"
            f" {room} can go and not {count}: lower the share, or plan without the guard"
        )
    return count


def removed_in_all(task: Task) -> int:
    """Experts that all layers together lose at the task's share.

    Raises:
        PlanError: that is none, or more than the layers can spare.
    """
    whole = sum(shape.num_experts for shape in task.layers)
    step = math.gcd(*(shape.groups for shape in task.layers))
    total = part(whole, task.share)
    total -= total % step
    if total < 1:
        raise PlanError(
            f"share {task.share:g} of {whole} experts removes none: ask for at least {step / whole:.4g}"
            + (f", one from each of {step} groups" if step > 1 else "")
        )
    most = sum(most_removed(shape, task.guard.experts(shape.key)) for shape in task.layers)
    if total > most:
        raise PlanError(
            f"share {task.share:g} would remove {total} of {whole} experts, and the layers can spare {most}, by the"
            f" experts of a token and those that are protected: ask for at most {most / whole:.4g}"
        )
    return total


def most_removed(shape: LayerShape, protected: Collection[int]) -> int:
    """Experts that a layer can lose at most."""
    size = shape.num_experts // shape.groups
    most = (shape.num_experts - least_kept(shape)) // shape.groups
    free = [size - len(set(protected) & set(block.tolist())) for block in blocks(shape)]
    return shape.groups * max(min(most, *free), 0)


def counts(
    task: Task, allocation: Allocation, weigh: Weigh, costs: Callable[[LayerShape], Array]
) -> tuple[dict[LayerKey, int], list[str]]:
    """(layer, step) -> experts to remove, and what to note.

    Args:
        task: share, guard and form.
        allocation: ``uniform`` = the same share of every layer; ``budgeted`` = the share of all experts together, from
            where it costs least.
        weigh: what makes costs of different layers comparable.
        costs: of a layer, for ``budgeted``: (at most removed + 1,) what removing 0, 1, ... experts costs, as a part of
            the layer's whole.

    Raises:
        PlanError: as :func:`removed` and :func:`removed_in_all`, another allocation, or one that the form cannot hold.
    """
    if allocation not in ("uniform", "budgeted"):
        raise PlanError(f"allocation {allocation!r} is not known: use uniform or budgeted")
    weights, note = layer_weights(task, weigh)
    if allocation == "uniform":
        return {shape.key: removed(task, shape) for shape in task.layers}, []
    if task.form == "uniform":
        raise PlanError(
            "allocation budgeted keeps different numbers of experts per layer, which form uniform cannot hold: use form"
            " per_layer (engine transformers), or padded where the router has a selection bias"
        )
    total = removed_in_all(task)
    weighed = [costs(shape) * weights[shape.layer] for shape in task.layers]
    chosen = allocate(weighed, total)
    return {shape.key: count for shape, count in zip(task.layers, chosen, strict=True)}, [note]


def allocate(costs: Sequence[Array], total: int) -> list[int]:
    """How many units each layer gives so that all together give ``total`` at the least cost, exactly.

    Dynamic programming over the layers: cost[n] is the least that n units of the layers so far cost. Of equal costs,
    earlier layers give fewer.

    Args:
        costs: per layer, the cost of giving 0, 1, 2, ... units; infinity where a number cannot be.
        total: units that are wanted.

    Raises:
        PlanError: the layers cannot give so many.
    """
    best = np.full(total + 1, np.inf)
    best[0] = 0.0
    choices: list[NDArray[np.int32]] = []
    for cost in costs:
        after, choice = np.full(total + 1, np.inf), np.zeros(total + 1, dtype=np.int32)
        for given in np.flatnonzero(np.isfinite(cost[: total + 1])).tolist():
            candidate = best[: total + 1 - given] + cost[given]
            better = candidate < after[given:]
            after[given:][better], choice[given:][better] = candidate[better], given
        best = after
        choices.append(choice)
    if not np.isfinite(best[total]):
        most = sum(int(np.flatnonzero(np.isfinite(cost)).max()) for cost in costs)
        raise PlanError(f"the layers can give at most {most} units, not {total}: lower the share")
    found = []
    for choice in reversed(choices):
        found.append(int(choice[total]))
        total -= found[-1]
    return found[::-1]


def lowest(values: Array, shape: LayerShape, count: int, protected: Collection[int]) -> list[int]:
    """The experts with the lowest values, the same number from every group, ascending; protected ones never.

    Of equal values the higher number goes first.
    """
    each = count // shape.groups
    return sorted(expert for order in _by_value(values, shape, protected) for expert in order[:each])


def _by_value(values: Array, shape: LayerShape, protected: Collection[int]) -> list[list[int]]:
    """The experts of each group that may go, the lowest first."""
    scores = values.tolist()
    orders = []
    for block in blocks(shape):
        free = [expert for expert in block.tolist() if expert not in protected]
        orders.append(sorted(free, key=lambda expert: (scores[expert], -expert)))
    return orders


def lost_by_count(values: Array, shape: LayerShape, protected: Collection[int]) -> Array:
    """(at most removed + 1,) part of the layer's score that goes with the 0, 1, ... lowest experts.

    Infinity where a number does not leave groups alike.
    """
    most = most_removed(shape, protected)
    costs = np.full(most + 1, np.inf)
    total = np.abs(values).sum() or 1.0
    each = most // shape.groups
    step = sum(values[order[:each]] for order in _by_value(values, shape, protected))  # one more from every group
    costs[:: shape.groups] = np.append(0.0, np.cumsum(step)) / total
    return costs


def drop_layers(gone: dict[LayerKey, list[int]]) -> tuple[DropLayer, ...]:
    """The entries of a drop step; layers that lose nothing are left out."""
    return tuple(
        DropLayer(layer=layer, step=step, experts=tuple(experts))
        for (layer, step), experts in sorted(gone.items())
        if experts
    )
