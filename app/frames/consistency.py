"""Local routing consistency: SRP and cache hit rates from the derived metrics, and what was published."""

from __future__ import annotations

import json

import polars as pl

import store
from app.frames.axes import with_label
from profiler.metrics import published

CONTROLS = ("observed", "shuffled_in_sequence", "shuffled", "uniform")
POLICIES = ("sch", "lru", "lfu", "belady")


def srp_model(run: store.Run) -> pl.DataFrame:
    """One row per control, domain (null = all text) and segment length: the model's SRP.

    Columns: control, domain, segment_length, value, low, high (95 % interval over sequences), router_size, threshold,
    lower_bound, tokens, sequences.
    """
    keys = ["control", "domain", "at"]
    model = run.metrics().filter(pl.col("layer").is_null() & pl.col("expert").is_null())
    frame = model.filter(pl.col("metric") == "srp").select(*keys, "value", "low", "high", "tokens", "sequences")
    for metric, name in (
        ("srp_router_size", "router_size"),
        ("srp_threshold", "threshold"),
        ("srp_lower_bound", "lower_bound"),
    ):
        other = model.filter(pl.col("metric") == metric).select(*keys, pl.col("value").alias(name))
        frame = frame.join(other, on=keys, how="left", nulls_equal=True)
    return frame.rename({"at": "segment_length"}).sort("control", "domain", "segment_length")


def srp_layers(run: store.Run) -> pl.DataFrame:
    """One row per MoE layer and segment length: layer, step, label, segment_length, value, router_size."""
    keys = ["layer", "step", "at"]
    rows = run.metrics().filter(
        pl.col("layer").is_not_null() & pl.col("expert").is_null() & (pl.col("control") == "observed") & pl.col("domain").is_null()
    )
    frame = rows.filter(pl.col("metric") == "srp").select(*keys, "value")
    size = rows.filter(pl.col("metric") == "srp_router_size").select(*keys, pl.col("value").alias("router_size"))
    frame = frame.join(size, on=keys, how="left", nulls_equal=True).rename({"at": "segment_length"})
    return with_label(frame).sort("layer", "step", "segment_length")


def srp_experts(run: store.Run) -> pl.DataFrame:
    """One row per expert and segment length: layer, step, label, expert, segment_length, value, frequency, uniform.

    frequency = part of the tokens that used the expert (0..1); uniform = k / E, the frequency of a balanced router;
    lower_bound = 2 r / (1 + r) at frequency r: what always keeping the expert would give.
    """
    metrics = run.metrics("srp").filter(pl.col("expert").is_not_null() & (pl.col("control") == "observed"))
    frame = metrics.select("layer", "step", "expert", pl.col("at").alias("segment_length"), "value")
    used = run.table("expert_load").filter(pl.col("kind") == "routed").group_by("layer", "step", "expert").agg(pl.col("tokens").sum())
    total = used.group_by("layer", "step").agg(pl.col("tokens").sum().alias("selections"))
    width = pl.DataFrame(
        [(layer.layer, layer.step, layer.top_k, layer.num_experts) for layer in run.layers],
        schema={"layer": pl.Int32, "step": pl.Int32, "top_k": pl.Int32, "num_experts": pl.Int32},
        orient="row",
    )
    frame = frame.join(used, on=["layer", "step", "expert"], how="left").join(total, on=["layer", "step"], how="left")
    frame = frame.join(width, on=["layer", "step"], how="left")
    frequency = (pl.col("tokens").fill_null(0) * pl.col("top_k") / pl.col("selections")).alias("frequency")
    frame = frame.with_columns(frequency, (pl.col("top_k") / pl.col("num_experts")).alias("uniform"))
    bound = (2 * pl.col("frequency") / (1 + pl.col("frequency"))).alias("lower_bound")
    columns = ["layer", "step", "label", "expert", "segment_length", "value", "frequency", "uniform", "lower_bound"]
    return with_label(frame.with_columns(bound)).select(columns).sort("layer", "step", "expert", "segment_length")


