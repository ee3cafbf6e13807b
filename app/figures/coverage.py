"""How alike two texts rank the experts, over their length."""

from __future__ import annotations

import math

import plotly.graph_objects as go
import polars as pl

from app.figures.interval import band
from app.figures.style import Theme, layout, log_ticks, message, palette


def convergence_curve(
    frame: pl.DataFrame, *, title: str, tokens: int, target: float, theme: Theme = "light"
) -> go.Figure:
    """Agreement of two independent texts over their length: measured, expected, by chance, and asked for.

    frame: ``app.frames.coverage.convergence`` of one score and goal. tokens: length of the run's text.
    """
    if frame.is_empty():
        return message("The run is too short to be halved.", title=title, theme=theme)
    colours = palette(theme)
    measured = frame.filter(pl.col("kind") == "measured").sort("tokens")
    expected = frame.filter(pl.col("kind") == "expected").sort("tokens")
    figure = go.Figure()
    band(
        figure, x=measured["tokens"], low=measured["low"], high=measured["high"], colour=colours.accent,
        name="95 % interval",
    )  # fmt: skip
    figure.add_scatter(
        x=measured["tokens"], y=measured["value"], customdata=measured.select("low", "high").to_numpy(),
        mode="lines+markers", name="two parts of this text", line={"color": colours.accent, "width": 2},
        marker={"size": 7},
        hovertemplate="two texts of %{x:,.0f} tokens<br>agree %{y:.3f}"
        "<br>95 % of choices %{customdata[0]:.3f} to %{customdata[1]:.3f}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=expected["tokens"], y=expected["value"], mode="lines", name="expected",
        line={"color": colours.accent, "width": 1.5, "dash": "dash"},
        hovertemplate="two texts of %{x:,.0f} tokens<br>expected to agree %{y:.3f}<extra></extra>",
    )  # fmt: skip
    ends = [expected["tokens"].min(), expected["tokens"].max()]
    chance = frame["chance"].drop_nulls()
    lines = [(target, "asked for", "dashdot", colours.categorical[2])]
    lines += [(chance[0], "by chance", "dot", colours.muted)] if len(chance) else []
    for value, name, dash, colour in lines:
        figure.add_scatter(
            x=ends, y=[value, value], mode="lines", name=name, line={"color": colour, "width": 1.5, "dash": dash},
            hovertemplate=f"{name} %{{y:.3f}}<extra></extra>",
        )  # fmt: skip
    figure.add_vline(x=tokens, line={"color": colours.muted, "width": 1})
    figure.add_annotation(
        x=math.log10(max(tokens, 1)), y=0.06, yref="paper", xanchor="left", xshift=4, text="this run",
        showarrow=False, font={"size": 11},
    )  # fmt: skip
    layout(figure, title=title, x="tokens of each text (log scale)", y="agreement", theme=theme, height=380)
    figure.update_xaxes(**log_ticks(expected["tokens"].to_list()))
    return figure
