"""What enters matrices on grids of few values, token by token: what a width of activations costs.

Each token has one scale: its largest magnitude is the largest value of the grid, which is symmetric and has no zero
point. Weights stay as they are; the products are those of the values on the grid, in the type of the model. So this
measures a plan in memory, and is no kernel: nothing becomes faster, and experts run twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.families import Adapter, ExpertsLayout


def on_grid(values: Tensor, bits: int) -> Tensor:
    """(..., C) each row on a symmetric grid of 2^bits - 1 values, scaled by its largest magnitude."""
    most = 2 ** (bits - 1) - 1
    scale = values.abs().amax(-1, keepdim=True).float() / most
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return ((values.float() / scale).round() * scale).to(values.dtype)


def narrowed(experts: Any, layout: ExpertsLayout, expert: int, inputs: Tensor, bits: int) -> Tensor:
    """(rows, hidden) what one expert puts out when its input and what enters its second projection are on grids."""
    if expert >= layout.num_weighted:  # without weights: nothing is multiplied, so nothing is narrowed
        return layout.run_expert(experts, expert, inputs)[1]
    first = _linear(
        on_grid(inputs, bits), layout.up_weight(experts, expert), layout.bias(experts, layout.up_name, expert)
    )
    activation = on_grid(layout.activate(experts, first), bits)
    output = _linear(activation, layout.down_weight(experts, expert), layout.bias(experts, layout.down_name, expert))
    return experts.post_expert_norm(output) if layout.post_norm else output


@dataclass(frozen=True)
class NarrowExperts:
    """A forward hook of an experts module that is called with (hidden, ids, weights): its output with narrow inputs.

    Attributes:
        adapter: how the module keeps its weights.
        bits: width of what enters the experts and their second projections.
    """

    adapter: Adapter
    bits: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """The weighted sum of what the selected experts put out, in the shape of the module's own output."""
        hidden, ids, weights = (*args, *kwargs.values())[:3]
        layout = self.adapter.layout(module)
        assert layout is not None
        rows = hidden.reshape(-1, hidden.shape[-1])
        ids, weights = ids.reshape(len(rows), -1), weights.reshape(len(rows), -1)
        total = rows.new_zeros(len(rows), output.shape[-1], dtype=torch.promote_types(rows.dtype, torch.float32))
        for expert in torch.unique(ids).tolist():
            if 0 <= expert < layout.num_experts:
                token, place = torch.where(ids == expert)
                found = narrowed(module, layout, expert, rows[token], self.bits)
                total.index_add_(0, token, (found * weights[token, place, None]).to(total.dtype))
        return total.to(output.dtype).reshape(output.shape)


@dataclass(frozen=True)
class NarrowInput:
    """A forward pre-hook of a projection: its input on a grid.

    Attributes:
        bits: width.
    """

    bits: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of the call."""
        return on_grid(args[0], self.bits), *args[1:]


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(inputs, weight.to(inputs.dtype), None if bias is None else bias.to(inputs.dtype))
