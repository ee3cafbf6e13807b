"""DERN-style importance: the expert's share of each token's gate weights."""

from __future__ import annotations

import polars as pl

from planner.importance.statistics import EXPERT, Statistics


def dern(statistics: Statistics) -> pl.DataFrame:
    """Gate weights divided by their sum over the token's selection, per token of the text.

    Written from the description of DERN (EMNLP Findings 2025); no code of it was found, hence "DERN-style".
    """
    load = statistics.experts("expert_load", "gate_share_sum").join(statistics.tokens(), on=["layer", "step"])
    return load.select(*EXPERT, value=pl.col("gate_share_sum") / pl.col("tokens"))
