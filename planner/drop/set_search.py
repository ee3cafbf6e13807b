"""Set search: the experts whose joint absence changes the layer's output least. Ours.

Scores price experts one by one; their outputs add up, so what two of them cost together is not the sum. The Gram matrix
of weighted outputs prices any set exactly, before anything is routed anew, so the set can be searched without running
the model again: the cheapest expert is added, then swaps are made until none helps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from compressor.plan import DropLayer, DropStep, LayerKey, LayerShape
from moescope.errors import PlanError
from planner.allocation import Allocation, counts, drop_layers, most_removed
from planner.domains import Mix
from planner.grams import SCALED, domain_grams, even_gram, mixed_gram, relative_error
from planner.probes import Weigh
from planner.task import Array, Draft, Task, rounded

Use = Literal["counted", "even"]
"""Whether an expert that is used twice as often counts twice, or all count as if they were used equally often."""

EVERY_SET = 20_000
"""Sets of one size of which all are priced: 8 of 16 experts are 12,870."""

EVEN = (
    "Experts count as if all were used equally often: a rarely used expert stays where what it does for its tokens"
    " cannot be spared."
)

_GAIN = 1e-12  # of the layer's squared output: less is rounding, and could swap forever


def draft(
    task: Task,
    *,
    allocation: Allocation = "uniform",
    weigh: Weigh = "influence",
    mix: Mix = "union",
    use: Use = "counted",
) -> Draft:
    """Every layer loses the set that costs least.

    Args:
        task: what to plan.
        allocation: the same number in every layer, or as many in all from where they cost least: the weighed sum over
            layers of relative errors is then the least that the found sets allow.
        weigh: what makes layers comparable where they compete, see :func:`planner.probes.layer_weights`.
        mix: ``union`` = the mean over domains of each domain's relative error; ``tokens`` = the error over all tokens.
        use: ``counted`` = as often as experts were used on this text; ``even`` = as if all were used equally often,
            which holds better on text that the run has not seen.

    Raises:
        PlanError: a use that is not known, a run that was not collected at level activations, or what the allocation
            refuses.
    """
    if use not in ("counted", "even"):
        raise PlanError(f"use {use!r} is not known: use counted or even")
    grams, exact = mixed_gram(task, mix) if use == "counted" else even_gram(task, mix)
    found: dict[LayerKey, dict[int, NDArray[np.bool_]]] = {}

    def sets(shape: LayerShape, most: int) -> dict[int, NDArray[np.bool_]]:
        if len(found.get(shape.key, {})) * shape.groups <= most:
            path = masked_sets(grams[shape.key], shape, task.guard.experts(shape.key), most)
            found[shape.key] = {int(mask.sum()): mask for mask in path}
        return found[shape.key]

    def costs(shape: LayerShape) -> Array:
        most = most_removed(shape, task.guard.experts(shape.key))
        cost = np.full(most + 1, np.inf)
        for count, mask in sets(shape, most).items():
            cost[count] = _price(grams[shape.key], mask)
        return cost

    number, notes = counts(task, allocation, weigh, costs)
    masks = {shape.key: sets(shape, number[shape.key])[number[shape.key]] for shape in task.layers}
    return Draft(
        steps=(DropStep(method="set_search", form=task.form, layers=_dropped(masks)),),  # type: ignore[arg-type]
        score="set error",
        unit="part of the layer's squared output" + (", every expert used equally often" if use == "even" else ""),
        values={key: rounded(marginal_errors(grams[key], mask)) for key, mask in masks.items()},
        notes=(*notes, *([EVEN] if use == "even" else []), *_notes(task, mix, masks, exact)),
    )


def masked_sets(gram: Array, shape: LayerShape, protected: Collection[int], most: int) -> Iterator[NDArray[np.bool_]]:
    """(experts,) masks of 0, g, 2 g, ... up to ``most`` experts that go, g the number of groups, cheapest sets first.

    Where there are at most :data:`EVERY_SET` sets of a size, all are priced and the cheapest is taken. Where there are
    more, each set grows out of the one before by the cheapest expert of every group; then a masked expert and a kept
    one of the same group change places, always the pair that helps most, until none helps: no better set is one swap
    away, but one further away may be.
    """
    experts = len(gram)
    group = np.arange(experts) // (experts // shape.groups)
    free = np.ones(experts, dtype=bool)
    free[list(protected)] = False
    masked = np.zeros(experts, dtype=bool)
    yield masked.copy()
    for _ in range(most // shape.groups):
        for one in range(shape.groups):
            price = np.diag(gram) + 2 * gram[:, masked].sum(1)
            price[masked | ~free | (group != one)] = np.inf
            masked[int(price.argmin())] = True
        _swap(gram, masked, free, group)
        if _sets(free, group, masked) <= EVERY_SET:
            masked = _cheapest(gram, free, group, masked)
        yield masked.copy()


def _sets(free: NDArray[np.bool_], group: NDArray[np.int64], masked: NDArray[np.bool_]) -> int:
    """Sets with as many experts of each group as the masked ones."""
    each = int(masked.sum()) // (int(group[-1]) + 1)
    return math.prod(math.comb(int(free[group == one].sum()), each) for one in range(int(group[-1]) + 1))


def _cheapest(
    gram: Array, free: NDArray[np.bool_], group: NDArray[np.int64], masked: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """The cheapest of all sets of that size; the given one where none is cheaper."""
    each = int(masked.sum()) // (int(group[-1]) + 1)
    choices = [
        itertools.combinations(np.flatnonzero(free & (group == one)).tolist(), each)
        for one in range(int(group[-1]) + 1)
    ]
    sets = np.array([sum(chosen, ()) for chosen in itertools.product(*choices)])
    masks = np.zeros((len(sets), len(gram)), dtype=bool)
    np.put_along_axis(masks, sets, True, axis=1)
    prices = ((masks @ gram) * masks).sum(1)
    better = prices.min() < _price(gram, masked) - _GAIN * abs(float(gram.sum()))
    return masks[int(prices.argmin())] if better else masked


def marginal_errors(gram: Array, masked: NDArray[np.bool_]) -> Array:
    """(experts,) what the error grows by when a kept expert goes as well, or falls by when a masked one returns."""
    crossed = gram[:, masked].sum(1)
    own = np.diag(gram)
    marginal: Array = own + 2 * np.where(masked, crossed - own, crossed)
    return marginal


def _swap(gram: Array, masked: NDArray[np.bool_], free: NDArray[np.bool_], group: NDArray[np.int64]) -> None:
    """Swap in place until no swap helps."""
    diagonal, least = np.diag(gram), _GAIN * abs(float(gram.sum()))
    while True:
        crossed = gram[:, masked].sum(1)
        gone, kept = np.flatnonzero(masked), np.flatnonzero(~masked & free)
        change = (diagonal - 2 * crossed)[gone][:, None] + (diagonal + 2 * crossed)[kept][None]
        change = change - 2 * gram[np.ix_(gone, kept)]
        change[group[gone][:, None] != group[kept][None]] = np.inf
        if not change.size or change.min() >= -least:
            return
        back, away = np.unravel_index(int(change.argmin()), change.shape)
        masked[gone[back]], masked[kept[away]] = False, True


def _price(gram: Array, mask: NDArray[np.bool_]) -> float:
    return float(gram[np.ix_(mask, mask)].sum())


def _dropped(masks: dict[LayerKey, NDArray[np.bool_]]) -> tuple[DropLayer, ...]:
    return drop_layers({key: np.flatnonzero(mask).tolist() for key, mask in masks.items()})


def _notes(task: Task, mix: Mix, masks: dict[LayerKey, NDArray[np.bool_]], exact: bool) -> list[str]:
    if len(task.domains) < 2:
        return [] if exact else [SCALED]
    own, _ = domain_grams(task)
    errors = [
        f"{domain} {np.mean([relative_error(part[key], np.flatnonzero(~mask)) for key, mask in masks.items()]):.3f}"  # type: ignore[arg-type]
        for domain, part in zip(task.domains, own, strict=True)
    ]
    how = "the mean over domains of each domain's relative error" if mix == "union" else "the error over all tokens"
    return [
        f"The search takes {how}.",
        f"Relative error of the layers' output, mean over layers, by domain: {', '.join(errors)}.",
        *([] if exact else [SCALED]),
    ]
