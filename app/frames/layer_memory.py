"""What earlier layers say about a layer's choice, from the stored metrics."""

from __future__ import annotations

import json

import polars as pl

import store
from app.frames.axes import with_label

KNOWN = {0: "nothing", 1: "layer before", 2: "two layers back"}
"""What is known of a token when its choice is asked, by the distance in MoE layers."""

_COLUMNS = ("layer", "step", "label", "known", "control", "bits", "low", "high", "tokens", "sequences")


def entropies(run: store.Run) -> pl.DataFrame:
    """One row per MoE layer, known and control: bits of a layer's choice that are open, with low and high.

    known = nothing | layer before | two layers back; control = observed | shuffled | shuffled_in_sequence (the
    choice of another token: what the estimate loses without knowledge). Also tokens, sequences.
    """
    frame = run.metrics("conditional_entropy")
    distance = [int(json.loads(text)["distance"]) for text in frame["parameters"].to_list()]
    frame = frame.with_columns(pl.Series("distance", distance, dtype=pl.Int64)).filter(pl.col("distance") <= 2)
    frame = frame.with_columns(pl.col("distance").replace_strict(KNOWN, return_dtype=pl.String).alias("known"))
    frame = with_label(frame.rename({"value": "bits"})).sort("layer", "step", "distance", "control")
    return frame.select(_COLUMNS)


def memory(run: store.Run) -> pl.DataFrame:
    """One row per MoE layer from the third on: bits that a second layer back adds about first choices.

    Columns: layer, step, label, bits with low and high, chance = the same of exchanged choices, gain = what lies above
    it (from 0), tokens, sequences.
    """
    frame, keys = with_label(run.metrics("layer_memory")), ["layer", "step"]
    seen = frame.filter(pl.col("control") == "observed").rename({"value": "bits"})
    chance = frame.filter(pl.col("control") == "exchanged").select(*keys, pl.col("value").alias("chance"))
    both = seen.join(chance, on=keys, how="left").sort(keys)
    gain = (pl.col("bits") - pl.col("chance")).clip(lower_bound=0.0)
    return both.select(*keys, "label", "bits", "low", "high", "chance", gain.alias("gain"), "tokens", "sequences")
