"""How alike the experts of a layer are: by router rows, logits, weights, and what they put out.

Every function gives a symmetric matrix over the experts of one layer. Cosines and correlations lie in -1..1, CKA in
0..1 (its debiased form may fall below 0). NaN stands where a kind says nothing: an expert that was never used, or that
puts out nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, lgamma, pi, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import MetricError

from ._arrays import FloatArray, IntArray

THRESHOLDS = (0.5, 0.7, 0.9)
"""Similarities above which pairs of experts are counted."""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Quantiles over pairs that describe a layer."""

LEAST_TOKENS = 4
"""The unbiased HSIC divides by n (n - 3)."""


def cosine_matrix(*, rows: NDArray[Any]) -> FloatArray:
    """(experts, experts) cosine of vectors, -1..1; rows (experts, width). NaN for a row of zeros.

    Look-into-MoEs compares router rows, flattened weights and means of neurons in this way.
    """
    values = np.asarray(rows, dtype=np.float64)
    if values.ndim != 2:
        raise MetricError(f"rows have shape {values.shape}: (experts, width) is wanted")
    # Scaled first, so that the squares of tiny or huge rows are still numbers.
    largest = np.abs(values).max(axis=1, keepdims=True, initial=0.0)
    values = np.divide(values, largest, out=np.zeros_like(values), where=largest > 0)
    return normalised_gram(gram=values @ values.T)


def normalised_gram(*, gram: NDArray[Any]) -> FloatArray:
    """(experts, experts) G_ij / sqrt(G_ii G_jj), the cosine behind a matrix of scalar products; NaN where G_ii is 0.

    The same ratio is CKA where G holds sums of HSIC, the cosine of logit columns (M-SMoE) where it holds products of
    logits, and the cosine of all tokens' outputs one behind the other where it holds products of outputs. Of
    ``expert_pair.output_products`` it is the cosine of *weighted* outputs with zeros where an expert was not used: two
    experts that are never used together are 0 apart however alike they answer, so it is bounded by how often both meet,
    unlike the cosine over all tokens, where every expert runs on every token.

    Raises:
        MetricError: the matrix is not square.
    """
    values = _square(gram)
    diagonal = np.diag(values)
    scale = np.sqrt(np.where(diagonal > 0, diagonal, np.nan))
    result: FloatArray = values / scale[:, None] / scale[None]
    return np.clip(result, -1.0, 1.0)


def logit_correlation(*, products: NDArray[Any], sums: NDArray[Any], tokens: int) -> FloatArray:
    """(experts, experts) correlation of the experts' router logits over tokens, -1..1.

    products (experts, experts): sum over tokens of z_i z_j. sums (experts,): sum of z_i. The cosine of M-SMoE is not
    centred: a logit that all experts share makes all of them alike.

    Raises:
        MetricError: shapes that do not fit, or no token.
    """
    values, means = _square(products), np.asarray(sums, dtype=np.float64)
    if means.shape != values.shape[:1] or tokens < 1:
        raise MetricError(f"logit sums of shape {means.shape} over {tokens} tokens do not fit {values.shape}")
    centred = values - np.outer(means, means) / tokens
    # What rounding leaves of a logit that never changes is no variance.
    np.fill_diagonal(centred, np.where(np.diag(centred) > 1e-9 * np.diag(values), np.diag(centred), 0.0))
    return normalised_gram(gram=centred)


def angular(similarity: NDArray[Any]) -> FloatArray:
    """1 - arccos(s) / pi of cosines, 0..1: opposite 0, orthogonal 0.5, equal 1 (Look-into-MoEs)."""
    result: FloatArray = 1.0 - np.arccos(np.clip(np.asarray(similarity, np.float64), -1.0, 1.0)) / pi
    return result


