"""What a machine can do with a model: offers of the memory planner as a table."""

from __future__ import annotations

import polars as pl

from app.text import size
from planner.serving import Serving


def offers(found: Serving) -> pl.DataFrame:
    """One row per offer, in the advised order: #, way, experts, tokens/s, ms, 95 % interval, KL, what lies where.

    ``*`` behind the number: no other offer is both as fast and as cheap.
    """
    rows = []
    for place, one in enumerate(found.offers):
        device, ram, disk = (f"{count:,} ({size(taken)})" if count else "" for count, taken in
                             zip(one.experts, one.bytes, strict=True))  # fmt: skip
        rows.append(
            {
                "#": f"{place + 1}{'*' if place in found.front else ''}", "way": one.way, "experts": one.widths,
                "tokens/s": one.tokens_per_second, "ms": one.ms, "95 %": f"{one.low:.3g} to {one.high:.3g}",
                "KL": one.kl, "device": device, "host": ram, "disk": disk, "slowest domain": one.worst.domain,
                "its ms": one.worst.ms,
            }
        )  # fmt: skip
    schema = {"#": pl.String, "way": pl.String, "experts": pl.String, "tokens/s": pl.Float64, "ms": pl.Float64,
              "95 %": pl.String, "KL": pl.Float64, "device": pl.String, "host": pl.String, "disk": pl.String,
              "slowest domain": pl.String, "its ms": pl.Float64}  # fmt: skip
    return pl.DataFrame(rows, schema=schema)
