"""Figures of the ways to serve with one memory: times beside each other, and the best way by domain."""

from __future__ import annotations

import plotly.graph_objects as go
import polars as pl

from app.figures.interval import whiskers
from app.figures.style import Theme, fade, layout, message, palette, rows_height, safe

_KINDS = {True: "by the trace", False: "no trace"}
_OPAQUE = 0.75
"""Of bars: intervals are drawn over them."""


def ways(frame: pl.DataFrame, *, bound: float, theme: Theme = "light") -> go.Figure:
    """Milliseconds per token of every way, the fastest on top, with intervals, the bound and random experts.

    frame: ``app.frames.caching.ways``. bound: ms that nothing can beat.
    """
    title = "Ways to serve with this memory"
    if frame.is_empty():
        return message("No way was timed.", title=title, theme=theme)
    colours, figure = palette(theme), go.Figure()
    for needs, colour in ((True, colours.accent), (False, colours.categorical[1])):
        part = frame.filter(pl.col("needs_trace") == needs)
        if part.is_empty():
            continue
        words = [
            (safe(row["title"], 80), f"{row['low']:.3g} to {row['high']:.3g}", f"{row['hit_rate']:.1%}")
            for row in part.iter_rows(named=True)
        ]
        figure.add_bar(
            y=[safe(name) for name in part["short"]], x=part["ms"], orientation="h", name=_KINDS[needs],
            marker={"color": fade(colour, _OPAQUE)}, customdata=words,
            error_x=whiskers(part["ms"], part["low"], part["high"], colour=colours.text),
            hovertemplate="%{customdata[0]}<br>%{x:.3g} ms per token (95 %: %{customdata[1]})<br>hit rate "
            "%{customdata[2]}<extra></extra>",
        )  # fmt: skip
    chance = frame.filter(pl.col("chance_ms").is_not_null())
    if len(chance):
        figure.add_scatter(
            y=[safe(name) for name in chance["short"]], x=chance["chance_ms"], mode="markers",
            name="random experts", marker={"symbol": "diamond-open", "size": 9, "color": colours.text},
            hovertemplate="%{y}, on random experts<br>%{x:.3g} ms per token<extra></extra>",
        )  # fmt: skip
    figure.add_scatter(
        x=[bound] * len(frame), y=[safe(name) for name in frame["short"]], mode="lines", name="bound",
        line={"color": colours.categorical[4], "width": 1.5, "dash": "dot"},
        hovertemplate="bound<br>%{x:.3g} ms per token<extra></extra>",
    )  # fmt: skip
    layout(figure, title=title, x="ms per token", y="", theme=theme, bargap=0.35,
           wide=False, height=rows_height(len(frame) + 3, each=30))  # fmt: skip
    figure.update_layout(margin_t=132)  # beside the names of rows, a narrow window has room for one column of legend
    _rows(figure, frame["short"])
    figure.update_xaxes(rangemode="tozero")
    return figure


def domain_times(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """Milliseconds per token of the best way by domain, the slowest on top. frame: ``app.frames.caching.domains``."""
    title = "Time per token by domain"
    if frame.is_empty():
        return message("The run has one domain.", title=title, theme=theme)
    names = [safe(name, 34) for name in frame["domain"]]
    figure = go.Figure(
        go.Bar(
            y=names, x=frame["ms"], orientation="h", marker={"color": fade(palette(theme).accent, _OPAQUE)},
            customdata=frame["tokens"],
            hovertemplate="%{y}<br>%{x:.3g} ms per token<br>%{customdata:,} tokens<extra></extra>",
        )
    )  # fmt: skip
    layout(figure, title=title, x="ms per token", y="", theme=theme, legend=False, wide=False, bargap=0.4,
           height=rows_height(len(frame), each=30))  # fmt: skip
    _rows(figure, frame["domain"])
    figure.update_xaxes(rangemode="tozero")
    return figure


def domain_hits(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """Hit rate of the best way by domain, among the others and alone. frame: ``app.frames.caching.domains``."""
    title = "Hit rate by domain"
    if frame.is_empty():
        return message("The run has one domain.", title=title, theme=theme)
    colours, figure = palette(theme), go.Figure()
    names = [safe(name, 34) for name in frame["domain"]]
    for column, words, mark in (
        ("hit_rate", "served among the others", {"color": colours.accent, "size": 11}),
        ("alone", "served alone", {"color": colours.categorical[1], "size": 11, "symbol": "diamond-open",
                                   "line": {"width": 2}}),
    ):  # fmt: skip
        figure.add_scatter(
            y=names, x=frame[column], mode="markers", name=words, marker=mark,
            hovertemplate=f"%{{y}}, {words}<br>%{{x:.1%}}<extra></extra>",
        )  # fmt: skip
    layout(figure, title=title, x="hit rate", y="", theme=theme, wide=False,
           height=rows_height(len(frame), each=30))  # fmt: skip
    _rows(figure, frame["domain"])
    figure.update_xaxes(tickformat=".0%", range=[0, 1.02])
    return figure


def _rows(figure: go.Figure, names: pl.Series) -> None:
    """The rows of the frame from the top down."""
    order = [safe(name, 34) for name in names][::-1]
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=order, showgrid=False)
