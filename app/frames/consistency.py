"""Local routing consistency: SRP and cache hit rates from the derived metrics, and what was published."""

from __future__ import annotations

import json

import polars as pl

import store
from app.frames.axes import with_label
from profiler.metrics import published

CONTROLS = ("observed", "shuffled_in_sequence", "shuffled", "uniform")
POLICIES = ("sch", "lru", "lfu", "belady")
REPETITIONS = ("first_choice_repeat", "mean_overlap")


def srp_model(run: store.Run) -> pl.DataFrame:
    """One row per control, domain (null = all text) and segment length: the model's SRP.

    Columns: control, domain, segment_length, value, low, high (95 % interval over sequences), router_size, lower_bound
    (what always keeping every expert would give), tokens, sequences.
    """
    keys = ["control", "domain", "at"]
    whole = pl.col("layer").is_null() & pl.col("expert").is_null()
    srp = run.metrics("srp").filter(whole)
    size = run.metrics("router_size").filter(whole).select(*keys, pl.col("value").alias("router_size"))
    bound = srp.filter(pl.col("control") == "lower_bound").select("domain", "at", pl.col("value").alias("lower_bound"))
    frame = srp.filter(pl.col("control") != "lower_bound").select(*keys, "value", "low", "high", "tokens", "sequences")
    frame = frame.join(size, on=keys, how="left", nulls_equal=True)
    frame = frame.join(bound, on=["domain", "at"], how="left", nulls_equal=True)
    return frame.rename({"at": "segment_length"}).sort("control", "domain", "segment_length")


def srp_layers(run: store.Run) -> pl.DataFrame:
    """One row per MoE layer and segment length: layer, step, label, segment_length, value, router_size."""
    keys = ["layer", "step", "at"]
    of_layer = pl.col("layer").is_not_null() & pl.col("expert").is_null() & pl.col("domain").is_null()
    of_layer &= pl.col("control") == "observed"
    frame = run.metrics("srp").filter(of_layer).select(*keys, "value")
    size = run.metrics("router_size").filter(of_layer).select(*keys, pl.col("value").alias("router_size"))
    frame = frame.join(size, on=keys, how="left", nulls_equal=True).rename({"at": "segment_length"})
    return with_label(frame).sort("layer", "step", "segment_length")


