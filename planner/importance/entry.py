"""The one entry to all scores."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import polars as pl

import store
from moescope.errors import PlanError
from planner.importance.registry import find
from planner.importance.statistics import Statistics


def score(
    run: store.Run,
    name: str,
    *,
    domain: str | None = None,
    phase: Literal["prompt", "decode"] | None = None,
    **parameters: Any,
) -> pl.DataFrame:
    """A score of every expert, neuron or channel of a run.

    Args:
        run: a run.
        name: one of :data:`planner.importance.registry.SCORES`.
        domain: from tokens of this domain only; None = all. Sums per neuron and channel are pooled over domains unless
            the run was collected with vectors per domain.
        phase: from prompt or generated tokens only; None = both.
        parameters: what the score takes, see docs/importance.md.

    Returns:
        Columns layer, step, expert, kind (routed | shared), then neuron or channel where the score is finer than an
        expert, then value (float64), in that order. Larger = more important. Scores of experts name every routed
        expert that holds weights, those never used with 0; scores of neurons and channels name shared experts too.

    Raises:
        PlanError: no such score, parameter or domain, or the run lacks the statistics; the message names the level.
    """
    one = find(name)
    function = one.function
    allowed = list(inspect.signature(function).parameters)[1:]
    unknown = sorted(set(parameters) - set(allowed))
    if unknown:
        known = f"it takes {', '.join(allowed)}" if allowed else "it takes none"
        raise PlanError(f"score {name!r} has no parameter {unknown[0]!r}: {known}")
    return function(Statistics(run, level=one.level, domain=domain, phase=phase), **parameters)
