"""Confidence: how decided the router was, per layer, with percentiles from histograms."""

from __future__ import annotations

import numpy as np
import polars as pl

import store
from app.frames.axes import select, with_label
from profiler.metrics.confidence import percentiles

QUANTITIES = {
    "entropy": "entropy_sum",
    "top_probability": "top_probability_sum",
    "selected_probability": "selected_probability_sum",
    "first_margin": "first_margin_sum",
    "boundary_margin": "boundary_margin_sum",
}
"""Quantity of ``router_histogram`` -> its column in ``router_load``."""

COLUMNS = {
    "layer": pl.Int32,
    "step": pl.Int32,
    "label": pl.String,
    "quantity": pl.String,
    "mean": pl.Float64,
    "p10": pl.Float64,
    "p50": pl.Float64,
    "p90": pl.Float64,
    "tokens": pl.Int64,
    "num_experts": pl.Int32,
}


def confidence(run: store.Run, *, domain: str | None = None, phase: str | None = None) -> pl.DataFrame:
    """One row per MoE layer and quantity: mean over tokens, and 10th, 50th and 90th percentile.

    Quantities: entropy of the router probability (nats), top_probability, selected_probability (0..1), first_margin,
    boundary_margin (logits). Empty where the router's logits were not seen.
    """
    means = _means(select(run.table("router_load"), domain=domain, phase=phase))
    spread = _percentiles(select(run.table("router_histogram"), domain=domain, phase=phase))
    frame = means.join(spread, on=["layer", "step", "quantity"], how="left", maintain_order="left")
    experts = {(layer.layer, layer.step): layer.num_experts for layer in run.layers}
    counts = [experts.get((row[0], row[1])) for row in frame.select("layer", "step").iter_rows()]
    frame = frame.with_columns(pl.Series("num_experts", counts, dtype=pl.Int32))
    return with_label(frame).select([pl.col(name).cast(kind) for name, kind in COLUMNS.items()])


def router_health(run: store.Run, *, domain: str | None = None) -> pl.DataFrame:
    """One row per MoE layer: tokens, nonfinite_tokens, boundary_ties, and tie_share (0..1 of tokens with logits)."""
    table = select(run.table("router_load"), domain=domain)
    summed = table.group_by("layer", "step").agg(
        pl.col("tokens", "logit_tokens", "nonfinite_tokens", "boundary_ties").fill_null(0).sum()
    )
    share = pl.when(pl.col("logit_tokens") > 0).then(pl.col("boundary_ties") / pl.col("logit_tokens"))
    return with_label(summed.sort("layer", "step").with_columns(share.alias("tie_share")))


def _means(table: pl.DataFrame) -> pl.DataFrame:
    """layer, step, quantity, mean, tokens; layers without seen logits are left out."""
    summed = (
        table.group_by("layer", "step").agg(pl.col("logit_tokens", *QUANTITIES.values()).sum()).sort("layer", "step")
    )
    summed = summed.filter(pl.col("logit_tokens") > 0).rename({column: name for name, column in QUANTITIES.items()})
    long = summed.unpivot(on=list(QUANTITIES), index=["layer", "step", "logit_tokens"], variable_name="quantity")
    mean = (pl.col("value") / pl.col("logit_tokens")).alias("mean")
    return long.select("layer", "step", "quantity", mean, pl.col("logit_tokens").alias("tokens"))


def _percentiles(table: pl.DataFrame) -> pl.DataFrame:
    """layer, step, quantity, p10, p50, p90."""
    keys = ["layer", "step", "quantity"]
    bins = table.group_by([*keys, "lower", "upper"]).agg(pl.col("tokens").sum()).sort([*keys, "lower"])
    rows = []
    for key, part in bins.group_by(keys, maintain_order=True):
        finite = part.filter(pl.col("lower").is_finite() & pl.col("upper").is_finite())
        values = percentiles(
            lower=finite["lower"].to_numpy(), upper=finite["upper"].to_numpy(), tokens=finite["tokens"].to_numpy()
        )
        rows.append((*key, *np.asarray(values, dtype=float).tolist()))
    schema = {"layer": pl.Int32, "step": pl.Int32, "quantity": pl.String, "p10": pl.Float64, "p50": pl.Float64}
    return pl.DataFrame(rows, schema={**schema, "p90": pl.Float64}, orient="row").fill_nan(None)
