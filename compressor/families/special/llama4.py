"""Llama 4: the gate weight g multiplies the expert's input, so that an expert puts out f(g x) and is added as it is.

Every expert runs on every token, on zeros where it was not selected; only selected ones are recorded. The gate weight
in the trace and in the load is g, the sigmoid score. What is said of outputs and activations is of f(g x): what f(x)
would be cannot be known from it, f being no linear function. There the weight of the sum is 1, so that gated and plain
sums are equal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compressor.families.calls import Call, Selection, flat, routed
from compressor.families.layout import stacked_layout

if TYPE_CHECKING:
    import torch

llama4_layout = stacked_layout("gate_up_proj", transposed=True)
"""The layout of ``Llama4TextExperts``."""


def read_llama4(call: Call) -> Selection:
    """The router returns scores and logits (tokens, E); the ids are the top-k that it takes of the same logits."""
    said = routed(call)
    scores, logits = said.output
    ids = logits.topk(said.router.top_k, dim=1).indices
    return Selection(flat(said.hidden), ids, scores.gather(1, ids))


def llama4_output(call: Call) -> torch.Tensor:
    """(tokens, hidden) the sum over all experts of what they put out; without selection that is 0."""
    rows: torch.Tensor = call.result
    return rows.view(call.module.num_experts, -1, rows.shape[-1]).sum(0)
