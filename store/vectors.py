"""Merge the tables of vectors: SQL that unnests every list needs ten times the memory and the time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pyarrow import parquet

from store.schema import Column, Table

VECTOR_ROWS = 128
"""Rows per row group of a shard's vectors: about those of one layer."""

HELD_BYTES = 64 << 20
"""Rows of shards that are added up at once."""

_TYPES: dict[str, type[np.generic]] = {"float": np.float32, "double": np.float64, "bigint": np.int64}


def holds_vectors(table: Table) -> bool:
    """Whether a table has lists that merge entry by entry, and only rules that :func:`merged_layers` knows."""
    lists = any(column.type.endswith("[]") for column in table.columns)
    return lists and bool(table.keys) and all(column.rule in ("key", "sum", "max") for column in table.columns)


def merged_layers(table: Table, files: Sequence[Path]) -> Iterator[pl.DataFrame]:
    """The merged rows of a table's shards, layers in ascending order; sums are made in 64 bits, and rounded once.

    Each shard is read once, all layers together, where that does not take too much memory; else layer by layer.

    Args:
        files: the shards of the table; a column that a shard lacks is null there.
    """
    if max((_unpacked_bytes(file) for file in files), default=0) <= HELD_BYTES:
        yield from _merged(table, (pl.read_parquet(file) for file in files))
        return
    holders: dict[int, list[pl.LazyFrame]] = defaultdict(list)  # a shard may hold one layer alone
    for file in files:
        scan = pl.scan_parquet(file)
        for layer in scan.select(pl.col("layer").unique()).collect()["layer"]:
            holders[layer].append(scan)
    for layer in sorted(holders):
        yield from _merged(table, (scan.filter(pl.col("layer") == layer).collect() for scan in holders[layer]))


def _unpacked_bytes(file: Path) -> int:
    """Bytes of a shard's table in memory, about."""
    metadata = parquet.read_metadata(file)
    return sum(metadata.row_group(place).total_byte_size for place in range(metadata.num_row_groups))


def _merged(table: Table, parts: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """All parts as one frame of the declared types; no more than ``HELD_BYTES`` of them wait to be added."""
    waiting: list[pl.DataFrame] = []
    held = 0
    for part in parts:
        waiting.append(part)
        held += int(part.estimated_size())
        if held > HELD_BYTES and len(waiting) > 1:
            waiting = [_merge(table, pl.concat(waiting, how="diagonal_relaxed"))]
            held = 0
    if waiting:
        merged = _merge(table, pl.concat(waiting, how="diagonal_relaxed"))
        rounded = [column.name for column in table.columns if column.shard_type != column.type]
        yield merged.with_columns(pl.col(rounded).cast(pl.List(pl.Float32)))


def _merge(table: Table, rows: pl.DataFrame) -> pl.DataFrame:
    """Rows of equal keys as one, in the types of shards."""
    lists = [column for column in table.columns if column.type.endswith("[]")]
    missing = [column.name for column in table.columns if column.name not in rows.columns]
    rows = rows.with_columns(pl.lit(None).alias(name) for name in missing)
    keys = list(table.keys)
    scalars = [_scalar(column) for column in table.columns if column not in lists and column.rule != "key"]
    merged = rows.group_by(keys).agg(*scalars, pl.int_range(pl.len()).first().alias("_any")).drop("_any").sort(keys)
    numbered = merged.select(keys).with_row_index("group")
    group = rows.select(keys).join(numbered, on=keys, how="left", nulls_equal=True, maintain_order="left")["group"]
    columns = [_list(column, rows[column.name], group.to_numpy(), len(merged)) for column in lists]
    return merged.with_columns(columns).select(column.name for column in table.columns)


def _scalar(column: Column) -> pl.Expr:
    values = pl.col(column.name)
    if column.rule == "max":
        return values.max()
    return pl.when(values.is_not_null().any()).then(values.sum())  # as in SQL: the sum of nothing is null


def _list(column: Column, lists: pl.Series, group: NDArray[np.int64], groups: int) -> pl.Series:
    """The lists of each group, merged; null where no row of a group has one."""
    kind = _TYPES[column.shard_type.removesuffix("[]")]
    parts = [pl.Series([None], dtype=pl.List(_polars(kind)))]
    place = np.zeros(groups, dtype=np.int64)  # in the parts, one after the other; 0 is the null
    if lists.dtype != pl.Null:
        lengths = lists.list.len().fill_null(0).to_numpy()
        for width in np.unique(lengths[lengths > 0]).tolist():
            rows = np.flatnonzero(lengths == width)
            order = rows[np.argsort(group[rows], kind="stable")]
            values = lists.gather(order).explode().to_numpy().reshape(-1, width)
            names, starts = np.unique(group[order], return_index=True)
            if column.rule == "sum":
                wide = values.astype(np.float64 if values.dtype.kind == "f" else np.int64)
                values = np.add.reduceat(wide, starts, axis=0)
            else:
                values = np.maximum.reduceat(values, starts, axis=0)
            place[names] = sum(map(len, parts)) + np.arange(len(names))
            parts.append(pl.Series(values.astype(kind)).arr.to_list())
    return pl.concat(parts).gather(place).alias(column.name)


def _polars(kind: type[np.generic]) -> pl.DataType:
    return pl.Series(np.zeros(0, kind)).dtype
