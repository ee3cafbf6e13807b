"""The route step of a plan, or of a configuration, as rules before the experts of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from compressor.families.per_layer import parts_of
from compressor.plan.routing import ROUTE, RouteLayer, RouteRule, RouteStep, RouteWeights
from compressor.routing.hook import Routing, install
from compressor.routing.rules import Bias, NullExperts, Ratio, Rule, Threshold, TopK, TopP
from moescope.errors import ModelError

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


def stated_route(config: Any) -> RouteStep | None:
    """The route step that a configuration keeps, in itself or in a part; None without.

    Raises:
        ModelError: what it keeps is no route step.
    """
    content = next((found for part in parts_of(config) if (found := getattr(part, ROUTE, None))), None)
    if content is None:
        return None
    try:
        return RouteStep.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ModelError(f"{ROUTE} of the configuration is no route step: {place}: {first['msg']}") from error


def put_before(model: nn.Module) -> Routing | None:
    """Put the rules that a model's configuration keeps before its experts; None where it keeps none.

    Raises:
        ModelError: they cannot be put there, or are there already.
    """
    step = stated_route(getattr(model, "config", None))
    return None if step is None else install(model, rules_of(step))


def _rule(step: RouteStep, one: RouteLayer) -> Rule:
    if step.rule == "bias":
        return Bias(torch.tensor(one.bias, dtype=torch.float32, device="cpu"))
    assert one.value is not None
    return _RULES[step.rule](one.value, step.weights)
