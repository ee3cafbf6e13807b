"""Scores of several domains as one: no domain counts more because its text is longer or its outputs are larger."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import polars as pl

import planner.importance as importance
from compressor.plan import LayerKey
from moescope.errors import PlanError
from planner.importance.statistics import layers_of
from planner.task import Array, Task, once, rounded

Mix = Literal["union", "tokens"]
"""``union``: each domain's scores are divided by their sum over the layer, then added. ``tokens``: one score over all
tokens of all domains, as published methods do."""

Scores = dict[LayerKey, Array]


def expert_scores(task: Task, name: str, mix: Mix, parameters: dict[str, Any]) -> tuple[Scores, dict[str, Scores]]:
    """A score of every routed expert, to 6 digits, over the task's domains and of each domain by itself.

    Returns:
        (layer, step) -> (experts,); and the same per domain, empty where domains were not told apart.

    Raises:
        PlanError: as :func:`planner.importance.score`, or a mix that cannot be.
    """
    if mix not in ("union", "tokens"):
        raise PlanError(f"mix {mix!r} is not known: use union or tokens")
    if len(task.domains) > 1 and mix == "tokens" and not task.every_domain:
        raise PlanError("mix 'tokens' takes all domains or one: leave domains out, or use mix 'union'")

    def of(domain: str | None) -> Scores:
        own = {**parameters, "mixed": False} if name == "easy_ep" and domain is None else parameters
        frame = importance.score(task.run, name, domain=domain, **own)
        frame = frame.filter(pl.col("kind") == "routed").sort("layer", "step", "expert")
        return {key: rows["value"].to_numpy().astype(np.float64) for key, rows in layers_of(frame)}

    def mixed() -> tuple[Scores, dict[str, Scores]]:
        if mix == "tokens" or len(task.domains) == 1:
            single = None if mix == "tokens" and task.every_domain else task.domains[0]
            return _rounded(of(single)), {}
        return _united({domain: of(domain) for domain in task.domains})

    return once(task.kept, (name, mix, tuple(sorted(parameters.items()))), mixed)


def pooled(task: Task, table: str) -> bool:
    """Whether a table of vectors keeps all domains together."""
    return set(task.run.table(table)["domain"].unique()) <= {""}


def union(scores: Iterable[Array]) -> Array:
    """Scores of domains (any shape), each divided by the sum of its magnitudes, added up."""
    united: Array = np.sum([values / (np.abs(values).sum() or 1.0) for values in scores], axis=0)
    return united


def kept_by_domain(own: dict[str, Scores], kept: dict[LayerKey, list[int]]) -> str:
    """A sentence on the part of each domain's score that stays, mean over layers; empty without domains."""
    if not own:
        return ""
    parts = [
        f"{domain} {np.mean([values[kept[key]].sum() / (values.sum() or 1.0) for key, values in scores.items()]):.3f}"
        for domain, scores in own.items()
    ]
    return f"Part of each domain's score that stays: {', '.join(parts)}."


def _united(own: dict[str, Scores]) -> tuple[Scores, dict[str, Scores]]:
    keys = next(iter(own.values()))
    return _rounded({key: union(scores[key] for scores in own.values()) for key in keys}), own


def _rounded(scores: Scores) -> Scores:
    return {key: rounded(values) for key, values in scores.items()}
