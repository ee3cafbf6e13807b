"""ESFT's gate score: the expert's part of the layer's gate weights."""

from __future__ import annotations

import polars as pl

from planner.importance.expressions import layer_share
from planner.importance.statistics import EXPERT, Statistics


def esft_gate(statistics: Statistics) -> pl.DataFrame:
    """Mean gate weight per token, as a share of the layer (arXiv 2407.01906).

    :func:`~planner.importance.selection.smallest_set` then takes the experts that reach a given share.
    """
    return statistics.experts("expert_load", "gate_sum").select(*EXPERT, value=layer_share("gate_sum"))
