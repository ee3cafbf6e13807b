"""Expressions that several scores share."""

from __future__ import annotations

import polars as pl


def mean(total: str, count: str = "tokens") -> pl.Expr:
    """A sum over the tokens behind it; 0 where there is none."""
    return pl.when(pl.col(count) > 0).then(pl.col(total) / pl.col(count)).otherwise(0.0)


def layer_share(value: str) -> pl.Expr:
    """A value over the sum of its layer; 0 in a layer whose sum is 0."""
    total = pl.col(value).sum().over("layer", "step")
    return pl.when(total > 0).then(pl.col(value) / total).otherwise(0.0)
