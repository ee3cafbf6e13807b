"""Figures of one sequence: which experts its tokens used in one layer, and a measure along its text."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import polars as pl

from app.figures.style import Theme, colorbar, fade, layout, message, palette, pickable, rows_height, scale
from app.frames.token_measure import Measure

WINDOW = 33
"""Tokens of the moving mean."""


def routing_map(
    frame: pl.DataFrame, *, layer: str, num_experts: int, sequence: int | None = None, theme: Theme = "light"
) -> go.Figure:
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
    return pickable(figure, token="x", expert="y", layer=f"={layer}", **_of(sequence))


def measure_curve(
    frame: pl.DataFrame, measure: Measure, *, sequence: int | None = None, theme: Theme = "light"
) -> go.Figure:
    """A measure along the text, token by token and as a moving mean. frame: position, value (null = not known)."""
    title = f"{measure.label[:1].upper()}{measure.label[1:]}, along the text"
    known = frame.drop_nulls("value").sort("position")
    if known.is_empty():
        return message("It is not known for any token of this part.", title=title, theme=theme)
    colours = palette(theme)
    mean = known["value"].rolling_mean(WINDOW, min_samples=1, center=True)
    position, percent = known["position"].to_numpy(), measure.unit == "%"
    shape, factor = (".1f", 100.0) if percent else (".4g", 1.0)
    tail = f" {measure.unit}" if measure.unit else ""
    figure = go.Figure()
    figure.add_bar(
        x=position,
        y=known["value"].to_numpy() * factor,
        width=1.0,
        name="token",
        marker={"color": fade(colours.accent, 0.45), "line": {"width": 0}},
        hovertemplate=f"position %{{x}}: %{{y:{shape}}}{tail}<extra></extra>",
    )
    figure.add_scatter(
        x=position,
        y=mean.to_numpy() * factor,
        mode="lines",
        name=f"mean of {WINDOW} tokens",
        line={"color": colours.text, "width": 1.5},
        hovertemplate=f"mean around position %{{x}}: %{{y:{shape}}}{tail}<extra></extra>",
    )
    unit = f" ({measure.unit})" if measure.unit else ""
    layout(
        figure,
        title=title,
        x="position in the sequence (tokens)",
        y=measure.label.split(",")[0] + unit,
        theme=theme,
        height=300,
        bargap=0.0,
    )
    figure.update_xaxes(showgrid=False, zeroline=False)
    return pickable(figure, token="x", **_of(sequence))


def _of(sequence: int | None) -> dict[str, str]:
    return {} if sequence is None else {"sequence": f"={sequence}"}
