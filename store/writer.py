"""Writing a run: shards while it is collected, one file at the end."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import duckdb
import polars as pl

from moescope.errors import MoescopeError, ShardError, StoreError
from store import derived, live, lock
from store.compaction import compact
from store.damage import damage
from store.info import Progress, RunInfo
from store.schema import Table, literal, tables
from store.shard_target import FolderTarget, ShardTarget
from store.vectors import VECTOR_ROWS, holds_vectors
from store.whole import cause, refusal, remove, replacing, sweep, temporary_for

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
    if not _NAME.fullmatch(name) or name.endswith((live.SUFFIX, ".derived", ".duckdb")):
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
        reserved = int(info.settings.get("workers", {}).get("next_shard", 0))  # numbers below are those of parts
        self._next = max(live.shard_number(existing[-1]) + 1 if existing else 0, reserved)
        self._verdicts = live.next_verdicts(folder)

    @classmethod
    def create(cls, directory: str | Path, name: str, info: RunInfo) -> RunWriter:
        """Begin a run, which other processes cannot collect while this one does.

        Raises:
            StoreError: the name cannot be one, or is taken by a run or by an interrupted collection.
            RunError: the disk is full.
        """
        directory = Path(directory)
        require_free(directory, name)
        folder = directory / f"{name}{live.SUFFIX}"
        temporary = temporary_for(folder)
        try:
            temporary.mkdir(parents=True)
            sweep(directory)
            lock.take(temporary)
            live.write_info(temporary, info)
            os.rename(temporary, folder)  # a folder that holds something is never replaced
        except OSError as error:
            lock.release(temporary)
            remove(temporary)
            require_free(directory, name)  # who was quicker has the name
            raise refusal(folder, error) from error
        except MoescopeError:
            lock.release(temporary)
            remove(temporary)
            raise
        return cls(folder, info)

    @classmethod
    def resume(cls, directory: str | Path, name: str) -> RunWriter:
        """Continue an interrupted run, which other processes cannot collect meanwhile.

        Raises:
            StoreError: there is none of that name, it is finished, or another process is collecting it.
            ShardError: a shard is damaged; the message says which, and what to do.
        """
        directory = Path(directory)
        folder = directory / f"{require_name(name)}{live.SUFFIX}"
        settle(directory, name)
        sweep(directory)
        if not folder.is_dir():
            finished = (directory / f"{name}.duckdb").exists()
            state = "is finished already" if finished else "does not exist"
            raise StoreError(f"run {name!r} in {directory} {state}: nothing to resume")
        _lock(folder)
        for leftover in folder.glob(".shard-*.tmp"):
            remove(leftover)
        for staging in folder.glob(f"{live.STAGING}*"):  # workers that outlived their driver can no longer add a shard
            _discard(staging)
        return cls(folder, live.read_info(folder))

    @property
    def name(self) -> str:
        """The name of the run."""
        return self.folder.name.removesuffix(live.SUFFIX)

    @property
    def sequences_done(self) -> set[int]:
        """Numbers of the sequences that the shards hold; a resumed collection leaves them out.

        Raises:
            ShardError: a shard is damaged.
        """
        query = f"select distinct sequence from {live.source(self.folder, 'sequence')}"
        try:
            with duckdb.connect() as connection:
                return {int(row[0]) for row in connection.sql(query).fetchall()}
        except duckdb.Error as error:
            raise damage(self.folder, error) from error

    @property
    def next_shard(self) -> int:
        """The number that the next shard of this process will have."""
        return self._next

    @property
    def shard_names(self) -> list[str]:
        """The shards that are there, in the order in which they were written."""
        return [path.name for path in live.shards(self.folder)]

    def keep_shards(self, names: Collection[str]) -> None:
        """Remove all other shards: what they hold will be recorded again."""
        for path in live.shards(self.folder):
            if path.name not in names:
                _discard(path)

    def write_info(self) -> None:
        """Publish changes of :attr:`info` made since the run began."""
        live.write_info(self.folder, self.info)

    def write_progress(self, progress: Progress) -> None:
        """Tell readers how far the collection is."""
        live.write_progress(self.folder, progress)

    def write_checks(self, frame: pl.DataFrame) -> None:
        """Publish the verdicts of the checks so far, in place of those that this process published before.

        Raises:
            ShardError: a disk that refuses.
        """
        try:
            self._verdicts.parent.mkdir(exist_ok=True)
            with replacing(self._verdicts) as temporary:
                _typed(tables(), "check", frame).write_parquet(temporary)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise _kept(self._verdicts, error) from error

    @property
    def has_checks(self) -> bool:
        """Whether verdicts of checks have been published, by whatever process."""
        return bool(live.files(self.folder, "check"))

    def write_shard(self, frames: Mapping[str, pl.DataFrame | Mapping[str, object]]) -> Path | None:
        """Publish one shard: per table the rows since the last shard. Empty frames are left out.

        Raises:
            ShardError: an unknown table or column, a disk that refuses, or another process that writes the run too.
        """
        filled = filled_tables(frames)
        if not filled:
            return None
        final = self.folder / live.shard_name(self._next)
        if not publish_shard(FolderTarget(self.folder), self._next, filled, final):
            raise ShardError(f"{final} is there already: another process collects this run too; stop one")
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
        remove(derived.path_of(target))  # of a run that had the name before
        compact(self.folder, target, self.info)
        self.close()
        _discard(self.folder)
        sweep(self.folder.parent)
        return target

    def close(self) -> None:
        """Let another process go on with the run."""
        lock.release(self.folder)


def filled_tables(frames: Mapping[str, pl.DataFrame | Mapping[str, object]]) -> dict[str, pl.DataFrame]:
    """The frames that have rows, as a shard holds them.

    Raises:
        ShardError: an unknown table or column.
    """
    typed = {name: _typed(tables(), name, frame) for name, frame in frames.items()}
    return {name: frame for name, frame in typed.items() if len(frame)}


def publish_shard(target: ShardTarget, number: int, filled: Mapping[str, pl.DataFrame], final: Path | str) -> bool:
    """Write the tables of one shard, and hand it over.

    Args:
        filled: what :func:`filled_tables` gives.
        final: what the shard is called if something goes wrong.

    Returns:
        False where a shard of that number is there already; it stays as it is.

    Raises:
        ShardError: the disk or the store refuses.
    """
    folder = None
    try:
        folder = target.stage(number)
        for name, frame in filled.items():
            path = folder / f"{name}.parquet"
            rows = _row_group(name, frame)
            frame.write_parquet(path, compression="zstd", compression_level=1, row_group_size=rows)
        return target.publish(number, folder)
    except (OSError, pl.exceptions.PolarsError) as error:
        if folder is None:
            raise _kept(Path(final), error) from error
        found = cause(error, folder)
        remove(folder)
        raise _kept(Path(final), found) from error


def settle(directory: Path, name: str) -> None:
    """Remove the shards of a run whose file is whole, where a kill came between the two.

    Raises:
        StoreError: the file of that name is another run's, or another process works on the shards.
    """
    target, folder = directory / f"{name}.duckdb", directory / f"{name}{live.SUFFIX}"
    if not (target.exists() and folder.is_dir()):
        return
    _lock(folder)
    if not _is_compacted(target, live.read_info(folder)):
        lock.release(folder)
        raise StoreError(f"{folder} is not what {target} was made from: rename one of the two, and resume again")
    lock.release(folder)
    _discard(folder)


def lacking_metrics(directory: str | Path, name: str) -> Path | None:
    """The run file that a collection had finished when it was killed before its metrics were written; None otherwise.

    Raises:
        StoreError: as :func:`settle`.
    """
    directory = Path(directory)
    settle(directory, name)
    path = directory / f"{name}.duckdb"
    return path if path.is_file() and not derived.is_readable(derived.path_of(path)) else None


def _is_compacted(target: Path, info: RunInfo) -> bool:
    """Whether a run file says the same of its beginning as the folder of shards."""
    query = "select created_at, model, tool_version from found.run"
    try:
        with duckdb.connect() as connection:
            connection.execute(f"attach {literal(target)} as found (read_only)")
            rows = connection.sql(query).fetchall()
    except duckdb.Error as error:
        raise StoreError(f"{target} cannot be read as a run: {str(error).splitlines()[0]}") from error
    return rows == [(info.created_at, info.model, info.tool_version)]


def _lock(folder: Path) -> None:
    live.require_idle(folder)
    try:
        lock.take(folder)
    except OSError as error:
        raise refusal(folder, error) from error


def _discard(folder: Path) -> None:
    """Remove a folder so that nobody ever sees a part of it."""
    hidden = temporary_for(folder)
    os.rename(folder, hidden)
    remove(hidden)


def _kept(path: Path, error: Exception) -> ShardError:
    return ShardError(f"{refusal(path, error, ' and go on with --resume')}; what was written before is kept")


def _typed(known: Mapping[str, Table], name: str, frame: pl.DataFrame | Mapping[str, object]) -> pl.DataFrame:
    """The frame with the columns and types that the schema declares; missing columns become null."""
    if name not in known:
        raise ShardError(f"no table {name!r} in the schema; there are {', '.join(known)}")
    data = frame if isinstance(frame, pl.DataFrame) else pl.DataFrame(frame)
    columns = {column.name: column.shard_type for column in known[name].columns}
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


def _row_group(name: str, frame: pl.DataFrame) -> int | None:
    """Rows per row group of a shard: about a layer's where shards are merged by layer, so that others are skipped."""
    if holds_vectors(tables()[name]):
        return VECTOR_ROWS
    return max(VECTOR_ROWS, len(frame) // frame["layer"].n_unique()) if name == "route_chunk" else None


def _polars_type(kind: str) -> pl.DataType:
    if kind.endswith("[]"):
        return pl.List(_polars_type(kind[:-2]))
    return _POLARS[kind]
