"""The metrics that every run gets at its end: load, coverage, local consistency, super experts and more; with controls.

Computed from the run file alone, without the model, and stored beside it: deleting ``NAME.derived.duckdb`` loses
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl

import store
from moescope.errors import StoreError
from profiler.headline.axes import axis_distance_rows
from profiler.headline.coverage import coverage_rows
from profiler.headline.flow import flow_rows
from profiler.headline.layer_memory import layer_memory_rows, step_repeat_rows
from profiler.headline.load import load_rows
from profiler.headline.local_balance import local_balance_rows
from profiler.headline.local_consistency import hit_rate_rows, segment_rows
from profiler.headline.neighbours import neighbour_rows
from profiler.headline.repetition import repetition_rows
from profiler.headline.similarity import similarity_rows
from profiler.headline.specialization import specialization_rows
from profiler.headline.subject import Rows, Subject
from profiler.headline.super_experts import super_expert_rows
from profiler.metrics.registry import METRICS

Part = Callable[[Subject], Rows]
"""One part of the headline metrics: a finished run in, rows of its metrics out."""

PARTS: tuple[Part, ...] = (
    load_rows,
    local_balance_rows,
    segment_rows,
    hit_rate_rows,
    super_expert_rows,
    repetition_rows,
    flow_rows,
    layer_memory_rows,
    step_repeat_rows,
    neighbour_rows,
    axis_distance_rows,
    similarity_rows,
    specialization_rows,
    coverage_rows,
    *dict.fromkeys(one.rows for one in METRICS if one.rows is not None),
)
"""What is computed, in order: the parts beside this file, then the metrics whose files compute themselves."""


Tell = Callable[[str], None]
"""Told in a few words what is being computed."""


def compute_and_store(path: str | Path, *, tell: Tell | None = None) -> Path:
    """Compute the headline metrics of a finished run and store them beside it.

    Raises:
        StoreError: there is no such run, or it is still being collected.
    """
    with store.open_run(path) as run:
        if run.live:
            raise StoreError(f"run {run.name!r} is still being collected: its metrics come when it is finished")
        frame, vectors = compute(run, tell=tell)
    return store.write_metrics(path, frame, vectors)


def compute(
    run: store.Run, *, parts: Sequence[Part] = PARTS, tell: Tell | None = None
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The headline metrics of a run as rows of the tables ``metric_value`` and ``metric_vector``.

    A part hands over rows of both; those with a list ("values") are vectors.
    """
    subject = Subject(run)
    rows: Rows = []
    for number, part in enumerate(parts, 1):
        if tell is not None:
            tell(f"computing metrics, {number} of {len(parts)}: {words(part)}")
        rows += part(subject)
    return _frame([row for row in rows if "values" not in row]), _frame([row for row in rows if "values" in row])


def words(part: Part) -> str:
    """What a part computes, from its name."""
    return part.__name__.removesuffix("_rows").replace("_", " ")


def _frame(rows: Rows) -> pl.DataFrame:
    versions = {metric.name: metric.version for metric in METRICS}
    for row in rows:
        row.setdefault("parameters", "{}")
        row.setdefault("control", "observed")
        row["version"] = versions[row["metric"]]
    return pl.DataFrame(rows, infer_schema_length=None) if rows else pl.DataFrame()
