"""Method ``subspace``: the weighted mean, projected on the directions in which the members put out most.

Source: the truncated merge of Sub-MoE (arXiv 2506.23266). It whitens each member by its input, decomposes all of them
side by side (``U S V'``), keeps r directions, averages the right factors and undoes the whitening. As ``U S V_i'`` is
member i, that is the projection of the mean on the r leading eigenvectors of the members' summed output moments: no
inverse and no wide decomposition is needed. With all directions kept it is the weighted mean.

Where we differ: a run keeps one input moment for the whole layer, so gate and up use it for every member in place of
the moment of the member's own tokens. Biases, which the paper's models lack, are averaged and not projected.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.edits.average import average
from compressor.edits.moments import LayerMoments
from compressor.weights import ExpertWeights


def subspace(members: dict[int, ExpertWeights], parts: list[float], rank: int, moments: LayerMoments) -> ExpertWeights:
    """The members' mean with gate, up and down each of rank ``rank`` at most; stored as full matrices.

    Args:
        members: expert number -> weights.
        parts: of the mean, in the order of the members.
        rank: directions kept; as many as a matrix has rows, or more, leave that matrix as it is.
        moments: of the layer.
    """
    mean = average(zip(members.values(), parts, strict=True))
    exact = {expert: weights.exact() for expert, weights in members.items()}
    inputs = moments.input.to(mean.up)
    squares = moments.activation_square.to(mean.up)
    gates = [weights.gate for weights in exact.values() if weights.gate is not None]
    gate = None if mean.gate is None else _project(mean.gate, [matrix @ inputs @ matrix.T for matrix in gates], rank)
    down = [weights.down * squares[expert] @ weights.down.T for expert, weights in exact.items()]
    return ExpertWeights(
        up=_project(mean.up, [weights.up @ inputs @ weights.up.T for weights in exact.values()], rank),
        down=_project(mean.down, down, rank),
        gate=gate,
        up_bias=mean.up_bias,
        gate_bias=mean.gate_bias,
        down_bias=mean.down_bias,
    )


def _project(mean: Tensor, outputs: list[Tensor], rank: int) -> Tensor:
    """``mean`` (out, in) on the leading eigenvectors of the sum of output moments, each (out, out)."""
    if rank >= len(mean):
        return mean
    total = torch.stack(outputs).sum(0)
    vectors = torch.linalg.eigh((total + total.T) / 2).eigenvectors[:, -rank:]
    return vectors @ (vectors.T @ mean)
