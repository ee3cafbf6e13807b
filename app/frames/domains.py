"""Domains: what the text is made of, and how much the router tells its kinds apart."""

from __future__ import annotations

import math

import polars as pl

import store
from app.frames.load import expert_load


def domain_tokens(run: store.Run) -> pl.DataFrame:
    """One row per domain, the largest first: domain, sequences, tokens, share of all tokens (0..1)."""
    table = run.table("sequence")
    grouped = table.group_by("domain").agg(
        pl.len().cast(pl.Int64).alias("sequences"), pl.col("tokens").cast(pl.Int64).sum()
    )
    return grouped.with_columns((pl.col("tokens") / pl.col("tokens").sum()).alias("share")).sort(
        ["tokens", "domain"], descending=[True, False]
    )


def domain_shares(run: store.Run, *, phase: str | None = None) -> pl.DataFrame:
    """One row per domain and routed expert: how the domain's load differs from the mean of the domains.

    Columns: layer, step, label, expert, domain, num_experts, tokens, share; pooled_share = mean of the domains' shares
    (every domain counts alike, whatever its size); difference = share - pooled_share; ratio = share / pooled_share. A
    layer that a domain never reached is left out.
    """
    parts = [
        expert_load(run, domain=domain, phase=phase).with_columns(pl.lit(domain).alias("domain"))
        for domain in run.domains
    ]
    columns = ["layer", "step", "label", "expert", "domain", "num_experts", "tokens", "share"]
    if not parts:
        empty = expert_load(run).with_columns(pl.lit("").alias("domain")).select(columns).head(0)
        return _against_pooled(empty)
    return _against_pooled(pl.concat(parts).select(columns).drop_nulls("share"))


def specialization(run: store.Run, *, phase: str | None = None) -> pl.DataFrame:
    """One row per MoE layer and domain: how far the domain's load lies from the mean of the domains.

    moved = half the sum of absolute differences of the shares: the part of the selections (0..1) that would have to
    move to another expert to turn the domain's load into the mean load. 0 = the router does not tell them apart. noise
    = what is expected of domains with the same load, if every selection were drawn for itself from the mean load.
    """
    frame = domain_shares(run, phase=phase)
    keys = ["layer", "step", "label"]
    pooled = pl.col("pooled_share")
    frame = frame.with_columns(pl.col("tokens").sum().over(*keys, "domain").alias("selections"))
    frame = frame.with_columns((pooled * (1 - pooled) / pl.col("selections")).alias("variance"))  # of one share
    count = pl.len().over(*keys, "expert")  # of domains
    others = pl.col("variance").sum().over(*keys, "expert") - pl.col("variance")
    variance = (1 - 1 / count) ** 2 * pl.col("variance") + others / count**2  # of share - pooled_share
    frame = frame.with_columns((variance * 2 / math.pi).sqrt().alias("by_chance"))
    return frame.group_by(*keys, "domain", maintain_order=True).agg(
        (pl.col("difference").abs().sum() / 2).alias("moved"),
        (pl.col("by_chance").sum() / 2).alias("noise"),
        pl.col("selections").first(),
    )


def farthest(run: store.Run, *, phase: str | None = None) -> pl.DataFrame:
    """One row per domain, the one that differs most first: domain, moved and noise, means over the layers."""
    means = specialization(run, phase=phase).group_by("domain").agg(pl.col("moved", "noise").mean())
    return means.sort(["moved", "domain"], descending=[True, False])


def _against_pooled(frame: pl.DataFrame) -> pl.DataFrame:
    pooled = pl.col("share").mean().over("layer", "step", "expert")
    ratio = pl.when(pooled > 0).then(pl.col("share") / pooled)
    return frame.with_columns(
        pooled.alias("pooled_share"), (pl.col("share") - pooled).alias("difference"), ratio.alias("ratio")
    )
