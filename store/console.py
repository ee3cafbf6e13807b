"""SQL for people: one question at a time, answered by a process that may read the chosen runs and nothing else."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from moescope.errors import StoreError
from store import remote
from store.answering import GRACE, Answer, stopped

ROWS, SECONDS = 10_000, 10.0
"""Limits where none are given."""

_PROGRAM = "from store.answering import main; main()"
_STARTING = 60.0
"""Seconds that a process may take to start and to attach the runs."""


@dataclass(frozen=True)
class Console:
    """Runs that can be asked. Made by :func:`console`."""

    paths: tuple[Path, ...]

    def ask(self, sql: str, *, rows: int = ROWS, seconds: float = SECONDS) -> Answer:
        """The answer of one reading statement.

        One run: its tables, the view ``route``, and ``metric_value`` and ``metric_vector``. Several: the same as unions
        whose first column is ``run``. Files, network, extensions and settings are shut. Each question has a process of
        its own, which is ended when the time is over or the memory used up.

        Args:
            sql: SELECT, DESCRIBE, SHOW, SUMMARIZE or EXPLAIN.
            rows: at most so many come back; the answer says whether there are more.
            seconds: at most so long, from when the runs are attached.

        Raises:
            StoreError: another statement, SQL that DuckDB refuses (its message in one line, with the place), a limit
                that was reached, or a run that cannot be read.
        """
        if rows < 1 or not 0 < seconds < 1e6:
            raise StoreError(f"limits of {rows} rows and {seconds:g} s: both must be above zero")
        for path in self.paths:
            remote.bring(path)
        question = {"paths": [str(path) for path in self.paths], "sql": sql, "rows": rows, "seconds": seconds}
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-c", _PROGRAM], input=json.dumps(question).encode(),
                capture_output=True, timeout=_STARTING + seconds + GRACE, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise StoreError(stopped(seconds)) from None
        return _read(done.stdout, done.returncode, seconds)


def console(paths: str | Path | Iterable[str | Path]) -> Console:
    """A console on one run, finished or live, or on several finished ones.

    Raises:
        StoreError: no run given.
    """
    given: Sequence[str | Path] = [paths] if isinstance(paths, str | Path) else list(paths)
    if not given:
        raise StoreError("no run to ask: give at least one path")
    return Console(tuple(remote.run_path(path).absolute() for path in given))


def _read(output: bytes, code: int, seconds: float) -> Answer:
    head, _, body = output.partition(b"\n")
    if not head:
        alarm = -14
        if code == alarm:
            raise StoreError(stopped(seconds))
        raise StoreError("the query ended its process, most likely for want of memory: group or filter first")
    said = json.loads(head)
    if "error" in said:
        raise StoreError(said["error"])
    return Answer(pl.read_ipc(io.BytesIO(body)), float(said["seconds"]), bool(said["cut"]))
