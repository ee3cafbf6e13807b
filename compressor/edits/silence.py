"""An expert that puts out nothing: what is left of a dropped block, and what fills up a layer."""

from __future__ import annotations

import torch

from compressor.weights import ExpertWeights


def silenced(weights: ExpertWeights) -> ExpertWeights:
    """The same expert with a down projection (and down bias) of zeros; gate and up are not copied."""
    return ExpertWeights(
        up=weights.up,
        down=torch.zeros_like(weights.down),
        gate=weights.gate,
        up_bias=weights.up_bias,
        gate_bias=weights.gate_bias,
        down_bias=None if weights.down_bias is None else torch.zeros_like(weights.down_bias),
    )


def empty(like: ExpertWeights) -> ExpertWeights:
    """An expert of zeros of the same shape."""
    return like.map(torch.zeros_like)
