"""Experts that compute nothing: zero, copying and constant ones among those that can be selected.

MoE++ (arXiv 2410.07348) adds all three; null experts are AdaMoE's (arXiv 2406.13233). How many experts with a
feed-forward network a token then uses varies: few for fragments of words and punctuation, more for verbs, as MoE++
found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moescope.errors import MetricError

from ._arrays import FloatArray, IntArray, ratio
from .metric import Metric

KINDS = ("routed", "zero", "copy", "constant")
"""What an expert that can be selected is; "routed" ones have a network."""


def kind_index(*, kinds: Sequence[str]) -> IntArray:
    """(experts,) place of each expert's kind in :data:`KINDS`.

    Raises:
        MetricError: a kind that is none of them.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise MetricError(f"kind {unknown[0]!r} is none of {', '.join(KINDS)}")
    return np.array([KINDS.index(kind) for kind in kinds], dtype=np.int64)


def kind_counts(*, ids: NDArray[Any], kinds: IntArray, group: IntArray, num_groups: int) -> IntArray:
    """Selections by group of tokens and kind, (groups, kinds); they add up over layers and runs.

    ids (tokens, k), -1 = none; kinds (experts,): :func:`kind_index`; group (tokens,), -1 = left out.
    """
    counted = (ids >= 0) & (group >= 0)[:, None]
    bins = (group[:, None] * len(KINDS) + kinds[np.where(ids >= 0, ids, 0)])[counted]
    return np.bincount(bins, minlength=num_groups * len(KINDS)).reshape(num_groups, len(KINDS)).astype(np.int64)


def kind_share(*, counts: ArrayLike) -> FloatArray:
    """Share of the selections that fall on each kind, 0..1, last axis the kinds; NaN without selections."""
    values = np.asarray(counts, dtype=np.float64)
    return ratio(values, values.sum(axis=-1, keepdims=True))


def computed_experts(*, counts: ArrayLike, tokens: ArrayLike) -> FloatArray:
    """Experts with a network per token and layer, 0..k: counts (..., kinds), tokens (...) x layers; NaN without."""
    return ratio(np.asarray(counts, dtype=np.float64)[..., KINDS.index("routed")], tokens)


METRICS = (
    Metric(
        "kind_share",
        "Share of a kind",
        "share",
        "0..1",
        "more selections fall on experts of the kind",
        "arXiv 2410.07348",
        section="""
        How many of the selections fall on experts with a network and on those without: zero (puts out nothing), copy
        (its input), constant (a learned vector). By chance a kind has its share of the experts.
        - Formula: selections of the kind / selections
        """,
    ),
    Metric(
        "computed_experts",
        "Computed experts",
        "experts",
        "0..k",
        "a token costs more",
        "arXiv 2410.07348",
        section="""
        How many experts with a network a token uses in a layer, on average: what its experts cost.
        - Formula: selections of experts with a network / tokens x layers
        """,
    ),
)
