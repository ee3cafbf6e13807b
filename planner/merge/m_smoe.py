"""M-SMoE's groups: dominant experts by frequency over all layers, the others join the one that is routed most alike.

Source: "Merge, then compress" (MC-SMoE, ICLR 2024) and its published code for Mixtral.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

import store
from moescope.errors import PlanError
from planner.importance.statistics import EXPERT, Statistics, layers_of

LAYER = ["layer", "step"]


def m_smoe(
    run: store.Run,
    *,
    groups: int,
    domain: str | None = None,
    phase: Literal["prompt", "decode"] | None = None,
) -> pl.DataFrame:
    """The groups of experts that M-SMoE would merge.

    Frequencies are shares of each layer's selections. The most used expert of every layer is dominant, and beside them
    those with the largest shares over all layers together, until there are ``groups`` per layer on average. Every other
    expert joins the dominant expert of its layer whose logits have the largest cosine with its own.

    The published code compares with the share that comes next and takes what is larger (``>``): where shares are equal
    it ends with fewer groups than asked for, or none. Here ties go to the lower layer, step and expert, and the number
    is met.

    Args:
        run: a run of level routing.
        groups: groups per layer on average, 1 to the number of experts.
        domain: from tokens of this domain only, where vectors were kept per domain.
        phase: from prompt or generated tokens only.

    Returns:
        Columns layer, step, expert, kind, group (the dominant expert's number), dominant, weight (the expert's part of
        its group's selections, by which the weights are averaged; equal parts where nobody used the group).

    Raises:
        PlanError: a number of groups that cannot be, or statistics that the run lacks.
    """
    statistics = Statistics(run, level="routing", domain=domain, phase=phase)
    load = statistics.experts("expert_load", "tokens").sort(EXPERT)
    count = len(load.select(LAYER).unique())
    fewest = min(len(part) for _, part in layers_of(load))
    if not 1 <= groups <= fewest:
        raise PlanError(f"groups {groups} is outside 1..{fewest}, the experts of the layers of run {run.name!r}")
    load = load.with_columns(dominant=_dominant(load, groups * count))
    similarity = {key: logit_similarity(gram) for key, gram in statistics.matrices("expert_pair", "logit_products")}
    parts = []
    for key, part in layers_of(load):
        cosine = similarity[key]
        experts, chosen = part["expert"].to_numpy(), part["dominant"].to_numpy()
        leaders = experts[chosen]
        nearest = leaders[cosine[np.ix_(experts, leaders)].argmax(1)]
        parts.append(part.with_columns(group=pl.Series(np.where(chosen, experts, nearest), dtype=pl.Int32)))
    grouped = pl.concat(parts)
    within = [*LAYER, "group"]
    total = pl.col("tokens").sum().over(within)
    weight = pl.when(total > 0).then(pl.col("tokens") / total).otherwise(1 / pl.len().over(within))
    return grouped.with_columns(weight=weight).select(*EXPERT, "group", "dominant", "weight")


def logit_similarity(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """(experts, experts) cosine between the experts' logits over all tokens, from K = sum over tokens of z z'.

    K_ij / sqrt(K_ii K_jj); 0 where an expert's logits are all 0. Pairs with themselves are 1.
    """
    norm = np.sqrt(np.diag(gram))
    scale = np.outer(norm, norm)
    cosine: NDArray[np.float64] = np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0)
    np.fill_diagonal(cosine, 1.0)
    return cosine


def _dominant(load: pl.DataFrame, total: int) -> pl.Series:
    """(rows,) bool, ``total`` of them true, at least one in every layer."""
    tokens = load["tokens"].to_numpy().astype(np.float64)
    _, layer = np.unique(load.select(LAYER).to_numpy(), axis=0, return_inverse=True)
    layer = layer.reshape(-1)
    share = tokens / np.maximum(np.bincount(layer, tokens), 1.0)[layer]
    for index in range(layer.max() + 1):
        rows = np.flatnonzero(layer == index)
        share[rows[share[rows].argmax()]] = np.inf
    chosen = np.zeros(len(share), dtype=bool)
    chosen[np.argsort(-share, kind="stable")[:total]] = True
    return pl.Series(chosen)
