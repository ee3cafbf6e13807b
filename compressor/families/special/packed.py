"""Experts whose weights stay packed: kernels of their own read them, and no plain tensor of an expert exists.

FP8 ones are called as any other; GGUF ones too, outside the library's interface. GPT-OSS's MXFP4 ones are called past
their ``forward``, with the selection sorted by expert, as their kernel wants it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compressor.families.calls import Call, Selection, flat, read_call

if TYPE_CHECKING:
    from torch import Tensor


def no_layout(module: Any) -> None:
    """Nothing can be said of single weights."""


def packed_width(module: Any) -> int:
    """Neurons per expert of packed experts; 0 where the module does not say."""
    for name in ("intermediate_dim", "intermediate_size"):
        if isinstance(value := getattr(module, name, None), int):
            return value
    return 0


def read_mxfp4(call: Call) -> Selection:
    """The selection of ``forward_routed(hidden, routing, gather, scatter)``; or that of ``forward``, which is plain.

    ``routing`` and ``gather`` are triton_kernels' ``RoutingData`` and ``GatherIndx``: one row per (token, expert),
    sorted by expert. ``expt_hist`` says how many each expert has, ``gate_scal`` their gate weights, ``src_indx`` at
    which place of (tokens, k) they stood.
    """
    hidden, routing, gather = (*call.args, *call.kwargs.values())[:3]
    if not hasattr(routing, "expt_hist"):
        return read_call(call)
    import torch

    counts, place = routing.expt_hist.long(), gather.src_indx.long()
    expert = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    real = place[: len(expert)]  # rows of other processes follow, with place -1
    ids = torch.full_like(place, -1).index_copy_(0, real, expert)
    weights = torch.zeros_like(routing.gate_scal).index_copy_(0, real, routing.gate_scal[: len(expert)])
    return Selection(flat(hidden), _slots(ids, routing), _slots(weights, routing))


def _slots(values: Tensor, routing: Any) -> Tensor:
    """(tokens, k)"""
    return values.view(-1, int(routing.n_expts_act))
