"""Specialization over the layers beside its controls, and SRP against it."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
import polars as pl

from app.figures.style import Theme, fade, layout, message, palette, scale

_CONTROLS = {
    "shuffled_in_sequence": ("shuffled inside each sequence", "dash"),
    "shuffled": ("shuffled over all text", "dot"),
    "uniform": ("uniformly random experts", "dashdot"),
}


def layer_curve(frame: pl.DataFrame, *, title: str, y: str, theme: Theme = "light") -> go.Figure:
    """One figure of specialization over the layers, with its interval and the controls that there are.

    frame: rows of one kind, metric and abscissa of ``app.frames.specialization.specialization``.
    """
    shown = frame.drop_nulls("layer")
    if shown.is_empty():
        return message("This run says nothing of it.", title=title, theme=theme)
    colours, x = palette(theme), shown["label"].to_list()
    figure = go.Figure()
    if shown["low"].drop_nulls().len():
        line: dict[str, Any] = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
        figure.add_scatter(x=x, y=shown["high"], **line)
        figure.add_scatter(x=x, y=shown["low"], fill="tonexty", fillcolor=fade(colours.accent, 0.18), **line)
    figure.add_scatter(
        x=x, y=shown["value"], mode="lines+markers", name="the text as it is",
        customdata=shown.select("low", "high").to_numpy(), line={"color": colours.accent, "width": 2},
        hovertemplate="layer %{x}<br>%{y:.3f} (%{customdata[0]:.3f} to %{customdata[1]:.3f})<extra></extra>",
    )  # fmt: skip
    for column, (name, dash) in _CONTROLS.items():
        if shown[column].drop_nulls().len():
            figure.add_scatter(
                x=x, y=shown[column], mode="lines", name=name, hovertemplate="layer %{x}<br>%{y:.3f}",
                line={"color": colours.muted, "dash": dash, "width": 1.5},
            )  # fmt: skip
    layout(figure, title=title, x="layer", y=y, theme=theme, height=360, wide=False)
    figure.update_xaxes(type="category", showgrid=False, nticks=24)
    figure.update_yaxes(rangemode="tozero")
    return figure


def srp_scatter(frame: pl.DataFrame, *, title: str, x: str, theme: Theme = "light") -> go.Figure:
    """SRP of every expert against its specialization, by layer. frame: ``app.frames.specialization.experts``."""
    if frame.is_empty():
        return message("No expert has both figures.", title=title, theme=theme)
    colours = palette(theme)
    points = go.Scattergl if len(frame) > 2000 else go.Scatter
    first, last = int(frame["layer"].min()), int(frame["layer"].max())  # type: ignore[arg-type]
    figure = go.Figure(
        points(
            x=frame["specialization"], y=frame["srp"], mode="markers",
            customdata=list(zip(frame["label"], frame["expert"], strict=True)),
            hovertemplate="layer %{customdata[0]}, expert %{customdata[1]}<br>specialization %{x:.3f}<br>SRP %{y:.1%}"
            "<extra></extra>",
            marker={
                "size": 6, "opacity": 0.75, "color": frame["layer"].to_numpy(), "showscale": True,
                "colorscale": scale(colours.sequential[2:]), "cmin": first, "cmax": max(last, first + 1),
                "colorbar": {"title": {"text": "layer", "side": "right"}, "thickness": 12, "outlinewidth": 0},
            },
        )
    )  # fmt: skip
    layout(figure, title=title, x=x, y="SRP (0 to 1)", theme=theme, height=360, legend=False, wide=False)
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return figure
