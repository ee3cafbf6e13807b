"""Random: the control that every method has to beat."""

from __future__ import annotations

import numpy as np

from compressor.plan import DropStep
from planner.allocation import drop_layers, lowest, removed
from planner.task import Draft, Task, rounded


def draft(task: Task, *, seed: int = 0) -> Draft:
    """Every layer loses experts drawn at random; groups and protected experts are respected as everywhere.

    Args:
        task: what to plan.
        seed: another one draws another plan.
    """
    values = {
        shape.key: rounded(np.random.default_rng([seed, *shape.key]).uniform(size=shape.num_experts))
        for shape in task.layers
    }
    gone = {
        shape.key: lowest(values[shape.key], shape, removed(task, shape), task.guard.experts(shape.key))
        for shape in task.layers
    }
    return Draft(
        steps=(DropStep(method="random", form=task.form, layers=drop_layers(gone)),),  # type: ignore[arg-type]
        score="random",
        unit="uniform draw",
        values=values,
        notes=(f"Drawn with seed {seed}: a control, not a choice.",),
    )
