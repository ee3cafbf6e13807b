"""Figures of what was measured on edited models: damage by domain, and probes before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go
import polars as pl

from app.figures.style import Theme, colours_of, layout, log_ticks, message, palette, safe

_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star", "hexagon", "pentagon")
MOST = len(_SYMBOLS)
"""Plans that one figure can tell apart."""
WIDE = 3.0
"""Ratios above are drawn on a log scale."""

_QUANTITIES = {
    "kl": ("KL divergence from the original", "nats per predicted token", 0.0),
    "ratio": ("Perplexity beside the original's", "perplexity ÷ the original's", 1.0),
    "agreement": ("Same likeliest next token", "share of predicted tokens", 1.0),
}


def damage(frames: Mapping[str, pl.DataFrame], *, quantity: str, theme: Theme = "light") -> go.Figure:
    """One quantity by domain, with 95 % intervals, for one plan or several; dotted: an unchanged model.

    frames: title -> ``app.frames.compress_measured.damage``. quantity: kl | ratio | agreement.
    """
    title, axis, unchanged = _QUANTITIES[quantity]
    if not frames:
        return message("Nothing was measured.", title=title, theme=theme)
    colours = colours_of(list(frames), theme)
    figure = go.Figure()
    for (name, frame), symbol in zip(frames.items(), _SYMBOLS, strict=False):
        extra = list(zip(frame["tokens"], frame["base_perplexity"], frame["perplexity"], strict=True))
        figure.add_scatter(
            x=frame[quantity], y=[safe(domain) for domain in frame["domain"]], mode="markers", name=safe(name),
            orientation="h",
            marker={"color": colours[name], "size": 9, "symbol": symbol}, error_x=_interval(frame, quantity),
            customdata=extra,
            hovertemplate=f"%{{y}}: %{{x:.4g}} {axis}<br>%{{customdata[0]:,}} tokens"
            "<br>perplexity %{customdata[1]:.4g} before, %{customdata[2]:.4g} after<extra></extra>",
        )  # fmt: skip
    figure.add_vline(x=unchanged, line={"color": palette(theme).muted, "dash": "dot", "width": 1.4})
    domains = max(len(frame) for frame in frames.values())
    height = 150 + 26 * domains + 22 * len(frames)
    layout(figure, title=title, x=axis, y="", theme=theme, height=height, wide=False, legend=len(frames) > 1)
    if len(frames) > 1:
        figure.update_layout(scattermode="group", scattergap=0.4)
    figure.update_yaxes(autorange="reversed", type="category", showgrid=True)
    if quantity == "kl":
        figure.update_xaxes(rangemode="tozero")
    if quantity == "agreement":
        figure.update_xaxes(tickformat=".0%")
    highest = max(one for frame in frames.values() for one in [1.0, *frame["ratio_high"].drop_nulls()])
    if quantity == "ratio" and highest > WIDE:
        figure.update_xaxes(**log_ticks([1.0, highest]), title={"text": f"{axis} (log scale)"})
    return figure


def probe_pairs(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """Accuracy of every probe before and after, with 95 % intervals.

    frame: ``app.frames.compress_measured.probes``.
    """
    title = "Probes, before and after"
    if frame.is_empty():
        return message("No probe was run.", title=title, theme=theme)
    colours = palette(theme)
    names = [
        safe(name) + ("" if enough else " (too few)") for name, enough in frame.select("probe", "enough").iter_rows()
    ]
    figure = go.Figure()
    for side, words, colour, symbol in (
        ("base", "original", colours.muted, "circle-open"),
        ("model", "edited", colours.accent, "diamond"),
    ):
        figure.add_scatter(
            x=frame[side], y=names, mode="markers", name=words, orientation="h", error_x=_interval(frame, side),
            marker={"color": colour, "size": 10, "symbol": symbol, "line": {"width": 2}},
            customdata=list(zip(frame["items"], map(safe, frame["asks"]), strict=True)),
            hovertemplate=f"%{{y}}, {words}: %{{x:.1%}}<br>%{{customdata[1]}}"
            "<br>%{customdata[0]:,} items<extra></extra>",
        )  # fmt: skip
    layout(figure, title=title, x="share right", y="", theme=theme, height=150 + 34 * len(frame))
    figure.update_layout(scattermode="group", scattergap=0.5)
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_xaxes(tickformat=".0%")
    return figure


def _interval(frame: pl.DataFrame, column: str) -> dict[str, Any]:
    above = (frame[f"{column}_high"] - frame[column]).fill_null(0.0).to_list()
    below = (frame[column] - frame[f"{column}_low"]).fill_null(0.0).to_list()
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1.4}
