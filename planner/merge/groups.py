"""What groupings share: clusters inside the router's groups, experts that stay alone, and the step they become."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from compressor.plan import LayerKey, LayerShape, MergeGroup, MergeLayer, MergeStep
from compressor.plan.steps import MergeMethod
from moescope.errors import PlanError
from planner.allocation import blocks, removed
from planner.domains import pooled
from planner.importance.statistics import Statistics
from planner.task import Array, Task

Groups = list[list[int]]
"""The members of each group of one layer: a partition of its experts."""

Cluster = Callable[[LayerKey, NDArray[np.int64], int], NDArray[np.int64]]
"""``cluster(key, experts, count)`` -> (experts,) labels: so many clusters of these experts of a layer."""


def clustered(task: Task, cluster: Cluster) -> dict[LayerKey, Groups]:
    """(layer, step) -> its groups: as many as the share leaves, the same number inside each of the router's groups.

    Protected experts stay alone; the others share the rest.

    Raises:
        PlanError: a share that cannot be met, or more protected experts than groups.
    """
    return {shape.key: _clustered(task, shape, cluster, removed(task, shape)) for shape in task.layers}


def _clustered(task: Task, shape: LayerShape, cluster: Cluster, gone: int) -> Groups:
    alone = task.guard.experts(shape.key)
    groups: Groups = []
    for block in blocks(shape):
        free = np.array([expert for expert in block.tolist() if expert not in alone])
        groups += [[expert] for expert in block.tolist() if expert in alone]
        count = len(free) - gone // shape.groups
        if count < 1:
            raise PlanError(
                f"layer {shape.layer} has {len(free)} experts that may be merged beside {len(alone)} super experts, and"
                f" {gone // shape.groups} would have to go: lower the share, or plan without the guard"
            )
        label = cluster(shape.key, free, count)
        groups += [free[label == one].tolist() for one in np.unique(label)]
    return groups


def merge_step(
    task: Task,
    grouping: str,
    method: MergeMethod,
    groups: Mapping[LayerKey, Groups],
    load: Mapping[LayerKey, Array],
    *,
    rank: int | None = None,
) -> MergeStep:
    """The step that makes every group one expert.

    The lead is the member with the largest load, the lower number of equal ones; members count by their load, equally
    where it is 0.
    """
    layers = [
        MergeLayer(layer=key[0], step=key[1], groups=tuple(sorted(_groups(groups[key], load[key]), key=_lead)))
        for key in sorted(groups)
    ]
    return MergeStep(grouping=grouping, method=method, form=task.form, rank=rank, layers=tuple(layers))  # type: ignore[arg-type]


def equal_weights(task: Task) -> dict[LayerKey, Array]:
    """A load with which all members count alike."""
    return {shape.key: np.ones(shape.num_experts) for shape in task.layers}


def pair_matrices(task: Task, table: str, column: str, *, level: str) -> tuple[dict[LayerKey, Array], tuple[str, ...]]:
    """(layer, step) -> (experts, width) matrix of a column of lists, over the task's domains; and what to note.

    Raises:
        PlanError: the run lacks it.
    """
    if task.every_domain or pooled(task, table):
        found = dict(Statistics(task.run, level=level).matrices(table, column))
        note = f"The run keeps {table} pooled over domains: groups are the same for every domain."
        return found, () if task.every_domain else (note,)
    parts = [dict(Statistics(task.run, level=level, domain=one).matrices(table, column)) for one in task.domains]
    return {key: np.sum([part[key] for part in parts], axis=0) for key in parts[0]}, ()


def sampled_tokens(task: Task, table: str) -> dict[LayerKey, int]:
    """(layer, step) -> tokens behind the rows of one expert in such a table."""
    rows = task.run.table(table)
    if not (task.every_domain or pooled(task, table)):
        rows = rows.filter(rows["domain"].is_in(task.domains))
    first = rows.filter(rows["expert"] == 0)
    return {
        (int(layer), int(step)): int(part["tokens"].sum())
        for (layer, step), part in first.group_by("layer", "step", maintain_order=True)
    }


def inner_similarity(groups: Mapping[LayerKey, Groups], similarity: Mapping[LayerKey, Array]) -> str:
    """A sentence on how alike the members of groups are, beside all pairs of their layers."""
    inside, every = [], []
    for key, layer in groups.items():
        matrix = similarity[key]
        every.append(matrix[np.triu_indices(len(matrix), 1)])
        inside += [matrix[first, second] for group in layer for first, second in _pairs(group)]
    if not inside:
        return "No two experts stand in one group."
    return (
        f"Similarity within groups {np.mean(inside):.3f} on average, of all pairs {np.mean(np.concatenate(every)):.3f}."
    )


def _pairs(group: Sequence[int]) -> list[tuple[int, int]]:
    return [(first, second) for place, first in enumerate(group) for second in group[place + 1 :]]


def _groups(groups: Groups, load: Array) -> list[MergeGroup]:
    found = []
    for group in groups:
        members = sorted(group)
        own = load[members]
        weights = own / own.sum() if own.sum() > 0 else np.full(len(members), 1 / len(members))
        lead = members[int(own.argmax())]
        found.append(MergeGroup(lead=lead, members=tuple(members), weights=tuple(weights.tolist())))
    return found


def _lead(group: MergeGroup) -> int:
    return group.lead
