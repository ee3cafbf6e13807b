"""Room to cut: layers x domains, and layers x parts of the width."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import polars as pl

from app.figures.style import Theme, colorbar, layout, message, palette, pickable, rows_height, safe, scale

_PARTS = {"quarter": "strongest 25 %", "half": "strongest 50 %", "most": "strongest 75 %"}


def influence(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """How far the routed experts of each layer turn the residual stream, by domain.

    frame: ``app.frames.room.depth``.
    """
    title = "Influence of each layer's experts"
    known = frame.filter(pl.col("moe_influence").is_not_null())
    if known.is_empty():
        return message("This run has no residual stream: it takes level activations.", title=title, theme=theme)
    table = known.pivot("domain", index="label", values="moe_influence")
    return _map(
        table, title=title, x="domain", unit="1 - cosine", theme=theme,
        hover="layer %{y}, %{x}<br>1 - cosine %{z:.4g}<extra></extra>",
    )  # fmt: skip


def width(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """What part of each layer's width score its strongest neurons hold, mean over domains.

    frame: ``app.frames.room.width``.
    """
    title = "How much of a layer its strongest neurons hold"
    if frame.is_empty():
        return message("This run has no sums per neuron: it takes level activations.", title=title, theme=theme)
    means = frame.group_by("label", maintain_order=True).agg(pl.col(list(_PARTS)).mean()).rename(_PARTS)
    return _map(
        means, title=title, x="neurons of the layer", unit="part of the score", theme=theme, most=1.0,
        hover="layer %{y}, %{x}<br>hold %{z:.1%} of the width score<extra></extra>",
    )  # fmt: skip


def _map(
    table: pl.DataFrame, *, title: str, x: str, unit: str, hover: str, theme: Theme, most: float | None = None
) -> go.Figure:
    """A map with one row per label; the other columns are its values."""
    columns = table.columns[1:]
    cells = table.select(columns).to_numpy().astype(np.float32)
    heat = go.Heatmap(
        z=cells, x=[safe(name) for name in columns], y=table["label"].to_list(), zmin=0.0, zmax=most,
        colorscale=scale(palette(theme).sequential), colorbar=colorbar(unit), hoverongaps=False, hovertemplate=hover,
    )  # fmt: skip
    figure = go.Figure(heat)
    layout(figure, title=title, x=x, y="layer", theme=theme, height=rows_height(len(table)), legend=False)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False, nticks=24, ticks="")
    figure.update_xaxes(type="category", showgrid=False, ticks="")
    return pickable(figure, layer="y")
