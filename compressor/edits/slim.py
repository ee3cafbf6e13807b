"""Slimming: an expert keeps some of its neurons. Padding to a stored width, and zeroing, are exact."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from compressor.weights import ExpertWeights


def slim(weights: ExpertWeights, kept: Tensor) -> ExpertWeights:
    """The neurons of a mask (I,) bool, in their order."""
    return weights.neurons(kept.to(weights.up.device).nonzero()[:, 0])


def widen(weights: ExpertWeights, width: int) -> ExpertWeights:
    """The same expert with neurons of zeros behind its own, up to ``width``.

    What such a neuron puts out is multiplied by a column of zeros, so the output is the same.

    Raises:
        ValueError: the expert is wider.
    """
    missing = width - weights.width
    if missing < 0:
        raise ValueError(f"an expert of {weights.width} neurons does not fit into {width}")
    if not missing:
        return weights
    return ExpertWeights(
        up=pad(weights.up, (0, 0, 0, missing)),
        down=pad(weights.down, (0, missing)),
        gate=None if weights.gate is None else pad(weights.gate, (0, 0, 0, missing)),
        up_bias=None if weights.up_bias is None else pad(weights.up_bias, (0, missing)),
        gate_bias=None if weights.gate_bias is None else pad(weights.gate_bias, (0, missing)),
        down_bias=weights.down_bias,
    )


def mask(weights: ExpertWeights, kept: Tensor) -> ExpertWeights:
    """The same width, with zeros in place of the neurons that a mask (I,) bool leaves out."""
    kept = kept.to(weights.up.device)
    rows, columns = kept[:, None], kept[None, :]
    zero = weights.up.new_zeros(())
    return ExpertWeights(
        up=torch.where(rows, weights.up, zero),
        down=torch.where(columns, weights.down, zero),
        gate=None if weights.gate is None else torch.where(rows, weights.gate, zero),
        up_bias=None if weights.up_bias is None else torch.where(kept, weights.up_bias, zero),
        gate_bias=None if weights.gate_bias is None else torch.where(kept, weights.gate_bias, zero),
        down_bias=weights.down_bias,
    )
