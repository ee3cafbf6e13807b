"""What a plan is expected to save and to cost, from the run alone."""

from __future__ import annotations

import numpy as np

from compressor.plan import Estimate, Plan, QuantizeStep
from planner.estimate.layer_error import layer_errors, weighed
from planner.estimate.parameters import active_parameters, expert_parameters, sizes_after, sizes_before
from planner.estimate.prediction import predict
from planner.estimate.storage import expert_bytes, mean_bits
from planner.source import value_bytes
from planner.task import Draft, Task, rounded


def estimate(plan: Plan, task: Task, draft: Draft) -> Estimate:
    """The estimate of a plan.

    Args:
        plan: with its steps; its own estimate does not count.
        task: what was planned.
        draft: what the method says of it.
    """
    before, after = sizes_before(plan.source), sizes_after(plan)
    whole, left = expert_parameters(plan.source, before), expert_parameters(plan.source, after)
    errors, size = layer_errors(plan, task), value_bytes(task.run) or 0
    quantized = any(isinstance(step, QuantizeStep) for step in plan.steps)
    return Estimate(
        expert_parameters=whole,
        expert_parameters_after=left,
        active_parameters=active_parameters(plan.source, before),
        active_parameters_after=active_parameters(plan.source, after),
        bytes_saved=max(whole * size - expert_bytes(plan, source_bits=8.0 * size), 0) if size else 0,
        bits=_short(mean_bits(plan, source_bits=8.0 * size)) if quantized and size else None,
        kept_mass=None if draft.kept_mass is None else _short(draft.kept_mass),
        layer_error=None if errors is None else _short(float(np.mean(list(errors.values())))),
        prediction=predict(plan, task),
        weighed_error=None if errors is None else _short(weighed(errors, task)),
    )


def _short(value: float) -> float:
    return float(rounded(value))  # type: ignore[arg-type]
