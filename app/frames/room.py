"""Where there is room to cut: how far each layer turns the residual stream, and how concentrated its width is."""

from __future__ import annotations

import polars as pl

import store
from app.frames.axes import with_label
from moescope.errors import PlanError
from planner.probes import depth_probe, width_probe

ALL = "all text"


def depth(run: store.Run) -> pl.DataFrame:
    """How far each decoder layer turns the residual stream, by domain; empty where the run has none.

    Columns: label, layer, domain, tokens; influence = 1 - mean cosine of what enters and leaves the layer;
    moe_influence = the same of its routed experts alone, null in dense layers.
    """
    try:
        found = depth_probe(run)
    except PlanError:
        schema = {"layer": pl.Int32, "domain": pl.String, "tokens": pl.Int64, "influence": pl.Float64,
                  "moe_influence": pl.Float64}  # fmt: skip
        found = pl.DataFrame(schema=schema)
    return with_label(found.with_columns(step=pl.lit(0, pl.Int32))).select("label", *found.columns)


def width(run: store.Run) -> pl.DataFrame:
    """How much of each MoE layer its strongest neurons hold, by domain; empty where the run has no neurons.

    Columns: label, layer, step, domain (``all text`` where vectors are pooled), neurons; quarter, half, most = part of
    the layer's width score that its strongest 25, 50 and 75 % of neurons hold.
    """
    try:
        found = width_probe(run)
    except PlanError:
        names = ("quarter", "half", "most")
        found = pl.DataFrame(
            schema={"layer": pl.Int32, "step": pl.Int32, "domain": pl.String}
            | dict.fromkeys(names, pl.Float64)
            | {"neurons": pl.Int64}
        )
    found = found.with_columns(domain=pl.when(pl.col("domain") == "").then(pl.lit(ALL)).otherwise("domain"))
    return with_label(found).select("label", *found.columns)
