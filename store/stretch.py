"""A stretch of one sequence: a page reads the tokens that it shows, however long the sequence is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import polars as pl

from store.connection import Parameters
from store.scores import RouterScores, unpack_scores
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
    found, begin, end, last = _wanted(query, "route_chunk", layers, sequence, first, last, length)
    whole = unpack_trace(
        chunks=found,
        layers=layers,
        sequences=np.array([sequence], np.int64),
        lengths=np.array([end - begin], np.int64),
        domains=[domain],
        num_experts=num_experts,
    )
    kept, count = slice(first - begin, last + 1 - begin), np.array([last + 1 - first], np.int64)
    return Trace(whole.ids[:, :, kept], whole.weights[:, :, kept], whole.layers, whole.sequences, count, [domain])


def scores(
    query: Query, *, layers: Layers, sequence: int, first: int, last: int, length: int, domain: str
) -> RouterScores:
    """The largest router scores of the tokens ``first`` to ``last`` of one sequence, cut to those that it has."""
    found, begin, end, last = _wanted(query, "score_chunk", layers, sequence, first, last, length)
    whole = unpack_scores(
        chunks=found,
        layers=layers,
        sequences=np.array([sequence], np.int64),
        lengths=np.array([end - begin], np.int64),
        domains=[domain],
    )
    kept, count = slice(first - begin, last + 1 - begin), np.array([last + 1 - first], np.int64)
    return RouterScores(
        whole.ids[:, :, kept], whole.logits[:, :, kept], whole.log_partition[:, :, kept], whole.layers,
        whole.sequences, count, [domain],
    )  # fmt: skip


def _wanted(
    query: Query, table: str, layers: Layers, sequence: int, first: int, last: int, length: int
) -> tuple[pl.DataFrame, int, int, int]:
    """Chunks of these layers, counted from the returned begin on; begin, end, and the last token that there is."""
    last = max(min(last, length - 1), first - 1)
    wanted = pl.DataFrame(list(layers), schema={"layer": pl.Int32, "step": pl.Int32}, orient="row")
    found = chunks(query, table, sequence, first, last, length=length)
    found = found.join(wanted, on=["layer", "step"], how="semi", maintain_order="left")
    begin = min(int(found["start"].to_numpy().min(initial=first)), first)
    end = max(_ends(found), last + 1)
    return found.with_columns(pl.col("start") - begin), begin, end, last


def _ends(found: pl.DataFrame) -> int:
    """One past the last token of these chunks."""
    ends = found.select((pl.col("start") + pl.col("experts").list.len() // pl.col("width")).max()).item()
    return int(ends or 0)
