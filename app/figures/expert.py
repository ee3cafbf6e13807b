"""Figures of one expert: its place among the layer's, its share of each domain, its rank by every score."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
import polars as pl

from app.figures.interval import whiskers
from app.figures.style import Theme, fade, layout, message, palette, pickable, rows_height, safe


def layer_strip(frame: pl.DataFrame, *, title: str, layer: str, expert: int, theme: Theme = "light") -> go.Figure:
    """One bar per expert of a layer: its load over that of a balanced router; a click picks the expert.

    frame: ``app.frames.expert.of_layer``. layer: its label. expert: the one that is shown.
    """
    if frame.is_empty() or not frame["tokens"].sum():
        return message("Nothing was counted in this layer.", title=title, theme=theme, height=130)
    colours = palette(theme)
    mine = (frame["expert"] == expert).to_list()
    figure = go.Figure(
        go.Bar(
            x=frame["expert"], y=frame["relative"], customdata=frame.select("tokens", "place").to_numpy(),
            marker={"color": [colours.categorical[1] if one else fade(colours.accent, 0.75) for one in mine]},
            hovertemplate="expert %{x}<br>%{y:.2f} × a balanced router's load<br>%{customdata[0]:,} tokens, place "
            f"%{{customdata[1]}} of {len(frame)}<extra></extra>",
        )
    )  # fmt: skip
    figure.add_hline(y=1.0, line={"color": colours.muted, "dash": "dot", "width": 1})
    layout(figure, title=title, x="", y="", theme=theme, height=150, legend=False, bargap=0.12,
           margin={"l": 8, "r": 12, "t": 36, "b": 4})  # fmt: skip
    figure.update_xaxes(range=[-0.5, len(frame) - 0.5], showgrid=False, nticks=24)
    figure.update_yaxes(rangemode="tozero", nticks=4, ticksuffix=" ×")
    return pickable(figure, layer=f"={layer}", expert="x")


def domain_shares(frame: pl.DataFrame, *, title: str, theme: Theme = "light") -> go.Figure:
    """Share of each domain's tokens that use the expert, beside an even router and the expert's share of all text.

    frame: ``app.frames.expert.domain_load``.
    """
    if frame.is_empty():
        return message("Nothing was counted in this layer.", title=title, theme=theme)
    colours = palette(theme)
    shown = frame.head(24).reverse()
    names = [safe(name, 24) for name in shown["domain"]]
    error: dict[str, Any] = {"visible": False}
    if shown["low"].drop_nulls().len():
        error = whiskers(shown["share"], shown["low"], shown["high"], colour=colours.text)
    figure = go.Figure(
        go.Bar(
            x=shown["share"], y=names, orientation="h", name="share of the domain's tokens", error_x=error,
            customdata=shown.select("selections", "tokens", "ratio").to_numpy(), marker={"color": colours.accent},
            showlegend=False,
            hovertemplate="%{y}<br>%{x:.2%} of %{customdata[1]:,} tokens<br>%{customdata[2]:.2f} times its share of "
            "all text<extra></extra>",
        )
    )  # fmt: skip
    for column, name, dash in (("even", "an even router", "dot"), ("pooled", "its share of all text", "dash")):
        figure.add_scatter(
            x=[shown[column][0]] * 2, y=[names[0], names[-1]], mode="lines", name=name, hoverinfo="name",
            line={"color": colours.muted, "dash": dash, "width": 1.5},
        )  # fmt: skip
    layout(
        figure, title=title, x="share of the domain's tokens", y="", theme=theme,
        height=rows_height(len(shown), each=28, least=240), bargap=0.35,
    )  # fmt: skip
    figure.update_xaxes(tickformat=".0%", rangemode="tozero")
    figure.update_yaxes(type="category", showgrid=False)
    return figure


def importance_ranks(frame: pl.DataFrame, *, title: str, theme: Theme = "light") -> go.Figure:
    """The expert's place among its layer's experts by every score, the most important ones at the left.

    frame: ``app.frames.expert.importance_of``.
    """
    if frame.is_empty():
        return message("This run gives no score of importance.", title=title, theme=theme)
    colours = palette(theme)
    shown = frame.reverse()
    last = int(shown["of"].max())  # type: ignore[arg-type]
    figure = go.Figure(
        go.Scatter(
            x=shown["rank"], y=[safe(name, 32) for name in shown["title"]], mode="markers",
            marker={"size": 10, "color": colours.accent}, customdata=shown.select("value", "of", "unit").to_numpy(),
            hovertemplate="%{y}<br>rank %{x} of %{customdata[1]}<br>%{customdata[0]:.4g} %{customdata[2]}"
            "<extra></extra>",
        )
    )  # fmt: skip
    figure.add_vline(x=(last + 1) / 2, line={"color": colours.muted, "dash": "dot", "width": 1.5})
    layout(
        figure, title=title, x=f"rank in the layer (1 = most important, {last} = least)", y="", theme=theme,
        height=rows_height(len(shown), each=24, least=280), legend=False,
    )  # fmt: skip
    figure.update_xaxes(range=[0.5, last + 0.5])
    figure.update_yaxes(type="category")
    return figure
