"""Axes: how the routing of a layer goes with where a token, or its sequence, lies on an axis."""

from __future__ import annotations

import json

import numpy as np
import polars as pl

import store
from app.frames.axes import with_label
from app.frames.expert_trace import layer_info
from app.frames.stretches import stretches
from profiler.headline.axes import POSITION, Axis, axis_names, axis_of
from profiler.metrics import load
from profiler.metrics._arrays import ratio
from profiler.metrics.axis_distance import axis_counts

_SHARES = {
    "axis": pl.String, "value": pl.String, "place": pl.Int64, "expert": pl.Int32, "tokens": pl.Int64,
    "share": pl.Float64, "pooled_share": pl.Float64, "ratio": pl.Float64,
}  # fmt: skip
_VALUES = {
    "axis": pl.String, "value": pl.String, "place": pl.Int64, "sequences": pl.Int64, "tokens": pl.Int64,
    "entropy": pl.Float64, "effective_experts": pl.Float64, "experts_per_token": pl.Float64,
}  # fmt: skip


__all__ = ["POSITION", "distances", "names", "shares", "values"]


def names(run: store.Run) -> list[str]:
    """The axes of a run: its labels, then position; none without a trace."""
    return axis_names(run) if run.has_trace else []


def shares(run: store.Run, *, axis: str, label: str) -> pl.DataFrame:
    """One row per value of an axis and expert of a layer, values in their order.

    Columns: axis, value, place; expert; tokens of the value that used it; share of the value's selections;
    pooled_share = of all selections; ratio of both (null where nobody used the expert). Values without a token go.
    """
    found = axis_of(run, axis)
    counts, _, _ = _counted(run, found, label)
    kept = np.flatnonzero(counts.sum(axis=1))
    pooled = ratio(counts.sum(axis=0), counts.sum())
    share = ratio(counts, counts.sum(axis=1, keepdims=True))
    rows = len(kept)
    place, expert = np.repeat(kept, counts.shape[1]), np.tile(np.arange(counts.shape[1]), rows)
    return pl.DataFrame(
        {
            "axis": [axis] * len(place),
            "value": [found.names[at] for at in place],
            "place": place,
            "expert": expert,
            "tokens": counts[place, expert],
            "share": share[place, expert],
            "pooled_share": pooled[expert],
            "ratio": ratio(share[place, expert], pooled[expert]),
        },
        schema=_SHARES,
    ).fill_nan(None)


def values(run: store.Run, *, axis: str, label: str) -> pl.DataFrame:
    """One row per value of an axis: how widely its tokens spread over the experts of a layer.

    Columns: axis, value, place; sequences, tokens; entropy of the load over ln E; effective_experts = as many equally
    loaded ones have that entropy; experts_per_token.
    """
    found = axis_of(run, axis)
    counts, tokens, sequences = _counted(run, found, label)
    even = load.balance(load=counts) if len(counts) else None
    frame = pl.DataFrame(
        {
            "axis": [axis] * len(found.names),
            "value": list(found.names),
            "place": range(len(found.names)),
            "sequences": sequences,
            "tokens": tokens,
            "entropy": even.normalised_entropy if even is not None else [],
            "effective_experts": even.effective_experts if even is not None else [],
            "experts_per_token": ratio(counts.sum(axis=1), tokens),
        },
        schema=_VALUES,
    )
    return frame.filter(pl.col("tokens") > 0).fill_nan(None)


def distances(run: store.Run) -> pl.DataFrame:
    """One row per axis, value and MoE layer, from the stored metric, values in their order.

    Columns: axis, value ("" = the axis as a whole), place, layer, step, label; distance with low and high; chance = the
    same with labels exchanged, chance_low, chance_high; tokens, sequences.
    """
    frame, keys = with_label(run.metrics("axis_distance")), ["axis", "value", "layer", "step"]
    named = [json.loads(text) for text in frame["parameters"].to_list()]
    frame = frame.rename({"value": "distance"}).with_columns(
        pl.Series("axis", [one["axis"] for one in named], dtype=pl.String),
        pl.Series("value", [one.get("value", "") for one in named], dtype=pl.String),
        pl.Series("place", [one.get("place", -1) for one in named], dtype=pl.Int64),
    )
    chance = frame.filter(pl.col("control") == "exchanged").select(
        *keys, chance="distance", chance_low="low", chance_high="high"
    )
    seen = frame.filter(pl.col("control") == "observed").join(chance, on=keys, how="left")
    return seen.select(
        *keys, "place", "label", "distance", "low", "high", "chance", "chance_low", "chance_high", "tokens", "sequences"
    ).sort("axis", "place", "layer", "step")


def _counted(run: store.Run, axis: Axis, label: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(values, experts) selections, (values,) tokens and sequences, in as much of the trace as a page reads."""
    experts, size = layer_info(run, label).num_experts, len(axis.names)
    counts = np.zeros((size, experts), np.int64)
    tokens, sequences = np.zeros(size, np.int64), np.zeros(size, np.int64)
    if not size or not run.has_trace:
        return counts, tokens, sequences
    for one in stretches(run, (label,)):
        lengths = np.diff(one.offsets)
        place = axis.of_tokens(one.sequences, lengths)
        counts += axis_counts(ids=one.layers[0], place=place, num_values=size, num_experts=experts)
        tokens += np.bincount(place[place >= 0], minlength=size)
        owner = np.repeat(np.arange(len(lengths)), lengths)
        pairs = np.unique(place[place >= 0] * len(lengths) + owner[place >= 0]) // max(len(lengths), 1)
        sequences += np.bincount(pairs, minlength=size)
    return counts, tokens, sequences
