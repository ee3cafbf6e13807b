"""Plans for tiny models, and what they should do to them, by ways that share nothing with the edits."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compressor.plan import (
    DropLayer,
    DropStep,
    Estimate,
    LayerShape,
    Plan,
    Provenance,
    Source,
    Step,
    Target,
)
from profiler.capture.discovery import MoELayer, inspect_model


def plan(source: Source, *steps: Step) -> Plan:
    """A checked plan with nothing in it but its steps."""
    return Plan(
        provenance=Provenance(run="run", tool_version="0"),
        source=source,
        target=Target(share=0.5, preset="none"),
        steps=steps,
        estimate=Estimate(
            expert_parameters=1,
            expert_parameters_after=1,
            active_parameters=1,
            active_parameters_after=1,
            bytes_saved=0,
        ),
    ).checked()


def source(model: nn.Module) -> Source:
    """What a plan has to know of a model, by the profiler's discovery."""
    found = inspect_model(model)
    shapes = [_shape(layer) for layer in found.layers]
    layout = found.layers[0].layout
    assert layout is not None
    config = found.config
    return Source(
        model="tiny",
        model_type=config.model_type,
        hidden_size=int(config.hidden_size if hasattr(config, "hidden_size") else config.d_model),
        expert_size=layout.hidden_size,
        num_layers=len(found.stack),
        gated=layout.gated,
        selection_bias=selection_bias(found.layers[0]) is not None,
        layers=tuple(shapes),
    )


def _shape(layer: MoELayer) -> LayerShape:
    groups = getattr(layer.router, "num_group", 1) or 1
    layout = layer.layout
    assert layout is not None
    return LayerShape(
        layer=layer.layer,
        step=layer.step,
        num_experts=layout.num_weighted,
        top_k=layer.top_k,
        width=layout.width,
        shared_width=shared_width(layer),
        groups=groups,
        chosen_groups=getattr(layer.router, "topk_group", 1) if groups > 1 else 1,
    )


def shared_width(layer: MoELayer) -> int:
    """Neurons of the shared experts; 0 without."""
    if layer.shared is None:
        return 0
    down: Any = layer.shared.down if layer.shared.down is not None else layer.shared.module.down_proj
    return int(down.weight.shape[1] if isinstance(down, nn.Linear) else down.shape[-1] * down.shape[0])


def dropping(model: nn.Module, gone: Mapping[int, Sequence[int]], **more: Any) -> Plan:
    """A plan that drops experts, by layer."""
    layers = tuple(DropLayer(layer=layer, experts=tuple(experts)) for layer, experts in gone.items())
    return plan(source(model), DropStep(method="test", layers=layers, **more))


def selection_bias(layer: MoELayer) -> Tensor | None:
    """The bias of a layer's router that counts for choosing, wherever it stands, or that of its logits."""
    owners = [layer.router, getattr(layer.router, "moe_statics", None), layer.block]
    names = ("e_score_correction_bias", "expert_bias", "balancing_biases", "bias")
    for owner in owners:
        for name in names:
            found = getattr(owner, name, None)
            if isinstance(found, Tensor) and found.shape[-1] >= layer.num_experts:
                return found
    return None


@contextmanager
def unreachable(model: nn.Module, gone: Mapping[int, Sequence[int]]) -> Iterator[nn.Module]:
    """While entered, a copy of the model whose router logits of these experts are -inf, and biases with them."""
    twin = copy.deepcopy(model)
    rows: dict[int, list[int]] = {}
    for layer in inspect_model(twin).layers:
        experts = list(gone.get(layer.layer, ()))
        assert layer.router is not None
        matrices = [tensor for tensor in layer.router.parameters() if tensor.ndim == 2]
        fitting = [tensor for tensor in matrices if len(tensor) >= layer.num_experts - 4]
        weight = min(fitting, key=lambda tensor: abs(len(tensor) - layer.num_experts))
        rows[weight.data_ptr()] = experts
        bias = selection_bias(layer)
        if bias is not None and experts:
            with torch.no_grad():
                bias[..., experts] = float("-inf")
    linear = nn.functional.linear

    def without(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        result = linear(inputs, weight, bias)
        experts = rows.get(weight.data_ptr())
        if experts:
            result = result.clone()
            result[..., experts] = float("-inf")
        return result

    nn.functional.linear = without
    try:
        yield twin
    finally:
        nn.functional.linear = linear
