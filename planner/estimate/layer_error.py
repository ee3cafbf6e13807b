"""What dropping experts adds to the output of the MoE layers, before anything is routed anew."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from compressor.plan import DropStep, LayerKey, Plan, experts_after
from moescope.errors import PlanError
from planner.grams import relative_error, total_gram
from planner.probes import layer_weights
from planner.task import Task


def layer_errors(plan: Plan, task: Task) -> dict[LayerKey, float] | None:
    """(layer, step) -> squared error of the layer's output over its squared norm, over the task's tokens.

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
    return {
        key: relative_error(grams[key], [] if key[0] in silent else [expert.lead for expert in experts])
        for key, experts in after.items()
    }


def weighed(errors: Mapping[LayerKey, float], task: Task) -> float:
    """Mean over the MoE layers, each by how far its experts turn the residual stream (1 - cosine).

    The error of a layer that adds little to the stream costs the model little. Where the run does not know how much
    they add, all layers count alike.
    """
    weights, _ = layer_weights(task, "influence")
    parts = np.array([weights[layer] for layer, _ in errors])
    values = np.array(list(errors.values()))
    return float((parts * values).sum() / parts.sum()) if parts.sum() > 0 else float(values.mean())
