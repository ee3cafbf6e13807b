"""Chained steps: layers that call their experts several times."""

from __future__ import annotations

import polars as pl

import store
from app.frames import confidence, load
from app.frames.axes import layer_label, with_label

ENTROPIES = {"load": "load", "router": "router's probabilities"}
"""What the entropy of a step is of."""


def steps_of(run: store.Run) -> list[int]:
    """The steps of a run's layers; one where every layer calls its experts once."""
    return sorted({layer.step for layer in run.layers})


def repeats(run: store.Run) -> pl.DataFrame:
    """One row per further step of a layer, from the stored metric.

    Columns: layer, step, label; repeat = share of the step's choices that the step before made too, with low and high;
    popularity = what independent steps would repeat; tokens, sequences.
    """
    frame, keys = with_label(run.metrics("step_repeat")), ["layer", "step"]
    seen = frame.filter(pl.col("control") == "observed").rename({"value": "repeat"})
    chance = frame.filter(pl.col("control") == "popularity").select(*keys, pl.col("value").alias("popularity"))
    both = seen.join(chance, on=keys, how="left").sort(keys)
    return both.select(*keys, "label", "repeat", "low", "high", "popularity", "tokens", "sequences")


def entropies(run: store.Run, *, of: str = "load") -> pl.DataFrame:
    """One row per step of every layer: layer, step, label, entropy over ln E (0..1), tokens.

    of: "load", or "router" for the mean entropy of the router's probabilities (empty where they were not seen).
    """
    if of == "load":
        frame = load.balance(run).select(
            "layer", "step", "label", pl.col("normalised_entropy").alias("entropy"), "tokens"
        )
        return frame.drop_nulls("entropy").with_columns(pl.col("tokens").cast(pl.Int64))
    frame = confidence.confidence(run).filter((pl.col("quantity") == "entropy") & (pl.col("num_experts") > 1))
    part = (pl.col("mean") / pl.col("num_experts").log()).alias("entropy")
    return frame.select("layer", "step", "label", part, pl.col("tokens").cast(pl.Int64))


def source_of(run: store.Run, label: str) -> str | None:
    """The step before a step, by label; None for the first one of its layer."""
    names = [layer_label(one.layer, one.step) for one in run.layers]
    if label not in names:
        return None
    at = names.index(label)
    return names[at - 1] if at and run.layers[at - 1].layer == run.layers[at].layer else None
