"""Switch experts off in a model: their second projection becomes zero, and the router goes on as before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from moescope.errors import InputError, ModelError
from profiler.ablation.experts import Expert
from profiler.capture.discovery import MoELayer


def routed_experts(layers: Sequence[MoELayer]) -> list[Expert]:
    """All routed experts that have weights."""
    return [
        Expert(layer.layer, layer.step, "routed", expert)
        for layer in layers
        for expert in range(layer.layout.num_weighted if layer.layout else 0)
    ]


@contextmanager
def switched_off(layers: Sequence[MoELayer], experts: Sequence[Expert]) -> Iterator[None]:
    """While entered, these experts put out zero. The router still selects them, and their weight goes to nobody else.

    Weights (and the bias, where there is one) of ``down_proj`` are set to zero in place, and put back afterwards, also
    after an error or an interrupt.

    Raises:
        InputError: the model has no such expert.
        ModelError: its weights are packed, or not in memory.
    """
    tensors = [tensor for expert in experts for tensor in _second_projection(layers, expert)]
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for tensor in tensors:
                kept.append((tensor, tensor.clone()))
                tensor.zero_()
        _require_zero(layers, experts)
        yield
    finally:
        try:
            _restore(kept)
        except KeyboardInterrupt:
            _restore(kept)
            raise


@torch.no_grad()
def _restore(kept: list[tuple[Tensor, Tensor]]) -> None:
    while kept:
        tensor, before = kept[-1]
        tensor.copy_(before)
        kept.pop()


def _require_zero(layers: Sequence[MoELayer], experts: Sequence[Expert]) -> None:
    """A family may hand out copies of its weights: then nothing was switched off, and no figure would say so."""
    for expert in experts:
        if any(bool(tensor.any()) for tensor in _second_projection(layers, expert)):
            raise ModelError(f"expert {expert} cannot be switched off: its weights are packed with those of others")


def _second_projection(layers: Sequence[MoELayer], expert: Expert) -> list[Tensor]:
    """The weight and, where there is one, the bias of an expert's second projection, as they stand in the model."""
    layer = _layer_of(layers, expert)
    if expert.kind == "shared":
        down = layer.shared.down if layer.shared is not None else None
        if down is None:
            raise InputError(f"layer {expert.layer} has no shared experts that can be switched off")
        found = [down.weight, down.bias] if getattr(down, "bias", None) is not None else [down.weight]
    else:
        layout = layer.layout
        if layout is None:
            raise ModelError(f"{layer.name} keeps its weights packed: load the model dequantized to switch experts off")
        if not 0 <= expert.expert < layout.num_weighted:
            raise InputError(
                f"layer {expert.layer} has no expert {expert.expert}: it has 0 to {layout.num_weighted - 1}"
            )
        bias = layout.bias(layer.experts, layout.down_name, expert.expert)
        found = [layout.down_weight(layer.experts, expert.expert), *([] if bias is None else [bias])]
    if any(tensor.is_meta or not tensor.is_floating_point() or tensor.element_size() < 2 for tensor in found):
        raise ModelError(f"expert {expert} cannot be switched off: its weights are quantized or not in memory")
    return found


def _layer_of(layers: Sequence[MoELayer], expert: Expert) -> MoELayer:
    for layer in layers:
        if layer.key == (expert.layer, expert.step):
            return layer
    known = ", ".join(str(layer.layer) if not layer.step else f"{layer.layer}.{layer.step}" for layer in layers)
    raise InputError(f"expert {expert}: the model has no MoE layer {expert.layer}; it has {known}")
