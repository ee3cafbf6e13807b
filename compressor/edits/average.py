"""Method ``average``: the weighted mean of experts, neuron by neuron as they are numbered.

Source: the merge of M-SMoE (arXiv 2310.01334) and of HC-SMoE (arXiv 2410.08589), with frequencies as weights. Sub-MoE's
merge without truncation is the same: ``U S`` times the mean of the right factors is the mean of the matrices.

What a merge does to routing, even of exact copies: the router keeps one row for the group. Two copies that could both
be selected took two of a token's k places and the weight of both; their merged expert takes one place and, of a softmax
over all experts, the part p / (1 - p) in place of 2 p. So the output stays the same only where a copy was never
selected (and had no part in a softmax), or where a token has one expert and its weight is 1 whatever the score (k = 1,
normalised). Everywhere else merging copies changes the output, and that has to be measured.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from compressor.weights import ExpertWeights


def average(members: Iterable[tuple[ExpertWeights, float]]) -> ExpertWeights:
    """Weighted mean of every matrix and bias.

    Args:
        members: (weights, part), read one by one, so that they need not be in memory together; the parts are divided by
            their sum.

    Returns:
        In the type that arithmetic is done in; see :func:`compressor.weights.working_type`.

    Raises:
        ValueError: no member, or parts that sum to 0.
    """
    sums: dict[str, Tensor] = {}
    total = 0.0
    for weights, part in members:
        total += part
        for name, tensor in weights.exact().parts():
            # Not added in place: an expert that is kept in float64 already is not copied by exact().
            sums[name] = tensor * part if name not in sums else sums[name].add_(tensor, alpha=part)
    if not total > 0:
        raise ValueError(f"the parts of {len(sums) and 'the members'} sum to {total}: one has to count")
    return ExpertWeights(**{name: tensor.div_(total) for name, tensor in sums.items()})
