"""Doge: an expert is one neuron, a row of two embeddings, found by product keys; a dense MLP runs beside it.

The keys of a token are the ``num_keys`` largest of each of two halves of the router's logits, and an expert's score is
the sum of its two keys. As the library splits the logits, both halves of a key belong to other tokens in a batch of
several tokens (it says so); what is recorded is what ran. The scores of experts that were not chosen are not recorded:
the router has no logit per expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compressor.families.calls import Call, Selection, flat
from compressor.families.layout import ExpertsLayout

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DogeLayout(ExpertsLayout):
    """Experts of width 1: ``up_embed[e] * act(down_embed[e] . x)``; the names go from wide to narrow and back."""

    def up_weight(self, experts: Any, expert: int) -> torch.Tensor:
        """(1, hidden) the row that reads the input."""
        weight: torch.Tensor = experts.down_embed.weight
        return weight[expert : expert + 1]

    def down_weight(self, experts: Any, expert: int) -> torch.Tensor:
        """(hidden, 1) the row that is written."""
        weight: torch.Tensor = experts.up_embed.weight
        return weight[expert][:, None]


def doge_layout(module: Any) -> DogeLayout:
    """The layout of ``DogeCDMoE``."""
    return DogeLayout(
        num_experts=int(module.num_experts),
        hidden_size=int(module.hidden_size),
        width=1,
        gated=False,
        transposed=False,
        interleaved=False,
        biased=False,
        post_norm=False,
        up_name="down_embed",
        down_name="up_embed",
    )


def read_doge(call: Call) -> Selection:
    """The selection, taken again from the returned logits (2, tokens, keys) in the way that the module takes it."""
    module = call.module
    hidden = flat((*call.args, *call.kwargs.values())[0])
    (scores_x, scores_y), (keys_x, keys_y) = call.result[1].detach().topk(module.num_keys, dim=-1)
    scores = (scores_x[:, :, None] + scores_y[:, None, :]).flatten(1)
    ids = (keys_x[:, :, None] * module.num_keys + keys_y[:, None, :]).flatten(1)
    best, places = scores.topk(module.top_k, dim=-1)
    weights = best.softmax(-1)
    if module.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return Selection(hidden, ids.gather(-1, places), weights)


def doge_output(call: Call) -> torch.Tensor:
    """(tokens, hidden) the experts' weighted sum, computed again as the module computes it.

    The module returns it together with its dense MLP. If both do not give exactly that, the sum is what is left without
    the MLP, so that the run's checks see what is wrong.
    """
    import torch
    from torch.nn import functional

    module, selection = call.module, call.selection
    hidden, ids, weights = selection.hidden, selection.ids, selection.weights
    inner = module.act_fn((module.down_embed.weight[ids] @ hidden[:, :, None])[:, :, 0]) * weights
    total: torch.Tensor = (inner[:, None] @ module.up_embed.weight[ids])[:, 0]
    gate, up = (functional.linear(hidden, part.weight, part.bias) for part in (module.gate_proj, module.up_proj))
    dense = functional.linear(module.act_fn(gate) * up, module.down_proj.weight, module.down_proj.bias)
    result = flat(call.result[0])
    return total if torch.equal(dense + total, result) else result - dense
