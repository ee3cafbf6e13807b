"""MC-SMoE: groups merge as M-SMoE's do, and what is left becomes a thin product and some rows.

Source: "Merge, then compress" (MC-SMoE, arXiv 2310.01334, ICLR 2024) and its published code, whose second stage is
training: the sparse part is found by gradients (PLATON) and the whole is distilled. Here it is one singular value
decomposition of the weights.
"""

from __future__ import annotations

from dataclasses import replace

from compressor.plan import FactorGroup, FactorLayer, FactorStep, LayerKey, MergeGroup, MergeStep
from moescope.errors import PlanError
from planner.domains import Mix
from planner.factor.stored import saved_note
from planner.merge.m_smoe import draft as merged_by_m_smoe
from planner.source import value_bytes
from planner.task import Draft, Task

RANK = 32
"""Columns of the thin matrices unless another number is asked for; smaller matrices get a quarter of their rank, from
which on little is saved."""


def draft(task: Task, *, rank: int | None = None, density: float = 0.1, mix: Mix = "union") -> Draft:
    """M-SMoE's merge, and a factor step for every expert that it leaves but super experts.

    Args:
        task: what to plan.
        rank: columns of the thin matrices; None = :data:`RANK`, or a quarter of the matrices' rank where that is less.
        density: part of the rows of each matrix that stay as they are, 0..1.
        mix: as for M-SMoE.

    Raises:
        PlanError: as M-SMoE, or a rank or density that cannot be.
    """
    full = min(task.source.expert_size, *(shape.width for shape in task.layers))
    rank = min(RANK, max(full // 4, 1)) if rank is None else rank
    if not 1 <= rank < full:
        raise PlanError(f"rank {rank} is outside 1..{full - 1}: the matrices of the experts have rank {full}")
    if not 0 <= density < 1:
        raise PlanError(f"density {density:g} is outside [0, 1): give the part of the rows that stays")
    merged = merged_by_m_smoe(task, mix=mix)
    (merge,) = merged.steps
    assert isinstance(merge, MergeStep)
    layers = tuple(
        FactorLayer(layer=layer.layer, step=layer.step, groups=_alone(task, (layer.layer, layer.step), layer.groups))
        for layer in merge.layers
    )
    step = FactorStep(grouping="mc_smoe", method="low_rank_sparse", rank=rank, density=density, layers=layers)
    note = saved_note(task.source, step, value_bytes=value_bytes(task.run))
    return replace(merged, steps=(merge, step), notes=(*merged.notes, note))


def _alone(task: Task, key: LayerKey, groups: tuple[MergeGroup, ...]) -> tuple[FactorGroup, ...]:
    """Every merged expert as a group of its own, without those that are protected."""
    protected = task.guard.experts(key)
    leads = sorted(group.lead for group in groups)
    return tuple(FactorGroup(lead=lead, members=(lead,), weights=(1.0,)) for lead in leads if lead not in protected)
