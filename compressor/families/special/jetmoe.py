"""JetMoE: the block holds its router and adds a bias; its attention heads are chosen by a router of their own.

The experts of its feed-forward blocks are recorded, those of its attention (``JetMoeMoA``) are not: they are pairs of
query and output projections with the whole attention between them, no experts of a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compressor.families.calls import Call, Selection, flat, routed
from compressor.families.layout import stacked_layout

if TYPE_CHECKING:
    import torch

jetmoe_layout = stacked_layout("input_linear.weight", "output_linear.weight", activation="activation")
"""The layout of ``JetMoeMoE``."""


def read_jetmoe(call: Call) -> Selection:
    """The router returns its selections sorted by expert: their places token by token, gates, and experts' counts."""
    import torch

    said = routed(call)
    order, _, gates, counts, _ = said.output
    hidden = flat(said.hidden)
    expert = torch.arange(len(counts), device=order.device)
    expert = expert.repeat_interleave(torch.tensor(counts, device=order.device))
    ids, weights = torch.empty_like(expert), torch.empty_like(gates)
    ids[order], weights[order] = expert, gates
    return Selection(hidden, ids.view(len(hidden), -1), weights.view(len(hidden), -1))


def jetmoe_output(call: Call) -> torch.Tensor:
    """(tokens, hidden) the experts' weighted sum: what the block returned, less its bias."""
    result: torch.Tensor = call.result
    return flat(result) - call.module.bias
