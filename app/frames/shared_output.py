"""Shared against routed experts: how large what each adds to the residual stream is."""

from __future__ import annotations

import polars as pl

import store
from app.frames.axes import select, with_label
from profiler.metrics import shared_output as formulas

_KEYS = ["layer", "step"]


def norms(run: store.Run, *, domain: str | None = None) -> pl.DataFrame:
    """One row per MoE layer with shared experts and domain: root mean squares of the norms.

    Columns: layer, step, label, domain (null: all text); shared = of gate x output of the shared experts, routed = of
    the routed experts' weighted sum; ratio = shared / routed; experts = shared ones that are modules of their own;
    tokens. Empty where the run does not hold the outputs of shared experts.
    """
    parts = [_of(run, domain)]
    if domain is None and len(run.domains) > 1:
        parts += [_of(run, one) for one in run.domains]
    return pl.concat(parts)


def _of(run: store.Run, domain: str | None) -> pl.DataFrame:
    outputs = select(run.table("expert_output"), domain=domain).filter(pl.col("kind") == "shared")
    shared = outputs.group_by(_KEYS).agg(pl.col("gated_norm_square_sum").sum(), pl.col("expert").n_unique())
    sums = pl.col("output_square_sum", "tokens").sum()
    routed = select(run.table("moe_output"), domain=domain).group_by(_KEYS).agg(sums)
    both = with_label(shared.join(routed, on=_KEYS).sort(_KEYS))
    square, other, tokens = (both[name].to_numpy() for name in ("gated_norm_square_sum", "output_square_sum", "tokens"))
    return (
        both.select(*_KEYS, "label")
        .with_columns(
            pl.lit(domain, pl.String).alias("domain"),
            pl.Series("shared", formulas.root_mean_square(square_sum=square, tokens=tokens)),
            pl.Series("routed", formulas.root_mean_square(square_sum=other, tokens=tokens)),
            pl.Series("ratio", formulas.shared_ratio(shared_square_sum=square, routed_square_sum=other)),
            both["expert"].cast(pl.Int64).alias("experts"),
            both["tokens"].cast(pl.Int64),
        )
        .fill_nan(None)
    )
