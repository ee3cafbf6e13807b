"""A run at a glance: key figures, self-checks, and what to look at next."""

from __future__ import annotations

import polars as pl

import store
from app.frames.consistency import srp_model
from app.frames.load import balance
from app.frames.super_experts import super_experts, thresholds

STATUS_ORDER = ["fail", "warning", "skipped", "pass"]


def key_figures(run: store.Run) -> pl.DataFrame:
    """One row per figure: figure, value (text), detail. The same rows in the same order for every run."""
    info, layers = run.info, run.layers
    experts = _range([layer.num_experts for layer in layers])
    top_k = _range([layer.top_k for layer in layers])
    shared = _range([layer.num_shared for layer in layers])
    steps = len({layer.layer for layer in layers})
    imported = info.origin.startswith("import")
    rate = f"{info.tokens / info.seconds:,.0f} tokens/s while watching" if info.seconds and not imported else ""
    rows = [
        ("tokens", f"{info.tokens:,}", rate),
        ("sequences", f"{info.sequences:,}", f"{len(run.domains)} domains"),
        ("MoE layers", str(steps), f"of {info.num_layers} decoder layers" if info.num_layers else ""),
        ("experts per layer", experts, f"and {shared} shared" if shared not in ("0", "–") else ""),
        ("experts per token", top_k, "top-k"),
        ("model", info.model, info.model_class),
        ("type of weights", info.dtype or "–", f"on {info.device}" if info.device else ""),
        ("experts backend", info.backend or "–", ""),
        ("recorded", info.levels.replace(",", ", "), f"origin: {info.origin}"),
        ("text", "kept" if info.text_kept else "not kept", ""),
        _complete(run),
    ]
    return pl.DataFrame(rows, schema=["figure", "value", "detail"], orient="row")


def checks(run: store.Run) -> pl.DataFrame:
    """The run's self-checks, failures first: status, name, layer, step, value, tolerance, detail."""
    table = run.table("check")
    order = pl.col("status").replace_strict(
        {name: i for i, name in enumerate(STATUS_ORDER)}, default=9, return_dtype=pl.Int8
    )
    return (
        table.with_columns(order.alias("order"))
        .sort(["order", "name", "layer"], nulls_last=True)
        .select("status", "name", "layer", "step", "value", "tolerance", "detail")
    )


def check_summary(run: store.Run) -> pl.DataFrame:
    """One row per check and status: status, name, places (how many rows); of the worst: value, tolerance, detail."""
    frame = checks(run)
    return frame.group_by("status", "name", maintain_order=True).agg(
        pl.len().cast(pl.Int64).alias("places"),
        pl.col("value").max(),
        pl.col("tolerance").max(),
        pl.col("detail").sort_by("value", descending=True, nulls_last=True).first(),
    )


def next_steps(run: store.Run) -> pl.DataFrame:
    """What to look at next, most useful first: page, reason."""
    rows: list[tuple[str, str]] = []
    if run.badge.status == "invalid":
        rows.append(("Overview", "The capture failed a check: read the table of checks before any other page."))
    even = balance(run).drop_nulls("max_violation")
    if len(even):
        worst = even.sort("max_violation", descending=True)["label"][0]
        rows.append(("Routing", f"Which experts fire; layer {worst} is the least even."))
    if run.info.text_kept:
        rows.append(("Tokens", "The text, coloured by the expert of each token."))
    if len(even):
        rows.append(("Expert", "One expert: its tokens, domains, neighbours."))
    rows += _super_expert_step(run) + _consistency_step(run)
    if not run.live and run.has_trace and "order" not in run.omissions:
        rows.append(("Cache", "Whether caching experts pays on a machine."))
    if len(even) and not run.live:
        rows.append(("Compress", "What to cut for a budget, and its cost."))
    if run.has_trace and not run.live:
        rows.append(("What-if routing", "Fewer or other experts per token, without training."))
    return pl.DataFrame(rows, schema=["page", "reason"], orient="row")


def _super_expert_step(run: store.Run) -> list[tuple[str, str]]:
    if "outputs" in run.omissions:
        return []
    if "activations" not in run.info.levels:
        return [("Super experts", "Not recorded: collect with --level routing,activations to find super experts.")]
    if thresholds(run).is_empty():
        return [("Super experts", "The page shows the largest outputs; the verdict comes when the run is finished.")]
    found = super_experts(run).filter((pl.col("rule") == "paper") & (pl.col("tokens") == "all"))
    if found.is_empty():
        return [("Super experts", "How far the largest outputs are from the rules.")]
    return [("Super experts", f"{len(found)} found: protect them in every plan.")]


def _consistency_step(run: store.Run) -> list[tuple[str, str]]:
    if srp_model(run).is_empty():
        return []
    return [("Local consistency", "Neighbouring tokens, beside 20 models.")]


def omissions(run: store.Run) -> pl.DataFrame:
    """What an imported run cannot say: subject, reason; empty for a model that was watched."""
    return pl.DataFrame(list(run.omissions.items()), schema={"subject": pl.String, "reason": pl.String}, orient="row")


def _complete(run: store.Run) -> tuple[str, str, str]:
    if run.live:
        return ("complete", "not yet", "")
    return ("complete", "yes", "") if run.info.complete else ("complete", "no", "the collection ended early")


def _range(values: list[int]) -> str:
    if not values:
        return "–"
    return str(values[0]) if min(values) == max(values) else f"{min(values)}–{max(values)}"
