"""Specialization in domains and tokens: over the layers beside its controls, and against SRP expert by expert."""

from __future__ import annotations

import json

import polars as pl

import store
from app.frames.axes import with_label

KINDS = {
    "domain": "a domain",
    "input": "the token itself",
    "predicted": "the predicted token",
    "next": "the next token",
}
"""What experts can be for."""

FORMS = {"expert": "per expert", "largest": "largest share"}
"""The form of the paper on local routing, and OLMoE's."""

_METRICS = {
    "domain_variation": "expert",
    "first_choice_vocabulary": "expert",
    "domain_specialization": "largest",
    "vocabulary_specialization": "largest",
}
_CONTROLS = ("shuffled", "shuffled_in_sequence", "uniform")


def specialization(run: store.Run) -> pl.DataFrame:
    """One row per figure of a MoE layer, and of the model (layer null).

    Columns: kind, form, metric, at = least occurrences of a token id, layer, step, label; value, low, high; shuffled,
    shuffled_in_sequence, uniform = the same of these controls, null where there is none; tokens, sequences.
    """
    parts = [run.metrics(metric).filter(pl.col("expert").is_null()) for metric in _METRICS]
    frame = _with_kind(pl.concat(parts))
    keys = ["kind", "metric", "at", "layer", "step"]
    seen = frame.filter(pl.col("control") == "observed")
    for control in _CONTROLS:
        other = frame.filter(pl.col("control") == control).select(*keys, pl.col("value").alias(control))
        seen = seen.join(other, on=keys, how="left", nulls_equal=True)
    named = with_label(seen).with_columns(pl.col("metric").replace_strict(_METRICS, default="").alias("form"))
    columns = ["kind", "form", "metric", "at", "layer", "step", "label", "value", "low", "high", *_CONTROLS]
    order = pl.col("kind").replace_strict({kind: place for place, kind in enumerate(KINDS)}, default=len(KINDS))
    return named.sort("metric", order, "at", "layer", "step", nulls_last=True).select(*columns, "tokens", "sequences")


def experts(run: store.Run, *, kind: str) -> pl.DataFrame:
    """One row per expert that has both: layer, step, label, expert, specialization, srp, at = its segment length."""
    metric = "domain_variation" if kind == "domain" else "first_choice_vocabulary"
    rows = _with_kind(run.metrics(metric)).filter(pl.col("expert").is_not_null() & (pl.col("kind") == kind))
    at = correlations(run).filter(pl.col("kind") == kind)["at"]
    length = at[0] if len(at) else 16.0
    found = run.metrics("srp").filter(pl.col("expert").is_not_null() & (pl.col("at") == length))
    keys = ["layer", "step", "expert"]
    srp = found.filter(pl.col("control") == "observed").select(*keys, "at", pl.col("value").alias("srp"))
    joined = rows.select(*keys, pl.col("value").alias("specialization")).join(srp, on=keys)
    return with_label(joined.sort(keys)).select("layer", "step", "label", "expert", "specialization", "srp", "at")


def correlations(run: store.Run) -> pl.DataFrame:
    """SRP against specialization over all experts: kind, value, low and high = 95 % of renamed experts, at, tokens."""
    frame = run.metrics("specialization_correlation")
    frame = frame.with_columns(_parameter(frame, "of").alias("kind"))
    band = frame.filter(pl.col("control") == "renamed").select("kind", "low", "high")
    seen = frame.filter(pl.col("control") == "observed").select("kind", "value", "at", "tokens")
    return seen.join(band, on="kind", how="left").select("kind", "value", "low", "high", "at", "tokens")


def _with_kind(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(_parameter(frame, "tokens").fill_null("domain").alias("kind"))


def _parameter(frame: pl.DataFrame, name: str) -> pl.Series:
    values = [json.loads(text or "{}").get(name) for text in frame["parameters"].to_list()]
    return pl.Series(values, dtype=pl.String)
