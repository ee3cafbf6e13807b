"""The step that changes the choice of the router while the model runs: more, fewer or other experts per token.

It changes no weights. ``compressor.load`` puts it before the experts: they are called with what the rule makes of the
router's choice.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from compressor.plan.steps import Record, Row

ROUTE = "moescope_route"
"""Field of a configuration: a route step, by the numbers of the layers and experts of that checkpoint."""

RouteRule = Literal["bias", "top_k", "top_p", "ratio", "threshold", "null_experts"]
"""What decides. ``bias``: a vector is added to the router's logits before it chooses. ``top_k``: as many experts as the
value says. ``top_p``: the fewest whose router probability adds up to more than the value. ``ratio``: of those chosen,
those with at least so large a part of the largest gate weight. ``threshold``: those with at least so large a gate
weight. ``null_experts``: those whose logit is above the value, as if experts without output had that logit."""

MAX_BIAS = 10_000.0
"""Of a bias, either way: logits of a router are some tens, and half precision ends at 65,504."""

RouteWeights = Literal["kept", "renormalized"]
"""What becomes of the gate weights: every expert keeps that of the router, and one that the router had not chosen gets
what its score is worth on the same scale; or they are scaled to the sum that the router's own choice had. With rule
``bias`` they are what the router makes of the new logits, whatever stands here."""


class RouteLayer(Record):
    """One layer that the rule changes.

    Attributes:
        layer: decoder layer.
        step: call of the layer's experts.
        value: of the rule, in this layer; null with rule ``bias``.
        bias: added to the logits, one per routed expert; empty with all other rules.
    """

    layer: int = Field(ge=0)
    step: int = Field(default=0, ge=0)
    value: float | None = None
    bias: Row[float] = ()


class RouteStep(Record):
    """What experts are called with instead of the router's own choice.

    Attributes:
        method: by which planner or editor it was found.
        rule: what decides.
        weights: what becomes of the gate weights.
        layers: the layers that it changes; in all others the router's choice stands.
    """

    step: Literal["route"] = "route"
    method: str
    rule: RouteRule
    weights: RouteWeights = "renormalized"
    layers: Row[RouteLayer] = Field(min_length=1)

    @model_validator(mode="after")
    def _says_enough(self) -> RouteStep:
        for one in self.layers:
            if self.rule == "bias" and (one.value is not None or not one.bias):
                raise ValueError(f"layer {one.layer}: rule bias takes one number per expert, and no value")
            if self.rule != "bias" and (one.value is None or one.bias):
                raise ValueError(f"layer {one.layer}: rule {self.rule} takes one value, and no bias")
            if any(abs(number) > MAX_BIAS for number in one.bias):
                raise ValueError(f"layer {one.layer}: a bias beyond {MAX_BIAS:,.0f} leaves nothing of the logits")
            _require_sense(self.rule, one)
        return self


def _require_sense(rule: RouteRule, one: RouteLayer) -> None:
    value = one.value
    if value is None or rule == "null_experts":
        return
    if rule == "top_k" and (value < 1 or value != math.floor(value)):
        raise ValueError(f"layer {one.layer}: {value:g} is no number of experts")
    if rule in ("top_p", "ratio") and not 0 <= value <= 1:
        raise ValueError(f"layer {one.layer}: {value:g} must lie within 0..1 for rule {rule}")
    if rule == "threshold" and value < 0:
        raise ValueError(f"layer {one.layer}: a threshold of {value:g} is below every gate weight")
