"""Sums per sequence as estimates with intervals, in plain JSON; no torch."""

from __future__ import annotations

from typing import Any

import polars as pl

from profiler.metrics.divergence import mean_of_items
from profiler.metrics.perplexity import Estimate
from store.evaluations import number_or_none


def compared(base: pl.DataFrame, found: pl.DataFrame) -> dict[str, Any]:
    """Loss, its change, KL, agreement and accuracy of a reading beside the base's, over all text and per domain."""
    parts = {}
    for name in base["domain"].unique(maintain_order=True).to_list():
        inside = (base["domain"] == name).to_numpy()
        if base["predictions"].to_numpy()[inside].sum():
            parts[name] = _figures(base.filter(inside), found.filter(inside))
    return {**_figures(base, found), "per_domain": parts}


def plain(found: Estimate) -> dict[str, float | None]:
    """An estimate as JSON."""
    return {name: number_or_none(getattr(found, name)) for name in ("value", "low", "high")}


def _figures(base: pl.DataFrame, found: pl.DataFrame) -> dict[str, Any]:
    items = base["predictions"].to_numpy()

    def mean(sums: pl.Series) -> dict[str, float | None]:
        return plain(mean_of_items(sums=sums.to_numpy(), items=items))

    return {
        "tokens": int(items.sum()),
        "loss": mean(found["loss_sum"]),
        "change": mean(found["loss_sum"] - base["loss_sum"]),
        "kl": None if found["kl_sum"].null_count() else mean(found["kl_sum"]),
        "agreement": mean(found["agreed"]),
        "accuracy": mean(found["right"]),
        "base_accuracy": mean(base["right"]),
    }
