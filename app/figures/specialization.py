"""Specialization over the layers beside its controls, and SRP against it."""

from __future__ import annotations

import plotly.graph_objects as go
import polars as pl

from app.figures.experts import expert_points
from app.figures.layers import curve, over_layers
from app.figures.style import Theme, layout, message, palette

_CONTROLS = {
    "shuffled_in_sequence": ("shuffled in sequences", "dash"),
    "shuffled": ("shuffled over all text", "dot"),
    "uniform": ("random experts", "dashdot"),
}


def layer_curve(frame: pl.DataFrame, *, title: str, y: str, theme: Theme = "light") -> go.Figure:
    """One figure of specialization over the layers, with its interval and the controls that there are.

    frame: rows of one kind, metric and abscissa of ``app.frames.specialization.specialization``.
    """
    shown = frame.drop_nulls("layer")
    if shown.is_empty():
        return message("This run says nothing of it.", title=title, theme=theme)
    colours = palette(theme)
    figure = go.Figure()
    curve(
        figure, shown, "value", name="the text as it is", colour=colours.accent,
        customdata=shown.select("low", "high").to_numpy(),
        hover="layer %{x}<br>%{y:.3f} (%{customdata[0]:.3f} to %{customdata[1]:.3f})",
    )  # fmt: skip
    for column, (name, dash) in _CONTROLS.items():
        if shown[column].drop_nulls().len():
            control = shown.select("label", column)
            hover = f"layer %{{x}}<br>{name}: %{{y:.3f}}"
            curve(
                figure, control, column, name=name, colour=colours.muted, dash=dash, width=1.5, markers=False,
                hover=hover,
            )  # fmt: skip
    layout(figure, title=title, x="layer", y=y, theme=theme, height=400, wide=False)
    return over_layers(figure)


def srp_scatter(frame: pl.DataFrame, *, title: str, x: str, theme: Theme = "light") -> go.Figure:
    """SRP of every expert against its specialization, by layer. frame: ``app.frames.specialization.experts``."""
    if frame.is_empty():
        return message("No expert has both figures.", title=title, theme=theme)
    hover = "specialization %{x:.3f}<br>SRP %{y:.1%}"
    figure = expert_points(frame, x="specialization", y="srp", hover=hover, theme=theme)
    layout(figure, title=title, x=x, y="SRP", theme=theme, height=400, legend=False, wide=False)
    return figure.update_yaxes(tickformat=".0%", rangemode="tozero")
