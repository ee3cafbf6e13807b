"""DERN-style recombination: the neurons of experts that go move to the kept experts that have some like them.

Written from the description of DERN (EMNLP Findings 2025); no code of it was found. Which experts go is decided here,
which neurons move and how the kept experts are rebuilt by the compressor, from the weights.
"""

from __future__ import annotations

from compressor.plan import GivenUp, LayerShape, MergeGroup, MergeLayer, MergeStep
from moescope.errors import PlanError
from planner.allocation import Allocation, counts, lost_by_count, lowest
from planner.domains import Mix, Scores, expert_scores
from planner.probes import Weigh
from planner.task import Draft, Task


def draft(
    task: Task,
    *,
    threshold: float = 0.6,
    allocation: Allocation = "uniform",
    weigh: Weigh = "influence",
    mix: Mix = "union",
) -> Draft:
    """The experts with the least share of the gate weights are given up; protected ones take nothing.

    Args:
        task: what to plan.
        threshold: least cosine at which a neuron moves, -1..1; 0.6 was best in the paper.
        allocation: the same number in every layer, or as many in all from where least is lost.
        weigh: what makes layers comparable where they compete, see :func:`planner.probes.layer_weights`.
        mix: how domains come together.

    Raises:
        PlanError: a threshold that is no cosine, or a share that cannot be met.
    """
    if not -1 <= threshold <= 1:
        raise PlanError(f"threshold {threshold:g} is no cosine: give one from -1 to 1")
    scores, _ = expert_scores(task, "dern", mix, {})
    number, notes = counts(
        task, allocation, weigh, lambda shape: lost_by_count(scores[shape.key], shape, task.guard.experts(shape.key))
    )
    layers = tuple(_layer(task, shape, scores, number[shape.key]) for shape in task.layers)
    total = sum(values.sum() for values in scores.values())
    lost = sum(scores[one.layer, one.step][entry.expert] for one in layers for entry in one.given_up)
    return Draft(
        steps=(MergeStep(grouping="dern", method="segments", form=task.form, threshold=threshold, layers=layers),),  # type: ignore[arg-type]
        score="dern",
        unit="gate share per token, or share of the layer summed over domains",
        values=scores,
        kept_mass=float(1 - lost / total) if total > 0 else None,
        notes=(*notes, "Kept mass is that of the kept experts; what moved neurons bring back is not in it."),
    )


def _layer(task: Task, shape: LayerShape, scores: Scores, number: int) -> MergeLayer:
    values, alone = scores[shape.key], task.guard.experts(shape.key)
    gone = lowest(values, shape, number, alone)
    groups = [
        MergeGroup(lead=expert, members=(expert,), weights=(1.0,), weight=float(values[expert]), fixed=expert in alone)
        for expert in range(shape.num_experts)
        if expert not in gone
    ]
    given_up = [GivenUp(expert=expert, weight=float(values[expert])) for expert in gone]
    return MergeLayer(layer=shape.layer, step=shape.step, groups=tuple(groups), given_up=tuple(given_up))
