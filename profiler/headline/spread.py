"""The headline metrics of one run on several machines: a task per part and layer, the same rows in the same order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

import store
from moescope import cluster, memory
from moescope.errors import RunError
from profiler import headline
from profiler.headline.layerwise import LayerPart
from profiler.headline.subject import Rows, Subject


@dataclass(frozen=True)
class _Task:
    """What a worker computes: one part, of one layer where the part reads layers by themselves.

    size: bytes of the run file, by which a worker sees that it has the same one.
    """

    path: Path
    size: int
    whole: bool
    memory_limit: int | None
    part: int
    axis: int | None


def compute_on(
    joined: cluster.Cluster, path: str | Path, *, whole: bool = False, tell: headline.Tell | None = None
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The headline metrics of a finished run, as :func:`profiler.headline.compute`.

    Every worker opens the run by its path, in a folder that all machines share, and works within this process's memory
    limit. A task that is lost is done again.

    Raises:
        StoreError: the run is being collected, or there is none at its path on a worker's machine.
        RunError: the run at that path on a worker's machine is another.
    """
    path = Path(path).resolve()
    held: dict[int, Any] = {}
    rows: Rows = []

    def told(done: int, of: int) -> None:
        if tell is not None:
            tell(f"computing metrics on {joined.workers} workers, {done} of {of} pieces")

    def take(index: int) -> Any:
        while index not in held:
            arrived, (peak, result) = next(results)
            held[arrived] = result
            memory.report_worker(peak)
        return held.pop(index)

    with store.open_run(path) as run:
        headline.require_finished(run)
        subject = Subject(run, whole=whole)
        tasks = _tasks(subject, path)
        results = joined.map(_work, tasks, told)
        # in the order of parts and layers, so that what waits for its turn is little
        for number, part in enumerate(headline.PARTS):
            mine = [index for index, task in enumerate(tasks) if task.part == number]
            with headline.one_thread():
                rows += part.rows(subject, map(take, mine)) if isinstance(part, LayerPart) else take(mine[0])
    return headline.frames(rows)


def _tasks(subject: Subject, path: Path) -> list[_Task]:
    places = [
        (number, axis)
        for number, part in enumerate(headline.PARTS)
        for axis in (part.axes(subject) if isinstance(part, LayerPart) else (None,))
    ]
    size = path.stat().st_size
    return [_Task(path, size, subject.whole, memory.limit(), part, axis) for part, axis in places]


def _work(task: _Task) -> tuple[int, Any]:
    """In a worker: its peak of memory so far, and what the part gives."""
    with memory.limited(task.memory_limit), headline.one_thread(), store.open_run(task.path) as run:
        if task.path.stat().st_size != task.size:
            raise RunError(f"{task.path} on a worker is not the run that was asked for: share its folder")
        subject, part = Subject(run, whole=task.whole), headline.PARTS[task.part]
        if isinstance(part, LayerPart) and task.axis is not None:
            result: Any = part.layer(subject, task.axis)
        else:
            result = part(subject)
    return memory.peak(), result
