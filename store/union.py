"""Several runs read as one: every view has the run's name as its first column."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import polars as pl

from moescope.errors import StoreError
from store import connection, derived, remote
from store.run import FILE_SUFFIX, open_run
from store.schema import literal, quoted, tables, views


class Union:
    """Finished runs attached to one connection. Made by :func:`attach`."""

    def __init__(self, paths: list[Path]) -> None:
        self.names = [path.name.removesuffix(FILE_SUFFIX) for path in paths]
        results = [derived.path_of(path) for path in paths]
        aliases = {f"run_{index}": path for index, path in enumerate(paths)}
        aliases |= {f"derived_{index}": path for index, path in enumerate(results) if path.exists()}
        self._connection = connection.connect(aliases)
        for table in tables().values():
            self._create_view(table.name, [
                connection.table_query(self._connection, f"run_{index}", table) for index in range(len(paths))
            ])  # fmt: skip
        for name in views():
            self._create_view(name, [f"select * from run_{index}.{name}" for index in range(len(paths))])
        for name in derived.TABLES:
            attached = [f"derived_{index}" if path.exists() else "" for index, path in enumerate(results)]
            self._create_view(name, [derived.query(self._connection, database, name) for database in attached])
        connection.lock(self._connection)

    def query(self, sql: str, parameters: connection.Parameters = None) -> pl.DataFrame:
        """The answer of one SELECT, for instance ``select run, layer, expert, tokens from expert_load``."""
        return connection.query(self._connection, sql, parameters)

    def close(self) -> None:
        """Let go of the files."""
        self._connection.close()

    def _create_view(self, name: str, queries: Sequence[str]) -> None:
        """A view over the queries of all runs, in their order."""
        parts = [
            f"select {literal(run)} as run, * from ({query})" for run, query in zip(self.names, queries, strict=True)
        ]
        self._connection.execute(f"create view {quoted(name)} as {' union all by name '.join(parts)}")


def attach(paths: Iterable[str | Path]) -> Union:
    """Attach any number of finished runs.

    Raises:
        StoreError: no run given, two of the same name, or one that cannot be opened (see :func:`store.open_run`).
    """
    files = [remote.run_path(path) for path in paths]
    if not files:
        raise StoreError("no run to attach: give at least one path")
    names = [path.name for path in files]
    doubled = {name for name in names if names.count(name) > 1}
    if doubled:
        raise StoreError(f"two runs are named {doubled.pop()!r}: rename one, views tell runs apart by name")
    for path in files:
        with open_run(path) as run:
            if run.live:
                raise StoreError(f"run {run.name!r} is still being collected: attach it when it is finished")
    return Union(files)
