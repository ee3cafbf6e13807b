"""What a plan knows of the model that it is for: enough to check it without the checkpoint."""

from __future__ import annotations

from pydantic import Field

from compressor.plan.steps import Record

LayerKey = tuple[int, int]
"""(layer, step)."""


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
    num_experts: int = Field(ge=1)
    top_k: int = Field(ge=1)
    width: int = Field(ge=1)
    shared_width: int = Field(default=0, ge=0)
    groups: int = Field(default=1, ge=1)
    chosen_groups: int = Field(default=1, ge=1)

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
    num_layers: int = Field(ge=1)
    gated: bool = True
    selection_bias: bool = False
    layers: tuple[LayerShape, ...] = Field(min_length=1)

    @property
    def by_key(self) -> dict[LayerKey, LayerShape]:
        """The MoE layers by (layer, step)."""
        return {layer.key: layer for layer in self.layers}
