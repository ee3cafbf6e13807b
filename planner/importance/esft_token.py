"""ESFT's token ratio: the expert's part of the layer's selections."""

from __future__ import annotations

import polars as pl

from planner.importance.expressions import layer_share
from planner.importance.statistics import EXPERT, Statistics


def esft_token(statistics: Statistics) -> pl.DataFrame:
    """Selections over k and tokens, which is the share of the layer's selections (arXiv 2407.01906)."""
    return statistics.experts("expert_load", "tokens").select(*EXPERT, value=layer_share("tokens"))
