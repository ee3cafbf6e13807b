"""One call of a layer's experts as what recorders are given: the block as a whole, and the rows inside the experts."""

from __future__ import annotations

import torch
from torch import Tensor

from profiler.capture.batch import BlockBatch, ExpertRows, Tokens
from profiler.capture.discovery import MoELayer
from profiler.capture.frame import Frame
from profiler.capture.tap import ExpertsCall, TappedRows, run_packed, run_with_rows


def run_inside(call: ExpertsCall, layer: MoELayer) -> TappedRows:
    """Run the experts as the model would, and see what happens inside them."""
    if layer.layout is not None:
        return run_with_rows(call, layer.layout)
    assert layer.adapter.packed, "refused before the run began"
    return run_packed(call)


def fitting_logits(logits: Tensor | None, rows: int, layer: MoELayer) -> Tensor | None:
    """(rows, classes) the logits, if there is one row per token and at least one class per expert."""
    if logits is None or logits.shape[-1] < layer.num_experts:
        return None
    flat = logits.detach().reshape(-1, logits.shape[-1])
    if layer.adapter.granularity == "sequence" and rows % max(1, len(flat)) == 0:
        flat = flat.repeat_interleave(rows // max(1, len(flat)), 0)
    return flat if len(flat) == rows else None


def block_of(frame: Frame, tokens: Tokens, layer: MoELayer, call: ExpertsCall, rows: TappedRows) -> BlockBatch:
    """What the call was given and gave back, with "no expert" as -1 and weight 0."""
    ids, weights = call.ids.detach(), call.output_weights.detach().float()
    none = (ids < 0) | (ids >= layer.num_experts)
    if layer.traits.zero_weight_is_none:
        none |= weights == 0
    hidden, output = call.hidden.detach(), call.output.detach()
    return BlockBatch(
        key=layer.key,
        num_experts=layer.num_experts,
        tokens=tokens,
        hidden=hidden,
        ids=torch.where(none, -1, ids),
        weights=torch.where(none, 0, weights),
        output=output.reshape(-1, output.shape[-1]),
        residual=frame.residual_before(hidden),
        slots=rows.slots(ids.shape[-1]),
        outputs=rows.output,
    )


def real_rows(block: BlockBatch, layer: MoELayer, call: ExpertsCall, rows: TappedRows) -> ExpertRows:
    """The rows of a layer without those of padding, and without those that mean "no expert"."""
    tokens, expert, token, gate, real = block.tokens, rows.expert, rows.token, rows.gate.float(), None
    strange = bool(((expert[:1] < 0) | (expert[-1:] >= layer.num_experts)).any())  # they are sorted
    skips = layer.traits.zero_weight_is_none
    if tokens.keep is not None:
        place = torch.full((tokens.rows,), -1, device=token.device)
        place[tokens.keep.to(token.device)] = torch.arange(len(tokens), device=token.device)
        token = place[token]
    if tokens.keep is not None or skips or strange:
        wanted = (token >= 0) & (expert >= 0) & (expert < layer.num_experts)
        wanted = wanted & (gate != 0) if skips else wanted
        real = wanted.nonzero()[:, 0]
        expert, token, gate = expert[real], token[real], gate[real]
    return ExpertRows(
        layer.key,
        "routed",
        layer.num_experts,
        tokens,
        expert,
        token,
        gate,
        rows.activation,
        rows.output,
        real,
        block,
        _expert_inputs(call),
        rows.live,
        rows.live_order,
    )


def _expert_inputs(call: ExpertsCall) -> Tensor | None:
    """(tokens, width) what the experts of each token were given; None where it differs by expert."""
    if not call.adapter.weights_input:
        return call.hidden.detach()
    if call.weights.shape[1] > 1:
        return None
    return call.hidden.detach() * call.weights.detach()
