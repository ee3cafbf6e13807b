"""Load: how often each expert was used, and how evenly."""

from __future__ import annotations

import numpy as np
import polars as pl

import store
from app.frames.axes import layer_grid, layer_label, select
from profiler.metrics import load as formulas
from profiler.metrics.coverage import STARVED

NEARLY_DEAD = 0.05
"""An expert with less than this part of the balanced load counts as nearly dead."""

BALANCE = {
    "layer": pl.Int32,
    "step": pl.Int32,
    "label": pl.String,
    "num_experts": pl.Int32,
    "top_k": pl.Int32,
    "tokens": pl.Float64,
    "normalised_entropy": pl.Float64,
    "effective_experts": pl.Float64,
    "gini": pl.Float64,
    "cv": pl.Float64,
    "noise_cv": pl.Float64,
    "max_violation": pl.Float64,
    "dead": pl.Int64,
    "nearly_dead": pl.Int64,
    "zero_probability": pl.Float64,
    "expected_dead": pl.Float64,
}


def expert_load(
    run: store.Run, *, domain: str | None = None, phase: str | None = None, layer: store.LayerInfo | None = None
) -> pl.DataFrame:
    """One row per routed expert of every MoE layer, or of one, unused ones included.

    Columns: layer, step, label, expert, num_experts, top_k; tokens that used the expert; first_choices; gate_sum;
    share of the layer's selections (0..1); relative = share x num_experts (1 = the uniform share); gate_share of the
    layer's gate mass (0..1). Shares are null for a layer without load.
    """
    table = run.table("expert_load", layer=None if layer is None else layer.layer)
    table = select(table, domain=domain, phase=phase).filter(pl.col("kind") == "routed")
    summed = table.group_by("layer", "step", "expert").agg(pl.col("tokens", "first_choices", "gate_sum").sum())
    grid = layer_grid(run.layers if layer is None else [layer])
    frame = grid.join(summed, on=["layer", "step", "expert"], how="left", maintain_order="left")
    frame = frame.with_columns(pl.col("tokens", "first_choices").fill_null(0), pl.col("gate_sum").fill_null(0.0))
    share = _share("tokens")
    return frame.with_columns(
        share.alias("share"), (share * pl.col("num_experts")).alias("relative"), _share("gate_sum").alias("gate_share")
    )


def balance(run: store.Run, *, domain: str | None = None, phase: str | None = None) -> pl.DataFrame:
    """One row per MoE layer: every measure of evenness (``profiler.metrics.load``), and dead experts.

    tokens is what the layer routed; noise_cv is the cv that a balanced router shows on so few tokens by chance;
    zero_probability is the chance that a balanced router leaves one given expert unused, expected_dead how many of all.
    """
    frame = expert_load(run, domain=domain, phase=phase)
    routed = _routed(run, domain=domain, phase=phase)
    rows = []
    for layer in run.layers:
        place = (layer.layer, layer.step)
        part = frame.filter((pl.col("layer") == layer.layer) & (pl.col("step") == layer.step))
        counts = part["tokens"].to_numpy()[None, :]
        tokens = routed.get(place, float(counts.sum()) / max(layer.top_k, 1))
        rows.append(
            (*place, layer_label(*place), layer.num_experts, layer.top_k, tokens, *_measure(layer, counts, tokens))
        )
    return pl.DataFrame(rows, schema=BALANCE, orient="row").fill_nan(None)


def shared_load(run: store.Run) -> pl.DataFrame:
    """One row per shared expert, which every token uses: layer, step, expert, tokens."""
    table = run.table("expert_load").filter(pl.col("kind") == "shared")
    return table.group_by("layer", "step", "expert").agg(pl.col("tokens").sum()).sort("layer", "step", "expert")


def coverage(run: store.Run, *, domain: str | None = None, starved: float = STARVED) -> pl.DataFrame:
    """Whether the text reaches every expert: one row per MoE layer.

    Columns: layer, step, label, num_experts; fewest, p10, median, p90, most tokens per expert; balanced = the tokens
    per expert of a balanced router; starved = experts with less than ``starved`` times that; threshold in tokens.
    """
    frame = expert_load(run, domain=domain)
    tokens = pl.col("tokens")
    grouped = frame.group_by("layer", "step", "label", maintain_order=True).agg(
        pl.col("num_experts").first(),
        tokens.min().alias("fewest"),
        tokens.quantile(0.1, "linear").alias("p10"),
        tokens.median().alias("median"),
        tokens.quantile(0.9, "linear").alias("p90"),
        tokens.max().alias("most"),
        tokens.mean().alias("balanced"),
        (tokens < starved * tokens.mean()).sum().cast(pl.Int64).alias("starved"),
    )
    return grouped.with_columns((pl.col("balanced") * starved).alias("threshold"))


def _share(column: str) -> pl.Expr:
    total = pl.col(column).sum().over("layer", "step")
    return pl.when(total > 0).then(pl.col(column) / total)


def _routed(run: store.Run, *, domain: str | None, phase: str | None) -> dict[tuple[int, int], float]:
    """Tokens that each MoE layer routed."""
    table = select(run.table("router_load"), domain=domain, phase=phase)
    summed = table.group_by("layer", "step").agg(pl.col("tokens").sum())
    return {(layer, step): float(tokens) for layer, step, tokens in summed.iter_rows()}


def _measure(layer: store.LayerInfo, counts: np.ndarray, tokens: float) -> tuple[float, ...]:
    """The columns of ``BALANCE`` from normalised_entropy on, for counts (1, experts)."""
    if not counts.size or not counts.sum():
        return (float("nan"),) * 6 + (0, 0, 1.0, 0.0)
    even = formulas.balance(load=counts)
    dead = formulas.dead_experts(counts=counts, top_k=layer.top_k, tokens=tokens, threshold=NEARLY_DEAD)
    noise = formulas.noise_cv(num_experts=layer.num_experts, top_k=layer.top_k, tokens=max(tokens, 1.0))
    unused = int(dead.dead.sum())
    return (
        float(even.normalised_entropy[0]),
        float(even.effective_experts[0]),
        float(even.gini[0]),
        float(even.cv[0]),
        float(noise),
        float(even.max_violation[0]),
        unused,
        int(dead.nearly_dead.sum()) - unused,
        float(dead.zero_probability[0]),
        float(dead.expected_dead[0]),
    )
