"""Super experts: what each expert's down_proj puts out at most, and where massive activations form."""

from __future__ import annotations

import json
from typing import Any, Literal

import polars as pl

import store
from app.frames.axes import with_label
from profiler.ablation import Expert
from profiler.metrics.super_experts import forming_layers, massive_activation_layers

TokenChoice = Literal["all", "first_routed"]
FEW_EXPERTS = 200
"""Below so many experts, less than one lies above the 99.5th percentile by construction."""

COLUMN = {"all": "output_max", "first_routed": "first_routed_output_max"}


def output_maxima(run: store.Run, *, tokens: TokenChoice = "all", domain: str | None = None) -> pl.DataFrame:
    """One row per expert that was used, the largest value first.

    Columns: rank (from 1), layer, step, label, expert, kind, value = largest |down_proj output|, and for tokens="all"
    where it stood: channel, sequence, position (null for "first_routed"); first_position: whether that was position 0;
    paper, code: whether that rule calls it a super expert.
    """
    table = run.table("expert_output")
    if domain is not None:
        table = table.filter(pl.col("domain") == domain)
    value = pl.col(COLUMN[tokens])
    keys = ["layer", "step", "expert", "kind"]
    top = table.filter(value.is_not_null()).sort(value, descending=True).group_by(keys, maintain_order=True).first()
    somewhere = tokens == "all"
    place = [
        pl.col(column).cast(pl.Int64) if somewhere else pl.lit(None, dtype=pl.Int64).alias(column)
        for column in ("output_max_channel", "output_max_sequence", "output_max_position")
    ]
    frame = top.select(*keys, value.alias("value"), *place).rename(
        {"output_max_channel": "channel", "output_max_sequence": "sequence", "output_max_position": "position"}
    )
    frame = with_label(frame.sort("value", descending=True)).with_row_index("rank", 1)
    frame = frame.with_columns((pl.col("position") == 0).alias("first_position"), pl.col("rank").cast(pl.Int64))
    found = super_experts(run).filter(pl.col("tokens") == tokens)
    for rule in ("paper", "code"):
        marked = set(found.filter(pl.col("rule") == rule).select("layer", "expert", "kind").iter_rows())
        hits = [row in marked for row in frame.select("layer", "expert", "kind").iter_rows()]
        frame = frame.with_columns(pl.Series(rule, hits, dtype=pl.Boolean))
    return frame


def super_experts(run: store.Run) -> pl.DataFrame:
    """One row per super expert found: rule (paper | code), tokens (all | first_routed), layer, expert, kind, value."""
    frame = _verdicts(run).filter(pl.col("layer").is_not_null())
    # A shared expert is stored as -1 - its number.
    shared = pl.col("expert") < 0
    frame = frame.with_columns(
        pl.when(shared).then(pl.lit("shared")).otherwise(pl.lit("routed")).alias("kind"),
        pl.when(shared).then(-1 - pl.col("expert")).otherwise(pl.col("expert")).cast(pl.Int32).alias("expert"),
    )
    columns = ["rule", "tokens", "layer", "expert", "kind", "value"]
    return frame.select(columns).sort(["rule", "tokens", "value"], descending=[True, False, True])


def chosen(run: store.Run, *, rule: str = "paper", tokens: TokenChoice = "all") -> list[Expert]:
    """The super experts by one rule, by their names."""
    found = super_experts(run).filter((pl.col("rule") == rule) & (pl.col("tokens") == tokens))
    return sorted(
        Expert(layer, 0, kind, expert) for layer, kind, expert in found.select("layer", "kind", "expert").rows()
    )


def thresholds(run: store.Run) -> pl.DataFrame:
    """One row per rule and choice of tokens: rule, tokens, value = what an expert's maximum must exceed."""
    return _verdicts(run).filter(pl.col("layer").is_null()).select("rule", "tokens", "value")


def residual(run: store.Run, *, domain: str | None = None) -> pl.DataFrame:
    """One row per decoder layer: the residual stream's largest |value| after it, and where it stands.

    Columns: layer, absolute_max, median_there = median |value| of that token, ratio of the two, channel, sequence,
    position, later_max = the largest over positions after the first; massive: above 100 and 1,000 times the median;
    forming: massive, and grown in this layer, so that super experts may stand here.
    """
    table = run.table("residual")
    if domain is not None:
        table = table.filter(pl.col("domain") == domain)
    peak = table.sort("absolute_max", descending=True).group_by("layer", maintain_order=True).first()
    later = table.group_by("layer").agg(pl.col("later_max").max())
    frame = peak.select("layer", "absolute_max", "median_there", "channel", "sequence", "position").join(
        later, on="layer"
    )
    ratio = pl.when(pl.col("median_there") > 0).then(pl.col("absolute_max") / pl.col("median_there"))
    frame = frame.with_columns(ratio.alias("ratio")).sort("layer")
    arguments: dict[str, Any] = {
        "residual_max": frame["absolute_max"].to_numpy(),
        "residual_median": frame["median_there"].to_numpy(),
        "layers": frame["layer"].to_list(),
    }
    return frame.with_columns(
        pl.col("layer").is_in(massive_activation_layers(**arguments)).alias("massive"),
        pl.col("layer").is_in(forming_layers(**arguments)).alias("forming"),
    )


def attention_sinks(run: store.Run, *, domain: str | None = None) -> pl.DataFrame:
    """One row per decoder layer with softmax attention: how much of it falls on position 0.

    Columns: layer; mean, low, high: mean over heads, the least and the most of any head; queries behind them.
    """
    table = run.table("attention")
    if domain is not None:
        table = table.filter(pl.col("domain") == domain)
    heads = table.select("layer", "queries", "sink_sum").with_columns(head=pl.int_ranges(pl.col("sink_sum").list.len()))
    heads = heads.explode("head", "sink_sum").group_by("layer", "head").agg(pl.col("queries", "sink_sum").sum())
    heads = heads.with_columns(sink=pl.col("sink_sum") / pl.col("queries"))
    sink = pl.col("sink")
    return (
        heads.group_by("layer")
        .agg(sink.mean().alias("mean"), sink.min().alias("low"), sink.max().alias("high"), pl.col("queries").first())
        .sort("layer")
    )


def _verdicts(run: store.Run) -> pl.DataFrame:
    """The stored verdicts with columns rule and tokens from their parameters."""
    frame = run.metrics("super_experts")
    parsed = [json.loads(text or "{}") for text in frame["parameters"].to_list()]
    return frame.with_columns(
        pl.Series("rule", [item.get("rule") for item in parsed], dtype=pl.String),
        pl.Series("tokens", [item.get("tokens") for item in parsed], dtype=pl.String),
    )
