"""Method ``aligned``: neurons are matched to those of the lead before the mean is taken.

Source: M-SMoE (arXiv 2310.01334), whose expert permutation alignment is described for two matrices; here for gate, up
and down. The order of an expert's neurons means nothing, so two experts that do the same may differ in it. Exact by
linear assignment: memory grows with the square of the width, time up to its cube.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from compressor.edits.average import average
from compressor.weights import ExpertWeights


def aligned(lead: ExpertWeights, members: Iterable[tuple[ExpertWeights, float]]) -> ExpertWeights:
    """Weighted mean of the members, each with its neurons in the order of the lead's; see :func:`average`.

    Args:
        lead: whose order counts.
        members: (weights, part), the lead among them.
    """
    reference = lead.exact()

    def matched() -> Iterator[tuple[ExpertWeights, float]]:
        for weights, part in members:
            exact = weights.exact()
            yield (exact if weights is lead else exact.neurons(matching(reference, exact))), part

    return average(matched())


def matching(reference: ExpertWeights, other: ExpertWeights) -> Tensor:
    """(I,) which neuron of ``other`` stands for each neuron of ``reference``.

    It minimises the sum of squared distances over gate rows, up rows, down columns and biases; as norms are what they
    are, that is the assignment with the largest sum of inner products.
    """
    products = _with_bias(reference.up, reference.up_bias) @ _with_bias(other.up, other.up_bias).T
    products += reference.down.T @ other.down
    if reference.gate is not None and other.gate is not None:
        products += _with_bias(reference.gate, reference.gate_bias) @ _with_bias(other.gate, other.gate_bias).T
    _, columns = linear_sum_assignment(products.cpu().numpy(), maximize=True)
    return torch.from_numpy(columns).to(other.up.device)


def _with_bias(matrix: Tensor, bias: Tensor | None) -> Tensor:
    return matrix if bias is None else torch.cat([matrix, bias[:, None]], dim=1)
