"""The headline metrics of one run on several machines: a task per part and layer, the same rows in the same order."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl

import store
from moescope import cluster
from profiler import headline
from profiler.headline.layerwise import LayerPart
from profiler.headline.subject import Rows, Subject


@dataclass(frozen=True)
class _Task:
    """What a worker computes: one part, of one layer where the part reads layers by themselves."""

    run: store.SharedRun
    whole: bool
    part: int
    axis: int | None


def compute_on(
    joined: cluster.Cluster, path: str | Path, *, whole: bool = False, tell: headline.Tell | None = None
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The headline metrics of a finished run, as :func:`profiler.headline.compute`.

    Every worker opens the run by its path, in a folder that all machines share, and works within this process's memory
    limit. A task that is lost is done again.

    Raises:
        StoreError: the run is being collected, or there is none at its path on a worker's machine, or another one.
    """
    path = Path(path).resolve()
    rows: Rows = []

    def told(done: int, of: int) -> None:
        if tell is not None:
            tell(f"computing metrics on {joined.workers} workers, {done} of {of} pieces")

    with store.open_run(path) as run:
        headline.require_finished(run)
        subject = Subject(run, whole=whole)
        tasks = _tasks(subject, path)
        results = joined.in_order(_work, tasks, told)  # of parts, and of their layers
        for number, part in enumerate(headline.PARTS):
            mine = islice(results, sum(task.part == number for task in tasks))
            with headline.one_thread():
                rows += part.rows(subject, mine) if isinstance(part, LayerPart) else next(mine)
    return headline.frames(rows)


def _tasks(subject: Subject, path: Path) -> list[_Task]:
    places = [
        (number, axis)
        for number, part in enumerate(headline.PARTS)
        for axis in (part.axes(subject) if isinstance(part, LayerPart) else (None,))
    ]
    shared = store.SharedRun.of(path)
    return [_Task(shared, subject.whole, part, axis) for part, axis in places]


def _work(task: _Task) -> Any:
    """In a worker: what the part gives."""
    with headline.one_thread(), task.run.opened() as run:
        subject, part = Subject(run, whole=task.whole), headline.PARTS[task.part]
        if isinstance(part, LayerPart) and task.axis is not None:
            return part.layer(subject, task.axis)
        return part(subject)
