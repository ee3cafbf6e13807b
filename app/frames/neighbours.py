"""Neighbouring layers: how well a layer's input serves the next router, and how alike their experts are."""

from __future__ import annotations

import polars as pl

import store
from app.frames import flow
from app.frames.axes import with_label

CONTROLS = {"observed": "layer before", "within": "own layer", "shuffled": "channels shuffled"}
"""What the mean outputs of a layer's experts are compared with."""


def recalls(run: store.Run) -> pl.DataFrame:
    """One row per MoE layer whose router was run on the layer before's input: recall of its choices among k experts.

    Columns: layer, step, label, recall; popularity = of the most popular experts, with low and high (null without);
    chance; above = recall - popularity; tokens.
    """
    early = flow.lookaheads(run).filter(
        (pl.col("distance") == 1) & (pl.col("extra") == 0) & (pl.col("input") == "router")
    )
    popular = flow.predictability(run).filter((pl.col("predictor") == "popularity") & (pl.col("extra") == 0))
    popular = popular.select("label", pl.col("value").alias("popularity"), "low", "high")
    both = early.join(popular, on="label", how="left", maintain_order="left")
    return both.select(
        "layer", "step", "label", pl.col("value").alias("recall"), "popularity", "low", "high", "chance",
        (pl.col("value") - pl.col("popularity")).alias("above"), "tokens",
    )  # fmt: skip


def similarity(run: store.Run) -> pl.DataFrame:
    """One row per MoE layer and control: layer, step, label, control, cosine of an expert's mean output with the
    nearest one, mean over the experts."""
    frame = with_label(run.metrics("neighbour_similarity").rename({"value": "cosine"}))
    return frame.select("layer", "step", "label", "control", "cosine").sort("layer", "step", "control")
