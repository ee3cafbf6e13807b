"""M-SMoE's groups: dominant experts by frequency over all layers, the others join the one that is routed most alike.

Source: "Merge, then compress" (MC-SMoE, ICLR 2024) and its published code for Mixtral.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

import store
from compressor.plan import LayerKey, LayerShape
from moescope.errors import PlanError
from planner.allocation import least_kept, lowest, removed
from planner.domains import Mix, Scores, expert_scores
from planner.importance.statistics import EXPERT, Statistics, layers_of
from planner.merge.groups import merge_step, pair_matrices
from planner.task import Draft, Task

LAYER = ["layer", "step"]


def draft(task: Task, *, mix: Mix = "union") -> Draft:
    """Every group becomes the average of its members, neurons matched to the dominant expert's first.

    In form ``uniform`` the most used experts of each layer (and router group) are dominant, the same number everywhere.
    In the other forms they are chosen over all layers together, as published, at least as many as a token uses in each.
    Form ``shared`` is the published one: all rows of the router stay, and one expert of each layer is enough.

    Args:
        task: what to plan.
        mix: how the frequencies of domains come together.

    Raises:
        PlanError: statistics that the run lacks, or a share that cannot be met.
    """
    tokens, _ = expert_scores(task, "frequency", mix, {})
    grams, notes = pair_matrices(task, "expert_pair", "logit_products", level="routing")
    leaders = _leaders(task, tokens)
    groups = {shape.key: _joined(task, shape, grams[shape.key], leaders[shape.key]) for shape in task.layers}
    step = merge_step(task, "m_smoe", "aligned", groups, tokens)
    return Draft(
        steps=(step,), score="frequency", unit="selections, or share of the layer summed over domains", values=tokens,
        notes=notes,
    )  # fmt: skip


def _leaders(task: Task, tokens: Scores) -> dict[LayerKey, list[int]]:
    number = {shape.key: shape.num_experts - removed(task, shape) for shape in task.layers}
    if task.form == "uniform":
        return {
            shape.key: sorted(
                set(range(shape.num_experts))
                - set(lowest(tokens[shape.key], shape, shape.num_experts - number[shape.key], _alone(task, shape)))
            )
            for shape in task.layers
        }
    if any(shape.groups > 1 for shape in task.layers):
        raise PlanError(
            f"{task.source.model_type} routes within groups of experts, which must stay alike: use form uniform"
        )
    layer = np.repeat(np.arange(len(task.layers)), [shape.num_experts for shape in task.layers])
    forced = np.concatenate([np.isin(np.arange(shape.num_experts), list(_alone(task, shape))) for shape in task.layers])
    values = np.concatenate([tokens[shape.key] for shape in task.layers])
    least = max(least_kept(shape) for shape in task.layers)
    chosen = dominant(values, layer, sum(number.values()), least=least, forced=forced)
    return {shape.key: np.flatnonzero(chosen[layer == index]).tolist() for index, shape in enumerate(task.layers)}


def _joined(task: Task, shape: LayerShape, gram: NDArray[np.float64], leaders: list[int]) -> list[list[int]]:
    """The group of each leader; protected experts stay alone."""
    cosine = logit_similarity(gram)
    alone, groups = _alone(task, shape), {leader: [leader] for leader in leaders}
    size = shape.num_experts // shape.groups
    for expert in range(shape.num_experts):
        if expert not in groups:
            open_to_it = [one for one in leaders if one not in alone and one // size == expert // size]
            if not open_to_it:
                raise PlanError(f"all groups of layer {shape.layer} are led by super experts, which stay alone")
            groups[max(open_to_it, key=lambda one: (cosine[expert, one], -one))].append(expert)
    return list(groups.values())


def _alone(task: Task, shape: LayerShape) -> frozenset[int]:
    return task.guard.experts(shape.key)


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
    _, layer = np.unique(load.select(LAYER).to_numpy(), axis=0, return_inverse=True)
    chosen = dominant(load["tokens"].to_numpy().astype(np.float64), layer.reshape(-1), groups * count)
    load = load.with_columns(dominant=pl.Series(chosen))
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


def dominant(
    tokens: NDArray[np.float64],
    layer: NDArray[np.int64],
    total: int,
    *,
    least: int = 1,
    forced: NDArray[np.bool_] | None = None,
) -> NDArray[np.bool_]:
    """(rows,) bool, ``total`` of them true: the experts that lead a group, by their share of their layer's selections.

    Args:
        tokens: (rows,) selections of every expert of all layers.
        layer: (rows,) number of its layer, from 0.
        total: how many lead.
        least: how many of every layer at least.
        forced: (rows,) experts that lead in any case, in addition to ``least``.
    """
    share = tokens / np.maximum(np.bincount(layer, tokens), 1.0)[layer]
    if forced is not None:
        share[forced] = np.inf
    for index in range(layer.max() + 1):
        rows = np.flatnonzero((layer == index) & ~np.isinf(share))
        share[rows[np.argsort(-share[rows], kind="stable")[:least]]] = np.inf
    chosen = np.zeros(len(share), dtype=bool)
    chosen[np.argsort(-share, kind="stable")[:total]] = True
    return chosen
