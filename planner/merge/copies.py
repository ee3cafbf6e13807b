"""Copies: experts that put out the same for every token are one expert. Ours.

Training from a dense model (upcycling) and merges that were undone leave copies behind; merging these costs nothing but
the router's freedom. Nothing else is merged: a share that asks for more than there are copies is refused.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from compressor.plan import LayerKey, LayerShape
from moescope.errors import PlanError
from planner.allocation import allocate, blocks, most_removed, part, removed
from planner.domains import Mix, expert_scores
from planner.merge.groups import Groups, inner_similarity, merge_step, pair_matrices
from planner.merge.linkage import Merge, labels_after, merge_sequence
from planner.task import Array, Draft, Task


def draft(task: Task, *, threshold: float = 0.99, mix: Mix = "union") -> Draft:
    """The most similar experts merge first, none below the threshold; neurons are matched to the lead's.

    In form ``uniform`` every layer gives the same number, in the other forms the copies may stand anywhere. In form
    ``shared`` the share is that of all experts of the model, and merging exact copies changes nothing.

    Args:
        task: what to plan.
        threshold: least similarity of any two members of a group, see :func:`output_similarity`; above 0, at most 1.
        mix: how the frequencies of domains, by which members count, come together.

    Raises:
        PlanError: fewer copies than the share asks for, or statistics that the run lacks.
    """
    if not 0 < threshold <= 1:
        raise PlanError(f"threshold {threshold:g} is outside (0, 1]: give the least similarity of two copies")
    grams, notes = pair_matrices(task, "expert_similarity", "product_sum", level="similarity")
    tokens, _ = expert_scores(task, "frequency", mix, {})
    similarity = {
        shape.key: output_similarity(grams[shape.key])[: shape.num_experts, : shape.num_experts]
        for shape in task.layers
    }
    merges = {shape.key: _merges(task, shape, similarity[shape.key], threshold) for shape in task.layers}
    number = _numbers(task, merges, threshold)
    groups = {shape.key: _groups(shape, merges[shape.key], number[shape.key]) for shape in task.layers}
    return Draft(
        steps=(merge_step(task, "copies", "aligned", groups, tokens),),
        score="frequency",
        unit="selections, or share of the layer summed over domains",
        values=tokens,
        notes=(*notes, inner_similarity(groups, similarity)),
    )


def output_similarity(gram: Array) -> Array:
    """(experts, experts) 2 <f_i, f_j> / (|f_i|^2 + |f_j|^2), sums over the same tokens.

    1 for equal outputs and for nothing else: unlike a cosine it sees that one expert is louder.

    Args:
        gram: (experts, experts) sums over tokens of the scalar products of the experts' outputs.
    """
    own = np.diag(gram)
    scale = own[:, None] + own[None]
    similarity: Array = np.divide(2 * gram, scale, out=np.zeros_like(gram), where=scale > 0)
    return similarity


_Merges = list[tuple[NDArray[np.int64], list[Merge]]]
"""Per router group: its experts that may merge, and their merges in order."""


def _merges(task: Task, shape: LayerShape, similarity: Array, threshold: float) -> _Merges:
    found: _Merges = []
    alone = task.guard.experts(shape.key)
    for block in blocks(shape):
        free = np.array([expert for expert in block.tolist() if expert not in alone], dtype=np.int64)
        sequence = merge_sequence(1 - similarity[np.ix_(free, free)])
        near = [merge for merge in sequence if merge.distance <= 1 - threshold + 1e-9]
        found.append((free, near))
    return found


def _numbers(task: Task, merges: dict[LayerKey, _Merges], threshold: float) -> dict[LayerKey, int]:
    """Experts that each layer gives."""
    there = {
        shape.key: min(
            shape.groups * min(len(near) for _, near in merges[shape.key]),
            most_removed(shape, task.guard.experts(shape.key)),
        )
        for shape in task.layers
    }
    every = sum(shape.num_experts for shape in task.layers)
    wanted = {shape.key: removed(task, shape) for shape in task.layers} if task.form != "shared" else {}
    total = sum(wanted.values()) if wanted else part(every, task.share)
    if not total:
        raise PlanError(f"share {task.share:g} of {every} experts removes none: ask for at least {1 / every:.4g}")
    if task.form == "uniform":
        short = [shape for shape in task.layers if there[shape.key] < wanted[shape.key]]
        if not short:
            return wanted
        shape = short[0]
        raise PlanError(
            f"layer {shape.layer} has {there[shape.key]} copies (similarity {threshold:g} or more), and share"
            f" {task.share:g} asks for {wanted[shape.key]}; the model has {sum(there.values())}: use form per_layer"
            " with engine transformers, a lower threshold, or another preset"
        )
    if sum(there.values()) < total:
        raise PlanError(
            f"{sum(there.values())} of {every} experts are copies (similarity {threshold:g} or more), and share"
            f" {task.share:g} asks for {total}: lower the share or the threshold, or use another preset"
        )
    costs = [_costs(shape, merges[shape.key], there[shape.key]) for shape in task.layers]
    return {shape.key: given for shape, given in zip(task.layers, allocate(costs, total), strict=True)}


def _costs(shape: LayerShape, merges: _Merges, most: int) -> Array:
    """(most + 1,) sum of the distances of the first merges."""
    costs = np.full(most + 1, np.inf)
    for count in range(0, most + 1, shape.groups):
        costs[count] = sum(merge.distance for _, near in merges for merge in near[: count // shape.groups])
    return costs


def _groups(shape: LayerShape, merges: _Merges, number: int) -> Groups:
    label = np.arange(shape.num_experts)
    for free, near in merges:
        label[free] = free[labels_after(near, len(free), number // shape.groups)]
    return [np.flatnonzero(label == one).tolist() for one in np.unique(label)]
