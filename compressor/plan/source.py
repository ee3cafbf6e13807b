"""What a plan knows of the model that it is for: enough to check it without the checkpoint."""

from __future__ import annotations

from functools import cached_property

from pydantic import Field, model_validator

from compressor.plan.steps import Record, Row

LayerKey = tuple[int, int]
"""(layer, step)."""

MAX_LAYERS, MAX_EXPERTS, MAX_TOTAL = 4_096, 65_536, 1_000_000
"""Layers, experts of a layer and of all layers that a document may state: checking takes time and memory for them."""

_SHARED_SOFTMAX = ("ernie4_5_moe", "ernie4_5_vl_moe", "ernie4_5_vl_moe_text", "longcat_flash", "zaya")
"""Families that add their selection bias to a softmax over all experts: one that only fills up would have a part of it,
and the others smaller gate weights, whatever its bias."""


class LayerShape(Record):
    """The experts of one MoE layer.

    Attributes:
        layer: decoder layer.
        step: call of the layer's experts.
        num_experts: E, routed experts that hold weights.
        top_k: k, experts per token.
        width: neurons per routed expert.
        shared_width: neurons of the shared experts, merged; 0 without.
        groups: groups of experts that the router limits itself to; 1 = no groups.
        chosen_groups: groups that a token may choose from.
    """

    layer: int = Field(ge=0)
    step: int = Field(default=0, ge=0)
    num_experts: int = Field(ge=1, le=MAX_EXPERTS)
    top_k: int = Field(ge=1)
    width: int = Field(ge=1)
    shared_width: int = Field(default=0, ge=0)
    groups: int = Field(default=1, ge=1)
    chosen_groups: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> LayerShape:
        if self.top_k > self.num_experts:
            raise ValueError(f"layer {self.layer} has {self.num_experts} experts and uses {self.top_k} per token")
        if self.num_experts % self.groups or self.chosen_groups > self.groups:
            raise ValueError(
                f"layer {self.layer} cannot have {self.groups} groups of {self.num_experts} experts, of which a token"
                f" chooses {self.chosen_groups}"
            )
        return self

    @property
    def key(self) -> LayerKey:
        """(layer, step)."""
        return self.layer, self.step


class Source(Record):
    """The model a plan is for.

    Attributes:
        model: folder name or hub id.
        revision: hub revision, empty for a folder.
        fingerprint: SHA-256 over names, shapes, types and samples of its weights, as runs state it; empty = unknown.
        model_type: of its configuration.
        hidden_size: width of the residual stream.
        expert_size: width of what enters and leaves the experts; other than ``hidden_size`` in a few families.
        num_layers: decoder layers, dense ones included.
        gated: experts have a gate projection beside up and down.
        selection_bias: the router adds a bias that counts for choosing only, or a bias to its logits.
        layers: the MoE layers in order.
    """

    model: str
    revision: str = ""
    fingerprint: str = ""
    model_type: str
    hidden_size: int = Field(ge=1)
    expert_size: int = Field(ge=1)
    num_layers: int = Field(ge=1, le=MAX_LAYERS)
    gated: bool = True
    selection_bias: bool = False
    layers: Row[LayerShape] = Field(min_length=1, max_length=MAX_LAYERS)

    @model_validator(mode="after")
    def _ordered(self) -> Source:
        keys = [layer.key for layer in self.layers]
        if keys != sorted(set(keys)):
            raise ValueError("MoE layers must ascend, without repetition")
        if keys[-1][0] >= self.num_layers:
            raise ValueError(f"layer {keys[-1][0]} is not among the {self.num_layers} decoder layers")
        if sum(layer.num_experts for layer in self.layers) > MAX_TOTAL:
            raise ValueError(f"the model cannot have more than {MAX_TOTAL:,} experts")
        return self

    @cached_property
    def by_key(self) -> dict[LayerKey, LayerShape]:
        """The MoE layers by (layer, step)."""
        return {layer.key: layer for layer in self.layers}

    @property
    def unpadded(self) -> str:
        """Why experts that only fill up (form ``padded``) would change something; empty where they would not."""
        if self.model_type in _SHARED_SOFTMAX:
            return f"{self.model_type} chooses by a softmax over all experts, and fillers would have a part of it"
        if not self.selection_bias:
            return f"{self.model_type} chooses experts without a bias, so an expert that only fills up could be chosen"
        return ""
