"""Figures of one sequence: which experts its tokens used in one layer."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import polars as pl

from app.figures.style import Theme, colorbar, layout, message, palette, rows_height, scale


def routing_map(frame: pl.DataFrame, *, layer: str, num_experts: int, theme: Theme = "light") -> go.Figure:
    """Experts x positions of one layer, coloured by gate weight. frame: ``app.frames.tokens.token_routes``."""
    title = f"Experts of layer {layer} along the text"
    part = frame.filter(pl.col("label") == layer)
    if part.is_empty():
        return message("No selections recorded for this sequence.", title=title, theme=theme)
    start = int(part["position"].min())  # type: ignore[arg-type]
    cells = np.full((num_experts, int(part["position"].max()) - start + 1), np.nan, np.float32)  # type: ignore[arg-type]
    cells[part["expert"].to_numpy(), part["position"].to_numpy() - start] = part["weight"].to_numpy()
    figure = go.Figure(
        go.Heatmap(
            z=cells,
            x0=start,
            dx=1,
            colorscale=scale(palette(theme).sequential[2:]),
            zmin=0.0,
            hoverongaps=False,
            colorbar=colorbar("gate weight"),
            hovertemplate="position %{x}<br>expert %{y}<br>gate weight %{z:.3f}<extra></extra>",
        )
    )
    layout(
        figure,
        title=title,
        x="position in the sequence (tokens)",
        y="expert",
        theme=theme,
        height=rows_height(num_experts, each=7, least=300, most=620),
        legend=False,
    )
    figure.update_yaxes(autorange="reversed", showgrid=False, zeroline=False)
    figure.update_xaxes(showgrid=False, zeroline=False)
    return figure
