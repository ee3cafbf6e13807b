"""Router rows: do they differ from random vectors?"""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

import store
from app.frames.axes import LAYER_COLUMNS, layer_label
from app.frames.expert_trace import layer_info
from profiler.metrics.router_rows import RouterRows, chance_density, router_rows

BINS = 40
_SPREADS = {
    **LAYER_COLUMNS, "size": pl.Int64, "experts": pl.Int64, "mean": pl.Float64, "spread": pl.Float64,
    "norm_cv": pl.Float64, "chance_norm_cv": pl.Float64, "largest": pl.Float64, "chance_largest": pl.Float64,
    "near_copies": pl.Int64,
}  # fmt: skip
_COSINES = {"lower": pl.Float64, "upper": pl.Float64, "pairs": pl.Int64, "by_chance": pl.Float64}


def spreads(run: store.Run) -> pl.DataFrame:
    """One row per MoE layer whose router's rows are known: what ``profiler.metrics.router_rows`` says of them.

    Columns: layer, step, label, size = channels d, experts; mean and spread of the cosines (0 and 1 by chance),
    norm_cv and chance_norm_cv, largest and chance_largest cosine, near_copies = pairs of rows that are nearly one.
    """
    found = []
    for layer in run.layers:
        rows = _rows(run, layer)
        if rows is not None:
            said = router_rows(rows=rows)
            found.append(
                (layer.layer, layer.step, layer_label(layer.layer, layer.step), rows.shape[1], len(rows), said.mean,
                 said.spread, said.norm_cv, said.chance_norm_cv, said.largest, said.chance_largest, said.near_copies)
            )  # fmt: skip
    return pl.DataFrame(found, schema=_SPREADS, orient="row").fill_nan(None)


def cosines(run: store.Run, *, label: str) -> pl.DataFrame:
    """Histogram of the cosines of every two router rows of a layer: lower, upper, pairs, by_chance = of random rows."""
    rows = _rows(run, layer_info(run, label))
    if rows is None:
        return pl.DataFrame(schema=_COSINES)
    said: RouterRows = router_rows(rows=rows)
    reach = 4.0 / np.sqrt(rows.shape[1])
    low = max(min(float(said.cosines.min(initial=0.0)), -reach), -1.0)
    high = min(max(float(said.cosines.max(initial=0.0)), reach), 1.0)
    edges = np.linspace(low, high, BINS + 1)
    pairs, _ = np.histogram(np.clip(said.cosines, low, high), bins=edges)
    middle = (edges[:-1] + edges[1:]) / 2.0
    chance = chance_density(cosine=middle, size=rows.shape[1]) * np.diff(edges) * len(said.cosines)
    columns = {"lower": edges[:-1], "upper": edges[1:], "pairs": pairs, "by_chance": chance}
    return pl.DataFrame(columns, schema=_COSINES)


def _rows(run: store.Run, layer: store.LayerInfo) -> NDArray[np.float64] | None:
    table = run.table("router_row", layer=layer.layer, columns=["weights"])
    table = table.filter(pl.col("step") == layer.step).drop_nulls("weights").sort("expert")
    if len(table) < 2 or table["weights"].list.len().n_unique() != 1:
        return None
    rows = np.array(table["weights"].to_list(), dtype=np.float64)
    return rows if np.isfinite(rows).all() else None
