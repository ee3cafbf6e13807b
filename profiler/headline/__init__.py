"""The metrics that every run gets at its end: load, coverage, local consistency, super experts and more; with controls.

Computed from the run file alone, without the model, and stored beside it: deleting ``NAME.derived.duckdb`` loses
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

import store
from moescope.errors import StoreError
from profiler.headline.axes import axis_distance_rows
from profiler.headline.coverage import coverage_rows
from profiler.headline.flow import PAIRS, lookahead_rows, transition_rows
from profiler.headline.hit_rates import OWN_CACHES, shared_cache_rows
from profiler.headline.layer_memory import layer_memory_rows, step_repeat_rows
from profiler.headline.layerwise import LayerPart
from profiler.headline.load import LOAD
from profiler.headline.local_balance import LOCAL_BALANCE
from profiler.headline.local_consistency import SEGMENTS
from profiler.headline.neighbours import neighbour_rows
from profiler.headline.repetition import REPETITION
from profiler.headline.similarity import similarity_rows
from profiler.headline.specialization import specialization_rows
from profiler.headline.subject import Rows, Subject
from profiler.headline.super_experts import super_expert_rows
from profiler.metrics.registry import METRICS

if TYPE_CHECKING:
    from moescope.cluster import Cluster

Part = Callable[[Subject], Rows]
"""One part of the headline metrics: a finished run in, rows of its metrics out."""

PARTS: tuple[Part, ...] = (
    LOAD,
    LOCAL_BALANCE,
    SEGMENTS,
    OWN_CACHES,
    shared_cache_rows,
    super_expert_rows,
    REPETITION,
    PAIRS,
    transition_rows,
    lookahead_rows,
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


def compute_and_store(
    path: str | Path, *, whole: bool = False, joined: Cluster | None = None, tell: Tell | None = None
) -> Path:
    """Compute the headline metrics of a finished run and store them beside it.

    Args:
        whole: hit rates of every layer's own cache on all tokens, instead of a sample.
        joined: a Ray whose workers do the computing; they find the run under its path.

    Raises:
        StoreError: there is no such run, or it is still being collected.
    """
    if joined is not None:
        from profiler.headline.spread import compute_on

        frame, vectors = compute_on(joined, path, whole=whole, tell=tell)
        return store.write_metrics(path, frame, vectors)
    with store.open_run(path) as run:
        require_finished(run)
        frame, vectors = compute(run, whole=whole, tell=tell)
    return store.write_metrics(path, frame, vectors)


def require_finished(run: store.Run) -> None:
    """Refuse a run that is still being collected.

    Raises:
        StoreError: it is.
    """
    if run.live:
        raise StoreError(f"run {run.name!r} is still being collected: its metrics come when it is finished")


def compute(
    run: store.Run, *, parts: Sequence[Part] = PARTS, whole: bool = False, tell: Tell | None = None
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The headline metrics of a run as rows of the tables ``metric_value`` and ``metric_vector``.

    A part hands over rows of both; those with a list ("values") are vectors.
    """
    subject = Subject(run, whole=whole)
    rows: Rows = []
    for number, part in enumerate(parts, 1):
        if tell is not None:
            tell(f"computing metrics, {number} of {len(parts)}: {words(part)}")
        with one_thread():
            rows += part(subject)
    return frames(rows)


def one_thread() -> AbstractContextManager[object]:
    """One thread for matrix products: they are small, and a product's last bit depends on how many there are."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    limits: AbstractContextManager[object] = threadpool_limits(1, "blas")
    return limits


def frames(rows: Rows) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Rows as the tables that they belong to."""
    return _frame([row for row in rows if "values" not in row]), _frame([row for row in rows if "values" in row])


def words(part: Part) -> str:
    """What a part computes, from its name."""
    if isinstance(part, LayerPart):
        return part.name
    return part.__name__.removesuffix("_rows").replace("_", " ")


def _frame(rows: Rows) -> pl.DataFrame:
    versions = {metric.name: metric.version for metric in METRICS}
    for row in rows:
        row.setdefault("parameters", "{}")
        row.setdefault("control", "observed")
        row["version"] = versions[row["metric"]]
    return pl.DataFrame(rows, infer_schema_length=None) if rows else pl.DataFrame()
