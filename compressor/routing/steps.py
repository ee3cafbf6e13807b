"""The route step of a plan as rules, and where a configuration keeps it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from compressor.plan.routing import RouteLayer, RouteRule, RouteStep, RouteWeights
from compressor.routing.rules import Bias, NullExperts, Ratio, Rule, Threshold, TopK, TopP

ROUTE = "moescope_route"
"""Field of a configuration: a route step, by the numbers of the layers and experts of that checkpoint."""

_RULES: dict[RouteRule, Callable[[float, RouteWeights], Rule]] = {
    "top_k": lambda value, weights: TopK(round(value), weights),
    "top_p": TopP,
    "ratio": Ratio,
    "threshold": Threshold,
    "null_experts": NullExperts,
}


def rules_of(step: RouteStep) -> dict[tuple[int, int], Rule]:
    """(layer, step) -> the rule that the step puts there."""
    return {(one.layer, one.step): _rule(step, one) for one in step.layers}


def _rule(step: RouteStep, one: RouteLayer) -> Rule:
    if step.rule == "bias":
        return Bias(torch.tensor(one.bias, dtype=torch.float32, device="cpu"))
    assert one.value is not None
    return _RULES[step.rule](one.value, step.weights)