def shifted(similarity: NDArray[Any]) -> FloatArray:
    """(s + 1) / 2 of cosines, 0..1: opposite 0, orthogonal 0.5, equal 1 (SERE, HC-SMoE)."""
    result: FloatArray = (np.asarray(similarity, np.float64) + 1.0) / 2.0
    return result


def linear_hsic(*, outputs: NDArray[Any]) -> tuple[FloatArray, FloatArray]:
    """HSIC with a linear kernel between what experts put out for the same tokens: biased, and unbiased.

    Biased: tr(K H L H) / (n - 1)^2 (Gretton et al. 2005). Unbiased: HSIC_1 of Song et al. 2012, equation 5. Neither
    changes when a constant is added to all outputs of an expert, so both are computed from centred ones; then

        n (n - 3) HSIC_1 = <K, L> - n / (n - 2) sum_i K_ii L_ii + tr K tr L / ((n - 1) (n - 2)).

    outputs: (experts, tokens, width). Returns two (experts, experts) matrices.

    Raises:
        MetricError: fewer than 4 tokens, or another shape.
    """
    values = np.asarray(outputs, dtype=np.float64)
    if values.ndim != 3 or values.shape[1] < LEAST_TOKENS:
        raise MetricError(f"outputs have shape {values.shape}: (experts, {LEAST_TOKENS} or more tokens, width) wanted")
    n = values.shape[1]
    centred = values - values.mean(axis=1, keepdims=True)
    grams = centred @ centred.transpose(0, 2, 1)
    flat, diagonal = grams.reshape(len(values), -1), np.diagonal(grams, axis1=1, axis2=2)
    products, trace = flat @ flat.T, diagonal.sum(1)
    inner = products - n / (n - 2) * diagonal @ diagonal.T + np.outer(trace, trace) / ((n - 1) * (n - 2))
    return products / (n - 1) ** 2, inner / (n * (n - 3))


def random_absolute_cosine(width: float) -> float:
    """Mean |cosine| of two random directions in so many dimensions: about sqrt(2 / (pi width)).

    Raises:
        MetricError: a width below 1.
    """
    if width < 1:
        raise MetricError(f"width is {width}: vectors have at least one entry")
    return exp(lgamma(width / 2) - lgamma((width + 1) / 2)) / sqrt(pi) if width < 1e8 else sqrt(2 / (pi * width))


@dataclass(frozen=True)
class Redundancy:
    """How alike the experts of one layer are, over the pairs that a kind says something about.

    mean, largest: over pairs; first, second: the pair that is most alike, -1 without any. quantiles: at
    :data:`QUANTILES`. above: pairs whose similarity is larger than each of the thresholds.
    """

    pairs: int
    mean: float
    largest: float
    first: int
    second: int
    quantiles: FloatArray
    above: IntArray


def redundancy(*, similarity: NDArray[Any], thresholds: Sequence[float] = THRESHOLDS) -> Redundancy:
    """Summary of one (experts, experts) matrix; the diagonal and NaN do not count.

    Raises:
        MetricError: the matrix is not square.
    """
    values = _square(similarity)
    first, second = np.tril_indices(len(values), -1)
    known = np.isfinite(values[first, second])
    first, second = first[known], second[known]
    pairs = values[first, second]
    if not len(pairs):
        empty = np.full(len(QUANTILES), np.nan)
        return Redundancy(0, np.nan, np.nan, -1, -1, empty, np.zeros(len(thresholds), np.int64))
    top = int(pairs.argmax())
    return Redundancy(
        pairs=len(pairs),
        mean=float(pairs.mean()),
        largest=float(pairs[top]),
        first=int(second[top]),
        second=int(first[top]),
        quantiles=np.quantile(pairs, QUANTILES),
        above=np.array([(pairs > threshold).sum() for threshold in thresholds], np.int64),
    )


def _square(matrix: NDArray[Any]) -> FloatArray:
    values = np.asarray(matrix, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] != values.shape[1]:
        raise MetricError(f"a matrix of shape {values.shape} is not one of experts by experts")
    return values
