"""What dropping experts adds to the output of the MoE layers, before anything is routed anew."""

from __future__ import annotations

import numpy as np

from compressor.plan import DropStep, Plan, experts_after
from moescope.errors import PlanError
from planner.grams import relative_error, total_gram
from planner.task import Task


def layer_error(plan: Plan, task: Task) -> float | None:
    """Squared error of a layer's output over its squared norm, over the task's tokens, mean over the MoE layers.

    None where the run has no weighted outputs (level activations), and for what the Gram matrix cannot price: merged
    and slimmed experts, and decoder layers that go as a whole.
    """
    steps = [step for step in plan.steps if isinstance(step, DropStep)]
    if len(steps) != len(plan.steps) or any(step.decoder_layers for step in steps):
        return None
    try:
        grams, _ = total_gram(task)
    except PlanError:
        return None
    silent = {layer for step in steps for layer in step.blocks}
    after = experts_after(plan)
    errors = [
        relative_error(grams[key], [] if key[0] in silent else [expert.lead for expert in experts])
        for key, experts in after.items()
    ]
    return float(np.mean(errors))
