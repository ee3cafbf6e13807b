"""Router rows: do they look like random vectors?

SMoE-Dropout (arXiv 2303.01610) routes by a frozen random router. Whether a trained router has rows that differ from
random ones shows in their cosines: independent random rows of d channels have cosines of mean 0 and standard deviation
1/sqrt(d), whatever their norms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from moescope.errors import MetricError

from ._arrays import FloatArray
from .metric import Metric
from .neighbours import cosines

NEAR_COPY = 0.95
"""A cosine from which two rows choose their experts for nearly the same tokens."""


@dataclass(frozen=True)
class RouterRows:
    """The rows of one router beside random ones.

    cosines: (pairs,) of every two rows, each pair once; pairs of unknown cosine are left out. mean: of the cosines, 0
    by chance. spread: their standard deviation around 0 over 1/sqrt(d), 1 by chance. norm_cv: standard deviation of the
    rows' norms over their mean. chance_norm_cv: of rows of independent normal entries, about 1/sqrt(2 d). largest: the
    largest cosine; chance_largest: the largest that so many random pairs reach in half of all cases. near_copies: pairs
    with a cosine of 0.95 or more.
    """

    cosines: FloatArray
    mean: float
    spread: float
    norm_cv: float
    chance_norm_cv: float
    largest: float
    chance_largest: float
    near_copies: int


def router_rows(*, rows: ArrayLike) -> RouterRows:
    """Cosines and norms of a router's rows (experts, d), beside what random rows give.

    Raises:
        MetricError: not two axes, fewer than two rows, or values that are not finite.
    """
    from scipy.special import betaincinv

    matrix = np.asarray(rows, dtype=np.float64)
    if matrix.ndim != 2 or len(matrix) < 2 or not np.isfinite(matrix).all():
        raise MetricError(f"rows of shape {matrix.shape}; it takes two or more finite ones, (experts, channels)")
    size = matrix.shape[1]
    found = cosines(first=matrix, second=matrix)[np.triu_indices(len(matrix), 1)]
    found = found[np.isfinite(found)]
    norms = np.linalg.norm(matrix, axis=1)
    nothing = not len(found)
    # (1 + cosine) / 2 of independent random rows follows Beta((d - 1) / 2, (d - 1) / 2).
    half = (size - 1) / 2.0
    chance = 1.0 if size < 2 or nothing else 2.0 * float(betaincinv(half, half, 0.5 ** (1.0 / len(found)))) - 1.0
    return RouterRows(
        cosines=found,
        mean=float("nan") if nothing else float(found.mean()),
        spread=float("nan") if nothing else float(np.sqrt((found**2).mean() * size)),
        norm_cv=float(norms.std() / norms.mean()) if norms.any() else float("nan"),
        chance_norm_cv=float(1.0 / np.sqrt(2.0 * size)),
        largest=float("nan") if nothing else float(found.max()),
        chance_largest=chance,
        near_copies=int((found >= NEAR_COPY).sum()),
    )


def chance_density(*, cosine: ArrayLike, size: int) -> FloatArray:
    """Density of the cosine of two random vectors of ``size`` channels at these cosines; 0 outside -1..1."""
    from scipy.stats import beta

    at = (1.0 + np.asarray(cosine, dtype=np.float64)) / 2.0
    half = max((size - 1) / 2.0, 0.5)
    return np.asarray(beta.pdf(at, half, half) / 2.0, dtype=np.float64)


METRICS = (
    Metric(
        "row_spread",
        "Spread of router rows",
        "ratio",
        "0..sqrt(d)",
        "the router's rows are less like random ones",
        "arXiv 2303.01610",
        section="""
        How far the rows of a router are from random vectors. 1 is what random rows give, as in a router that was never
        trained; more means rows that share directions or oppose each other, less means rows spread more evenly than
        chance.
        The frozen random router is the paper's; the figure is ours.
        - Formula: root of the mean squared cosine of every two rows, times sqrt(d)
        """,
    ),
    Metric(
        "row_norm_cv",
        "Spread of row norms",
        "ratio",
        "0..sqrt(E-1)",
        "some experts' logits vary more than others'",
        "standard",
        section="""
        How unequal the norms of a router's rows are. Rows of independent normal entries give about 1/sqrt(2 d).
        - Formula: standard deviation of the L2 norms of the rows (ddof = 0) over their mean
        """,
    ),
)
