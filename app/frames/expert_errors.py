"""What narrower weights do to one expert's output, beside the other experts of its layer."""

from __future__ import annotations

from typing import Any

import polars as pl

import store
from app.frames.axes import parse_layer
from compressor.plan import BITS, PARTS

_SCHEMA = {
    "width": pl.String, "whole": pl.Float64, **dict.fromkeys(PARTS, pl.Float64), "median": pl.Float64,
    "rank": pl.Int64, "of": pl.Int64, "tokens": pl.Int64,
}  # fmt: skip


def errors(run: store.Run, *, label: str, expert: int) -> pl.DataFrame:
    """One row per width, the narrowest first; empty where the run has no level errors, or no token of its sample used
    the expert.

    Columns: width: 1, ternary, 2, 3, 4 or 8; whole: ||change of the output|| / ||output|| over sampled tokens, gate
    weights counted, where all projections are that wide; gate, up, down: the same where one alone is, null where there
    is none; median: of ``whole`` over the experts of the layer; rank of ``whole`` (1 = the largest of the layer) of so
    many; tokens: sampled ones that used the expert.

    Args:
        run: a run.
        label: of the layer.
        expert: its number.
    """
    layer, step = parse_layer(label)
    rows = run.table("expert_error", layer=layer).filter((pl.col("step") == step) & (pl.col("kind") == "routed"))
    if rows.is_empty():
        return pl.DataFrame(schema=_SCHEMA)
    sums = rows.group_by("expert", "part").agg(
        pl.col("tokens", "gated_output_square_sum").sum(),
        *(pl.col("gated_error_square_sum").list.get(place).sum().alias(str(place)) for place in range(len(BITS))),
    )
    # Errors of single projections may be pooled over domains; the output that they are set against is that of part all.
    output = sums.filter(pl.col("part") == "all").select("expert", pl.col("gated_output_square_sum").alias("output"))
    sums = sums.join(output, on="expert").filter(pl.col("output") > 0)
    relative = sums.with_columns((pl.col(str(place)) / pl.col("output")).sqrt() for place in range(len(BITS)))
    mine = {part: row for row in relative.filter(pl.col("expert") == expert).to_dicts() for part in [row["part"]]}
    if "all" not in mine:
        return pl.DataFrame(schema=_SCHEMA)
    whole = relative.filter(pl.col("part") == "all")
    found: list[dict[str, Any]] = []
    for place, bits in enumerate(BITS):
        values, own = whole[str(place)], mine["all"][str(place)]
        row = {"width": str(bits), "whole": own, "median": values.median(), "rank": int((values > own).sum()) + 1}
        row |= {part: mine[part][str(place)] if part in mine else None for part in PARTS}
        found.append(row | {"of": len(values), "tokens": mine["all"]["tokens"]})
    return pl.DataFrame(found, schema=_SCHEMA)
