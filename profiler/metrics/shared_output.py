"""Shared against routed experts: what each adds to the residual stream.

DeepSeekMoE (arXiv 2401.06066) keeps common knowledge in shared experts and looks at how much routed ones add beside
them. Sums of squared norms come from the tables ``expert_output`` (shared) and ``moe_output`` (routed).
"""

from __future__ import annotations

from numpy.typing import ArrayLike

from ._arrays import FloatArray, ratio
from .metric import Metric


def root_mean_square(*, square_sum: ArrayLike, tokens: ArrayLike) -> FloatArray:
    """Root of the mean squared L2 norm, of the shape of both; NaN without tokens."""
    mean: FloatArray = ratio(square_sum, tokens) ** 0.5
    return mean


def shared_ratio(*, shared_square_sum: ArrayLike, routed_square_sum: ArrayLike) -> FloatArray:
    """Norm of the shared experts' output over that of the routed ones' weighted sum, over the same tokens, 0..inf.

    shared_square_sum, routed_square_sum: sums of squared L2 norms, of one shape; NaN where the routed ones put out
    nothing.
    """
    result: FloatArray = ratio(shared_square_sum, routed_square_sum) ** 0.5
    return result


METRICS = (
    Metric(
        "shared_ratio",
        "Shared over routed output",
        "ratio",
        "0..inf",
        "the shared experts add more, the routed ones less",
        "arXiv 2401.06066",
        section="""
        How large the output of a layer's shared experts is beside the weighted sum of its routed ones, as both enter
        the residual stream. It says who speaks louder, not who is needed: that takes switching them off. Several shared
        experts that are modules of their own count as if their outputs were at right angles.
        - Formula: root of (sum over tokens of the squared L2 norm of gate x shared output / the same of the routed sum)
        """,
    ),
)
