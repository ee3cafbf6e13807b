"""The families whose experts are not called with (hidden, ids, weights), computed from their weights in float64.

Each function is given an MoE block and what entered it, and says what its router chose and what its experts put out.
The choice is made in the model's own type, as the model makes it; everything behind it in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tests.profiler.capture.by_hand import Expected


def llama4(block: Any, entered: Tensor) -> Expected:
    hidden = entered.reshape(-1, entered.shape[-1])
    top, ids = (hidden @ block.router.weight.T).topk(block.top_k)
    gates = top.sigmoid()
    inputs = hidden.double()[:, None] * gates.double()[..., None]
    gate, up = torch.einsum("tkh,tkhi->tki", inputs, block.experts.gate_up_proj.double()[ids]).chunk(2, -1)
    inner = functional.silu(gate) * up
    outputs = torch.einsum("tki,tkih->tkh", inner, block.experts.down_proj.double()[ids])
    return Expected(ids, gates, outputs, inner, inputs if block.top_k == 1 else None, weights_input=True)


def jetmoe(block: Any, entered: Tensor) -> Expected:
    hidden = entered.reshape(-1, entered.shape[-1])
    top, ids = (hidden @ block.router.layer.weight.T).topk(block.router.top_k)
    inputs = hidden.double()[:, None].expand(-1, ids.shape[1], -1)
    gate, up = torch.einsum("tkih,tkh->tki", block.input_linear.weight.double()[ids], inputs).chunk(2, -1)
    inner = functional.silu(gate) * up
    outputs = torch.einsum("tkhi,tki->tkh", block.output_linear.weight.double()[ids], inner)
    return Expected(ids, top.softmax(-1), outputs, inner, inputs)


def longcat(block: Any, entered: Tensor) -> Expected:
    hidden, experts = entered.reshape(-1, entered.shape[-1]), block.experts
    scores = (hidden @ block.router.classifier.weight.T).softmax(-1)
    ids = (scores + block.router.e_score_correction_bias).topk(block.router.top_k).indices
    gates = scores.gather(1, ids) * block.router.routed_scaling_factor
    inputs = hidden.double()[:, None].expand(-1, ids.shape[1], -1)
    copies = (ids >= len(experts.down_proj))[..., None]
    known = ids.clamp_max(len(experts.down_proj) - 1)
    gate, up = torch.einsum("tkih,tkh->tki", experts.gate_up_proj.double()[known], inputs).chunk(2, -1)
    inner = functional.silu(gate) * up
    outputs = torch.einsum("tkhi,tki->tkh", experts.down_proj.double()[known], inner)
    return Expected(ids, gates, torch.where(copies, inputs, outputs), torch.where(copies, 0.0, inner), inputs)


def switch(block: Any, entered: Tensor) -> Expected:
    """Each expert takes the first tokens of a sequence that choose it, until it is full."""
    scores = (entered @ block.router.classifier.weight.T).softmax(-1)
    gates, ids = scores.max(-1)
    for row in ids:
        taken = [0] * block.router.num_experts
        for place, expert in enumerate(row.tolist()):
            taken[expert] += 1
            if taken[expert] > block.router.expert_capacity:
                row[place] = -1
    ids = ids.reshape(-1, 1)
    experts = [block.experts[f"expert_{number}"] for number in range(block.router.num_experts)]
    first, second = (torch.stack([getattr(one, name).weight.double() for one in experts]) for name in ("wi", "wo"))
    inputs = entered.reshape(-1, 1, entered.shape[-1]).double()
    inner = functional.relu(torch.einsum("tkih,tkh->tki", first[ids], inputs))
    return Expected(ids, gates.reshape(-1, 1), torch.einsum("tkhi,tki->tkh", second[ids], inner), inner, inputs)


def doge(block: Any, entered: Tensor) -> Expected:
    """The best sums of two keys among all of them; the library first takes the best keys of each half."""
    hidden = entered.reshape(-1, entered.shape[-1])
    first, second = (entered @ block.router_gate.weight.T).view(2, len(hidden), -1)
    top, ids = (first[:, :, None] + second[:, None]).flatten(1).topk(block.top_k)
    inputs = hidden.double()[:, None].expand(-1, ids.shape[1], -1)
    inner = functional.silu((block.down_embed.weight.double()[ids] * inputs).sum(-1, keepdim=True))
    return Expected(ids, top.softmax(-1), inner * block.up_embed.weight.double()[ids], inner, inputs)


BY_HAND: dict[str, tuple[str, Callable[[Any, Tensor], Expected]]] = {
    "doge": ("DogeCDMoE", doge),
    "jetmoe": ("JetMoeMoE", jetmoe),
    "llama4_text": ("Llama4TextMoe", llama4),
    "longcat_flash": ("LongcatFlashMoE", longcat),
    "switch_transformers": ("SwitchTransformersSparseMLP", switch),
}
"""Family -> class of its MoE blocks, and what one of them does."""
