"""Drop the experts with the lowest score: REAP, EAN, frequency and all others that :mod:`planner.importance` knows."""

from __future__ import annotations

from typing import Any

import numpy as np

import planner.importance as importance
from compressor.plan import DropStep
from moescope.errors import PlanError
from planner.allocation import Allocation, counts, drop_layers, lost_by_count, lowest
from planner.domains import Mix, expert_scores, kept_by_domain
from planner.probes import Weigh
from planner.task import Draft, Task

_ADDITIVE = ("frequency", "gate_mass", "dern", "esft_gate", "esft_token", "ean", "easy_ep")
"""Scores whose sum over experts means something: what stays of it is a mass."""


def draft(
    task: Task,
    *,
    score: str,
    allocation: Allocation = "uniform",
    weigh: Weigh = "influence",
    mix: Mix = "union",
    **parameters: Any,
) -> Draft:
    """Every layer loses its lowest experts.

    Args:
        task: what to plan.
        score: of whole experts, by its name in :mod:`planner.importance`.
        allocation: the same number in every layer, or as many in all from where the least of the layers' scores goes.
        weigh: what makes layers comparable where they compete, see :func:`planner.probes.layer_weights`.
        mix: how domains come together.
        parameters: of the score.

    Raises:
        PlanError: a score of neurons, or what the score or the allocation refuses.
    """
    one = importance.find(score)
    if one.granularity != "expert":
        raise PlanError(f"score {score!r} is one per {one.granularity}, and experts are dropped by a score per expert")
    scores, own = expert_scores(task, score, mix, parameters)

    def protected(key: tuple[int, int]) -> frozenset[int]:
        return task.guard.experts(key)

    number, notes = counts(
        task, allocation, weigh, lambda shape: lost_by_count(scores[shape.key], shape, protected(shape.key))
    )
    gone = {
        shape.key: lowest(scores[shape.key], shape, number[shape.key], protected(shape.key)) for shape in task.layers
    }
    kept = {shape.key: sorted(set(range(shape.num_experts)) - set(gone[shape.key])) for shape in task.layers}
    mass = None
    if score in _ADDITIVE:
        total = sum(values.sum() for values in scores.values())
        mass = float(sum(scores[key][kept[key]].sum() for key in kept) / total) if total > 0 else None
        notes += [note for note in [kept_by_domain(own, kept)] if note]
    if own:
        notes.insert(0, _UNION.format(count=len(own)))
    return Draft(
        steps=(DropStep(method=score, form=task.form, layers=drop_layers(gone)),),  # type: ignore[arg-type]
        score=score,
        unit=f"share of the layer, summed over {len(own)} domains" if own else one.unit,
        values={key: np.asarray(values) for key, values in scores.items()},
        kept_mass=mass,
        notes=tuple(notes),
    )


_UNION = (
    "Scores of {count} domains, each divided by its sum over the layer, were added: no domain counts more than another."
)
