"""A stretch of one sequence: a page reads the tokens that it shows, however long the sequence is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import polars as pl

from store.connection import Parameters
from store.trace import CHUNK_TOKENS, Trace, unpack_trace

INDEXED = 4096
"""Tokens up to which a whole sequence is read through the index and then cut; of longer ones the file is scanned, which
takes as long for every stretch."""

Query = Callable[[str, Parameters], pl.DataFrame]
Layers = Sequence[tuple[int, int]]


def chunks(query: Query, table: str, sequence: int, first: int, last: int, *, length: int) -> pl.DataFrame:
    """Rows of a table of chunks that hold any token from ``first`` to ``last`` of a sequence of ``length`` tokens."""
    if length <= INDEXED:
        # A second condition would keep DuckDB from using the index.
        found = query(f"select * from {table} where sequence = ?", [sequence])
    else:
        low = max(first - CHUNK_TOKENS + 1, 0)
        found = query(f"select * from {table} where sequence = ? and start between ? and ?", [sequence, low, last])
    keys = [name for name in ("layer", "step", "start") if name in found.columns]
    return found.filter(pl.col("start").is_between(max(first - CHUNK_TOKENS + 1, 0), last)).sort(keys)


def trace(
    query: Query, *, layers: Layers, sequence: int, first: int, last: int, length: int, domain: str, num_experts: int
) -> Trace:
    """The trace of the tokens ``first`` to ``last`` of one sequence, cut to those that it has."""
    last = min(last, length - 1)
    wanted = pl.DataFrame(list(layers), schema={"layer": pl.Int32, "step": pl.Int32}, orient="row")
    found = chunks(query, "route_chunk", sequence, first, last, length=length)
    found = found.join(wanted, on=["layer", "step"], how="semi", maintain_order="left")
    begin = min(int(found["start"].min() or 0), first) if len(found) else first  # type: ignore[arg-type]
    end = max(_ends(found), last + 1)
    whole = unpack_trace(
        chunks=found.with_columns(pl.col("start") - begin),
        layers=layers,
        sequences=np.array([sequence], np.int64),
        lengths=np.array([max(end - begin, 0)], np.int64),
        domains=[domain],
        num_experts=num_experts,
    )
    kept = slice(first - begin, last + 1 - begin)
    count = np.array([max(last + 1 - first, 0)], np.int64)
    return Trace(whole.ids[:, :, kept], whole.weights[:, :, kept], whole.layers, whole.sequences, count, [domain])


def _ends(found: pl.DataFrame) -> int:
    """One past the last token of these chunks."""
    ends = found.select((pl.col("start") + pl.col("experts").list.len() // pl.col("width")).max()).item()
    return int(ends or 0)
