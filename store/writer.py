"""Writing a run: shards while it is collected, one file at the end."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

import duckdb
import polars as pl

from moescope.errors import ShardError, StoreError
from store import live
from store.compaction import compact
from store.info import Progress, RunInfo
from store.schema import Table, tables
from store.vectors import VECTOR_ROWS, holds_vectors

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,127}$")
_POLARS: dict[str, pl.DataType] = {
    "integer": pl.Int32(),
    "uinteger": pl.UInt32(),
    "bigint": pl.Int64(),
    "utinyint": pl.UInt8(),
    "usmallint": pl.UInt16(),
    "double": pl.Float64(),
    "float": pl.Float32(),
    "varchar": pl.String(),
    "boolean": pl.Boolean(),
    "blob": pl.Binary(),
    "timestamp": pl.Datetime("us"),
}


def require_name(name: str) -> str:
    """Check a run's name: it becomes a file name and stands in URLs.

    Raises:
        StoreError: the name has other characters than letters, digits, ``.``, ``_``, ``+``, ``-``.
    """
    if not _NAME.match(name) or name.endswith((live.SUFFIX, ".derived", ".duckdb")):
        raise StoreError(f"{name!r} cannot name a run: use letters, digits, '.', '_', '+' or '-', at most 128 of them")
    return name


def require_free(directory: Path, name: str) -> None:
    """Check that a run of this name can be begun in a directory.

    Raises:
        StoreError: the name cannot be one, or is taken by a run or by an unfinished collection.
    """
    require_name(name)
    if (directory / f"{name}.duckdb").exists():
        raise StoreError(f"{directory} already has a run {name!r}: choose another --name, or delete that run")
    folder = directory / f"{name}{live.SUFFIX}"
    if folder.exists():
        live.require_idle(folder)
        raise StoreError(f"{directory} has an unfinished run {name!r}: continue it with --resume, or delete it")


class RunWriter:
    """Collects shards of one run and turns them into its file.

    ::

        writer = RunWriter.create("runs", "mine", RunInfo(model="olmoe"))
        writer.write_shard({"expert_load": frame})      # sums since the last shard
        path = writer.finish(seconds=12.5)
    """

    def __init__(self, folder: Path, info: RunInfo) -> None:
        self.folder = folder
        self.info = info
        existing = live.shards(folder)
        self._next = int(existing[-1].name.removeprefix("shard-")) + 1 if existing else 0

    @classmethod
    def create(cls, directory: str | Path, name: str, info: RunInfo) -> RunWriter:
        """Begin a run.

        Raises:
            StoreError: the name cannot be one, or is taken by a run or by an interrupted collection.
        """
        directory = Path(directory)
        require_free(directory, name)
        folder = directory / f"{name}{live.SUFFIX}"
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise StoreError(f"{folder} cannot be made: {error.strerror}") from error
        live.write_info(folder, info)
        return cls(folder, info)

    @classmethod
    def resume(cls, directory: str | Path, name: str) -> RunWriter:
        """Continue an interrupted run.

        Raises:
            StoreError: there is none of that name, it is finished, or another process is collecting it.
        """
        directory = Path(directory)
        folder = directory / f"{require_name(name)}{live.SUFFIX}"
        if not folder.is_dir():
            finished = (directory / f"{name}.duckdb").exists()
            state = "is finished already" if finished else "does not exist"
            raise StoreError(f"run {name!r} in {directory} {state}: nothing to resume")
        live.require_idle(folder)
        for leftover in folder.glob(".shard-*.tmp"):
            shutil.rmtree(leftover)
        return cls(folder, live.read_info(folder))

    @property
    def name(self) -> str:
        """The name of the run."""
        return self.folder.name.removesuffix(live.SUFFIX)

    @property
    def sequences_done(self) -> set[int]:
        """Numbers of the sequences that the shards hold; a resumed collection leaves them out."""
        query = f"select distinct sequence from {live.source(self.folder, 'sequence')}"
        with duckdb.connect() as connection:
            return {int(row[0]) for row in connection.sql(query).fetchall()}

    @property
    def shard_names(self) -> list[str]:
        """The shards that are there, in the order in which they were written."""
        return [path.name for path in live.shards(self.folder)]

    def keep_shards(self, names: Collection[str]) -> None:
        """Remove all other shards: what they hold will be recorded again."""
        for path in live.shards(self.folder):
            if path.name not in names:
                shutil.rmtree(path)

    def write_info(self) -> None:
        """Publish changes of :attr:`info` made since the run began."""
        live.write_info(self.folder, self.info)

    def write_progress(self, progress: Progress) -> None:
        """Tell readers how far the collection is."""
        live.write_progress(self.folder, progress)

    def write_shard(self, frames: Mapping[str, pl.DataFrame | Mapping[str, object]]) -> Path | None:
        """Publish one shard: per table the rows since the last shard. Empty frames are left out.

        Raises:
            ShardError: an unknown table or column, or a disk that refuses.
        """
        filled = {name: _typed(tables(), name, frame) for name, frame in frames.items()}
        filled = {name: frame for name, frame in filled.items() if len(frame)}
        if not filled:
            return None
        final = self.folder / f"shard-{self._next:06d}"
        temporary = self.folder / f".{final.name}.tmp"
        try:
            temporary.mkdir()
            for name, frame in filled.items():
                # Vectors are merged layer by layer: small row groups let the others be skipped.
                rows = VECTOR_ROWS if holds_vectors(tables()[name]) else None
                path = temporary / f"{name}.parquet"
                frame.write_parquet(path, compression="zstd", compression_level=1, row_group_size=rows)
            os.rename(temporary, final)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise ShardError(f"{final} cannot be written: {error}") from error
        self._next += 1
        return final

    def finish(self, *, seconds: float | None = None, complete: bool = True) -> Path:
        """Compact the shards into ``NAME.duckdb`` and remove them.

        Args:
            seconds: wall time of the forwards, for the run's provenance.
            complete: False when the collection ended before its corpus did.

        Raises:
            ShardError: nothing was recorded, or the shards cannot be merged; they stay where they are.
        """
        if not live.shards(self.folder):
            raise ShardError(f"run {self.name!r} recorded nothing: no shard was written")
        if seconds is not None:
            self.info.seconds = seconds
        self.info.complete = complete
        target = self.folder.with_name(f"{self.name}.duckdb")
        compact(self.folder, target, self.info)
        shutil.rmtree(self.folder, ignore_errors=True)
        return target


def _typed(known: Mapping[str, Table], name: str, frame: pl.DataFrame | Mapping[str, object]) -> pl.DataFrame:
    """The frame with the columns and types that the schema declares; missing columns become null."""
    if name not in known:
        raise ShardError(f"no table {name!r} in the schema; there are {', '.join(known)}")
    data = frame if isinstance(frame, pl.DataFrame) else pl.DataFrame(frame)
    columns = {column.name: column.type for column in known[name].columns}
    unknown = [column for column in data.columns if column not in columns]
    if unknown:
        raise ShardError(f"table {name} has no column {unknown[0]!r}; it has {', '.join(columns)}")
    expressions = []
    for column, kind in columns.items():
        if column not in data.columns:
            expressions.append(pl.lit(None, dtype=_polars_type(kind)).alias(column))
        elif (name, column) == ("route_chunk", "experts"):
            expressions.append(pl.col(column))  # one byte or two, as the run's number of experts asks
        else:
            expressions.append(pl.col(column).cast(_polars_type(kind)))
    return data.select(expressions)


def _polars_type(kind: str) -> pl.DataType:
    if kind.endswith("[]"):
        return pl.List(_polars_type(kind[:-2]))
    return _POLARS[kind]
