"""The packed trace and router scores of a run, read the shortest way: through the index, or layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from store.sparse import Query, Sparse


def chunks(
    query: Query, sparse: Sparse, *, layers: Sequence[int], sequences: list[int], table: str = "route_chunk"
) -> pl.DataFrame:
    """Rows of some layers and sequences, by layer, step, sequence and start.

    Lists travel as parameters; an empty choice reads nothing.
    """
    order = "order by layer, step, sequence, start"
    if len(sequences) == 1:
        # Found through the index, which a second condition in the query would keep DuckDB from using.
        one = query(f"select * from {table} where sequence = ? {order}", sequences)
        return one.filter(pl.col("layer").is_in(layers))
    if table == "route_chunk" and sparse.suits(sequences):
        return sparse.chunks(sequences).filter(pl.col("layer").is_in(layers))
    # Layer by layer: rows lie in the order of layers, and of the others DuckDB then reads nothing.
    wanted = "sequence between $first and $last and sequence in (select unnest($sequences::uinteger[]))"
    of = {"first": min(sequences, default=0), "last": max(sequences, default=0), "sequences": sequences}
    read = [
        query(f"select * from {table} where layer = $layer and {wanted} {order}", {"layer": layer, **of})
        for layer in layers or [-1]
    ]
    return pl.concat(read)


def layer_chunks(
    query: Query,
    sparse: Sparse,
    *,
    layer: int,
    step: int,
    first: int,
    last: int,
    sequences: Sequence[int] | None,
    weights: bool,
) -> pl.DataFrame:
    """Rows of the trace of one layer, of the sequences numbered ``first`` to ``last``, by sequence and start.

    Args:
        sequences: only those of these numbers.
        weights: with the gate weights.
    """
    if sequences is not None and sparse.suits(sequences):
        mine = (pl.col("layer") == layer) & (pl.col("step") == step) & pl.col("sequence").is_between(first, last)
        found = sparse.chunks(sequences).filter(mine)
        return found if weights else found.drop("weights")
    condition, numbers = among(sequences)
    names = "sequence, start, width, scale, experts" + (", weights" if weights else "")
    return query(
        f"select {names} from route_chunk where layer = $layer and step = $step"
        f" and sequence between $first and $last{condition} order by sequence, start",
        {"layer": layer, "step": step, "first": first, "last": last, **numbers},
    )


def among(sequences: Sequence[int] | None) -> tuple[str, dict[str, Any]]:
    """The condition that a sequence is one of these, and its parameter; neither where all are wanted."""
    if sequences is None:
        return "", {}
    return " and sequence in (select unnest($sequences::uinteger[]))", {"sequences": [int(one) for one in sequences]}