def hit_rates(run: store.Run) -> pl.DataFrame:
    """One row per policy, segment length, scope, control and cache size: the hit rate.

    Columns: policy (sch | lru | lfu | belady), segment_length (sch only), scope: "shared" = one cache for all layers,
    "layers" = mean over one cache per layer, or a layer's label; control; slots; ratio = slots / requests per token
    (rho: 1 = room for what one token uses); value, low, high, tokens, sequences.
    """
    frame = run.metrics().filter(pl.col("metric").str.starts_with("hit_rate_"))
    parsed = [json.loads(text or "{}") for text in frame["parameters"].to_list()]
    frame = with_label(frame).with_columns(
        pl.col("metric").str.strip_prefix("hit_rate_").alias("policy"),
        pl.Series("segment_length", [item.get("segment_length") for item in parsed], dtype=pl.Int64),
        pl.Series("is_shared", [bool(item.get("shared")) for item in parsed], dtype=pl.Boolean),
    )
    whole = pl.when(pl.col("is_shared")).then(pl.lit("shared")).otherwise(pl.lit("layers"))
    scope = pl.when(pl.col("layer").is_null()).then(whole).otherwise(pl.col("label")).alias("scope")
    top_k = sum(layer.top_k for layer in run.layers)
    per_layer = max((layer.top_k for layer in run.layers), default=1)
    ratio = pl.when(pl.col("is_shared")).then(pl.col("at") / max(top_k, 1)).otherwise(pl.col("at") / max(per_layer, 1))
    columns = ["policy", "segment_length", "scope", "control", "slots", "ratio", "value", "low", "high", "tokens", "sequences"]
    frame = frame.with_columns(scope, ratio.alias("ratio"), pl.col("at").cast(pl.Int64).alias("slots"))
    return frame.select(columns).sort("policy", "segment_length", "scope", "control", "slots")


def repetition(run: store.Run) -> pl.DataFrame:
    """One row per MoE layer, metric and control: layer, step, label, metric, control, lag, value (0..1)."""
    rows = run.metrics().filter(pl.col("metric").is_in(["repeat_first_choice", "repeat_overlap"]))
    return with_label(rows).select("layer", "step", "label", "metric", "control", pl.col("at").alias("lag"), "value").sort(
        "metric", "control", "layer", "step"
    )


def published_srp() -> pl.DataFrame:
    """Published SRP of 20 models: model, segment_length, value, router_size, loss."""
    rows = [(row.model, row.segment_length, row.value, row.router_size, row.loss) for row in published.published_srp()]
    schema = {"model": pl.String, "segment_length": pl.Int64, "value": pl.Float64, "router_size": pl.Float64}
    return pl.DataFrame(rows, schema={**schema, "loss": pl.Float64}, orient="row")


def published_hit_rates() -> pl.DataFrame:
    """Published hit rates of 20 models, one cache shared by all layers: model, policy, segment_length, ratio, value."""
    rows = [
        (row.model, row.policy, row.segment_length, row.ratio, row.value) for row in published.published_hit_rates()
    ]
    schema = {"model": pl.String, "policy": pl.String, "segment_length": pl.Int64, "ratio": pl.Float64}
    return pl.DataFrame(rows, schema={**schema, "value": pl.Float64}, orient="row")


def among_published(mine: pl.DataFrame, published_values: pl.DataFrame, *, name: str) -> pl.DataFrame:
    """This run's value among the published ones: model, value, low, high (null without interval), ours (bool).

    mine: rows with value, low, high, of which the observed one counts; published_values: rows with model and value.
    """
    own = mine.filter(pl.col("control") == "observed").head(1).select(
        pl.lit(name).alias("model"), "value", "low", "high", pl.lit(True).alias("ours")
    )
    empty = pl.lit(None, dtype=pl.Float64)
    others = published_values.select("model", "value", empty.alias("low"), empty.alias("high"), pl.lit(False).alias("ours"))
    return pl.concat([own, others]).sort("value", descending=True)
