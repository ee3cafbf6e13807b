"""Scores of neurons as matrices, over the task's domains."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl

import planner.importance as importance
from compressor.plan import LayerKey
from moescope.errors import PlanError
from planner.domains import Mix, pooled
from planner.importance.statistics import layers_of
from planner.task import Array, Task, once

Scope = Literal["layer", "model"]
"""What is ranked together: all neurons of one layer, or of the whole model."""


@dataclass(frozen=True)
class LayerNeurons:
    """The scores of one layer's neurons; larger = more important.

    Attributes:
        routed: (experts, neurons).
        shared: (neurons of the shared experts,); empty without.
    """

    routed: Array
    shared: Array

    @property
    def flat(self) -> Array:
        """All of them, expert after expert, shared ones last."""
        return np.concatenate([self.routed.ravel(), self.shared])


Neurons = dict[LayerKey, LayerNeurons]


def neuron_scores(
    task: Task, name: str, table: str, *, scope: Scope, mix: Mix, shared: bool, parameters: dict[str, Any]
) -> tuple[Neurons, tuple[str, ...]]:
    """A score of every neuron, and what to note.

    Where the run keeps its vectors per domain and several count, each domain's scores are divided by their sum over
    the layer (the model, where that is ranked together) and added.

    Args:
        task: what is planned.
        name: of the score.
        table: whose vectors it reads.
        scope: what is ranked together.
        mix: how domains come together.
        shared: score shared experts too.
        parameters: of the score.

    Raises:
        PlanError: as :func:`planner.importance.score`.
    """
    key = (name, scope, mix, shared, tuple(sorted(parameters.items())))
    return once(task.kept, key, lambda: _scores(task, name, table, scope, mix, shared, parameters))


def _scores(
    task: Task, name: str, table: str, scope: Scope, mix: Mix, shared: bool, parameters: dict[str, Any]
) -> tuple[Neurons, tuple[str, ...]]:
    if mix not in ("union", "tokens"):
        raise PlanError(f"mix {mix!r} is not known: use union or tokens")
    if pooled(task, table):
        note = f"The run keeps {table} pooled over domains: neurons are chosen for all its text together."
        lone = task.every_domain and len(task.domains) == 1
        return _of(task, name, None, shared, parameters), () if lone else (note,)
    if mix == "tokens" and task.every_domain:
        return _of(task, name, None, shared, parameters), ()
    own = [_normalised(_of(task, name, domain, shared, parameters), scope) for domain in task.domains]
    keys = own[0]
    summed = {
        key: LayerNeurons(_sum(one[key].routed for one in own), _sum(one[key].shared for one in own)) for key in keys
    }
    return summed, ()


def _of(task: Task, name: str, domain: str | None, shared: bool, parameters: dict[str, Any]) -> Neurons:
    frame = importance.score(task.run, name, domain=domain, **parameters).sort("layer", "step", "expert", "neuron")
    shapes, found = task.source.by_key, {}
    for key, rows in layers_of(frame):
        shape = shapes[key]
        routed = rows.filter((pl.col("kind") == "routed") & (pl.col("expert") < shape.num_experts))["value"].to_numpy()
        if len(routed) != shape.num_experts * shape.width:
            raise PlanError(
                f"run {task.run.name!r} has {len(routed)} neurons of layer {shape.layer}, not {shape.num_experts} x"
                f" {shape.width}: its experts differ in width and cannot be slimmed together"
            )
        others = rows.filter(pl.col("kind") == "shared")["value"].to_numpy() if shared else np.zeros(0)
        found[key] = LayerNeurons(routed.reshape(shape.num_experts, shape.width), others)
    return found


def _normalised(scores: Neurons, scope: Scope) -> Neurons:
    sums = {key: float(one.flat.sum()) for key, one in scores.items()}
    whole = sum(sums.values())
    by = {key: (whole if scope == "model" else own) or 1.0 for key, own in sums.items()}
    return {key: LayerNeurons(one.routed / by[key], one.shared / by[key]) for key, one in scores.items()}


def _sum(parts: Iterable[Array]) -> Array:
    return np.asarray(np.sum(list(parts), axis=0), dtype=np.float64)
