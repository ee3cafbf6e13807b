"""Imbalance that a balance loss does not see: load against the router's mean probability.

The check is Sigma-MoE-Tiny's (arXiv 2512.16248): the probabilities P of a layer's experts become even while the tokens
f that they get stay skewed, so that the loss E x sum of f x P is satisfied and the layer is not balanced.
"""

from __future__ import annotations

from numpy.typing import ArrayLike

from ._arrays import FloatArray, ratio
from .load import balance, share
from .metric import Metric


def probability_cv(*, probability_sums: ArrayLike) -> FloatArray:
    """Coefficient of variation of the mean router probability over the experts, (layers,); 0 = flat.

    probability_sums (layers, experts): router probability summed over all tokens; their number cancels out.

    Raises:
        MetricError: not two axes, no experts, or a value that is negative or not finite.
    """
    return balance(load=probability_sums).cv


def seen_imbalance(*, counts: ArrayLike, probability_sums: ArrayLike) -> FloatArray:
    """Part of the load's imbalance that the load-balance loss sees, (layers,): slope of P on f, both over their means.

    0 = probabilities say nothing of who gets the tokens; 1 = they are as uneven as the load; NaN for an even load, or
    without load.

    counts, probability_sums (layers, experts): selections, and router probability summed over all tokens.

    Raises:
        MetricError: as :func:`probability_cv`.
    """
    used, probability = share(load=counts), share(load=probability_sums)
    experts = used.shape[1]
    beyond = experts * (used * probability).sum(axis=1) - 1.0
    return ratio(beyond, experts * (used**2).sum(axis=1) - 1.0)


METRICS = (
    Metric(
        "probability_cv",
        "Spread of router probability",
        "ratio",
        "0..sqrt(E-1)",
        "the router's mean probabilities are less even",
        "standard",
        section="""
        How uneven the experts' mean router probabilities are: the other half of the load-balance loss, beside the
        load's own coefficient of variation.
        - Formula: standard deviation of P over the experts (ddof = 0) over its mean; P = mean of p over all tokens
        """,
    ),
    Metric(
        "seen_imbalance",
        "Imbalance that the loss sees",
        "ratio",
        "-inf..inf",
        "the balance loss has more of the imbalance to work on",
        "arXiv 2512.16248",
        section="""
        A load-balance loss is lowered through the probabilities P. Where P is flat and the token fractions f are skewed
        the loss is satisfied, whatever the load: this says how much of the imbalance P shares. The check, both beside
        each other, is the paper's; the figure is ours. An even load has none. For k > 1, f is divided by k.
        - Formula: (E x sum of f x P - 1) / (E x sum of f x f - 1), f and P as shares of their layer: the slope of P
          on f
        """,
    ),
)