def srp_experts(run: store.Run) -> pl.DataFrame:
    """One row per expert and segment length: layer, step, label, expert, segment_length, value, frequency, uniform.

    frequency = part of the tokens that used the expert (0..1); uniform = k / E, the frequency of a balanced router;
    lower_bound = 2 r / (1 + r) at frequency r: what always keeping the expert would give.
    """
    metrics = run.metrics("srp").filter(pl.col("expert").is_not_null() & (pl.col("control") == "observed"))
    frame = metrics.select("layer", "step", "expert", pl.col("at").alias("segment_length"), "value")
    used = (
        run.table("expert_load")
        .filter(pl.col("kind") == "routed")
        .group_by("layer", "step", "expert")
        .agg(pl.col("tokens").sum())
    )
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
    "layers" = mean over one cache per layer, or a layer's label; layer, step (null but for one layer); control; slots;
    ratio = slots / requests per token (rho: 1 = room for what one token uses); value, low, high, tokens, sequences.
    """
    frame = pl.concat([run.metrics(f"hit_rate_{policy}") for policy in POLICIES])
    frame = with_label(frame.join(_parameters(frame), on="parameters", how="left", nulls_equal=True))
    frame = frame.with_columns(pl.col("metric").str.strip_prefix("hit_rate_").alias("policy"))
    whole = pl.when(pl.col("is_shared")).then(pl.lit("shared")).otherwise(pl.lit("layers"))
    scope = pl.when(pl.col("layer").is_null()).then(whole).otherwise(pl.col("label")).alias("scope")
    top_k = sum(layer.top_k for layer in run.layers)
    per_layer = max((layer.top_k for layer in run.layers), default=1)
    ratio = pl.when(pl.col("is_shared")).then(pl.col("at") / max(top_k, 1)).otherwise(pl.col("at") / max(per_layer, 1))
    columns = [
        "policy",
        "segment_length",
        "scope",
        "layer",
        "step",
        "control",
        "slots",
        "ratio",
        "value",
        "low",
        "high",
        "tokens",
        "sequences",
    ]
    frame = frame.with_columns(scope, ratio.alias("ratio"), pl.col("at").cast(pl.Int64).alias("slots"))
    return frame.select(columns).sort("policy", "segment_length", "layer", "step", "scope", "control", "slots")


def repetition(run: store.Run) -> pl.DataFrame:
    """One row per MoE layer, metric and control: layer, step, label, metric, control, lag, value (0..1)."""
    rows = pl.concat([run.metrics(name) for name in REPETITIONS])
    return (
        with_label(rows)
        .select("layer", "step", "label", "metric", "control", pl.col("at").alias("lag"), "value")
        .sort("metric", "control", "layer", "step")
    )


def key_numbers(run: store.Run, *, segment_length: float = 16, ratio: float = 2.0) -> pl.DataFrame:
    """The few numbers that say whether caching pays: name, value, low, high, control (with shuffled tokens), detail,
    ratio (of hit rates).

    SRP at one segment length, and hit rates of LRU, SCH and Belady in one shared cache of ``ratio`` times the experts
    that a token uses, or of the size nearest to it that was computed.
    """
    srp = srp_model(run).filter((pl.col("segment_length") == segment_length) & pl.col("domain").is_null())
    rows = [_with_control("SRP", srp, f"segments of {segment_length:g} tokens", None)]
    shared = hit_rates(run).filter(pl.col("scope") == "shared")
    for policy, name in (("lru", "LRU hit rate"), ("sch", "SCH hit rate"), ("belady", "Belady hit rate")):
        part = shared.filter(pl.col("policy") == policy)
        if policy == "sch":
            part = part.filter(pl.col("segment_length") == segment_length)
        nearest = part.with_columns((pl.col("ratio") - ratio).abs().alias("off")).filter(
            pl.col("off") == pl.col("off").min()
        )
        at = nearest["ratio"][0] if len(nearest) else ratio
        rows.append(_with_control(name, nearest, f"one cache with {at:.3g} × the slots that a token uses", at))
    schema = {"name": pl.String, "value": pl.Float64, "low": pl.Float64, "high": pl.Float64, "control": pl.Float64}
    schema |= {"detail": pl.String, "ratio": pl.Float64}
    return pl.DataFrame([row for row in rows if row is not None], schema=schema, orient="row")


def _with_control(name: str, frame: pl.DataFrame, detail: str, at: float | None) -> tuple[object, ...] | None:
    """One row of :func:`key_numbers` from rows of one abscissa; None without an observed value."""
    observed = frame.filter(pl.col("control") == "observed")
    if observed.is_empty():
        return None
    shuffled = frame.filter(pl.col("control") == "shuffled")["value"]
    control = shuffled[0] if len(shuffled) else None
    return (name, *observed.select("value", "low", "high").row(0), control, detail, at)


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
    own = (
        mine.filter(pl.col("control") == "observed")
        .head(1)
        .select(pl.lit(name).alias("model"), "value", "low", "high", pl.lit(True).alias("ours"))
    )
    empty = pl.lit(None, dtype=pl.Float64)
    others = published_values.select(
        "model", "value", empty.alias("low"), empty.alias("high"), pl.lit(False).alias("ours")
    )
    return pl.concat([own, others]).sort("value", descending=True)


def _parameters(frame: pl.DataFrame) -> pl.DataFrame:
    """One row per different parameters of hit-rate rows: parameters, segment_length, is_shared."""
    texts = frame["parameters"].unique().to_list()
    parsed = [json.loads(text or "{}") for text in texts]
    rows = [
        (text, item.get("segment_length"), bool(item.get("shared"))) for text, item in zip(texts, parsed, strict=True)
    ]
    schema = {"parameters": pl.String, "segment_length": pl.Int64, "is_shared": pl.Boolean}
    return pl.DataFrame(rows, schema=schema, orient="row")
