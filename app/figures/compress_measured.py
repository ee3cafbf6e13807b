"""Figures of what was measured on edited models: damage by domain, and probes before and after."""

from __future__ import annotations

from collections.abc import Mapping

import plotly.graph_objects as go
import polars as pl

from app.figures.interval import whiskers
from app.figures.style import Theme, colours_of, layout, log_ticks, message, palette, safe

_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star", "hexagon", "pentagon")
MOST = len(_SYMBOLS)
"""Plans that one figure can tell apart."""
WIDE = 3.0
"""Ratios above are drawn on a log scale."""

_QUANTITIES = {
    "kl": ("KL divergence from the original", "nats per predicted token", 0.0),
    "ratio": ("Perplexity beside the original's", "perplexity ÷ the original's", 1.0),
}


def damage(frames: Mapping[str, pl.DataFrame], *, quantity: str, theme: Theme = "light") -> go.Figure:
    """One quantity by domain, with 95 % intervals, for one plan or several; dotted: an unchanged model.

    frames: title -> ``app.frames.evaluation.domains``. quantity: kl | ratio.
    """
    title, axis, unchanged = _QUANTITIES[quantity]
    if not frames:
        return message("Nothing was measured.", title=title, theme=theme)
    colours, first = colours_of(list(frames), theme), next(iter(frames.values()))
    figure = go.Figure()
    for (name, frame), symbol in zip(frames.items(), _SYMBOLS, strict=False):
        figure.add_scatter(
            x=frame[quantity], y=[safe(domain) for domain in frame["domain"]], mode="markers", name=safe(name),
            orientation="h",
            error_x=whiskers(frame[quantity], frame[f"{quantity}_low"], frame[f"{quantity}_high"]),
            marker={"color": colours[name], "size": 9, "symbol": symbol},
            customdata=frame.select("tokens", "base", "model").rows(),
            hovertemplate=f"%{{y}}: %{{x:.4g}} {axis}<br>%{{customdata[0]:,}} tokens"
            "<br>perplexity %{customdata[1]:.4g} before, %{customdata[2]:.4g} after<extra></extra>",
        )  # fmt: skip
    figure.add_vline(x=unchanged, line={"color": palette(theme).muted, "dash": "dot", "width": 1.4})
    height = 150 + 26 * len(first) + 22 * len(frames)
    layout(figure, title=title, x=axis, y="", theme=theme, height=height, wide=False, legend=len(frames) > 1)
    order = [safe(domain) for domain in first["domain"]]
    figure.update_yaxes(autorange="reversed", type="category", categoryorder="array", categoryarray=order)
    if len(frames) > 1:
        figure.update_layout(scattermode="group", scattergap=0.4)
    if quantity == "kl":
        figure.update_xaxes(rangemode="tozero")
    highest = max(one for frame in frames.values() for one in [1.0, *frame[quantity].drop_nulls()])
    if quantity == "ratio" and highest > WIDE:
        figure.update_xaxes(**log_ticks([1.0, highest]), title={"text": f"{axis} (log scale)"})
    return figure


def probe_differences(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """What each probe has lost or gained, with the 95 % interval of pairs; accuracies before and after stand beside.

    frame: ``app.frames.evaluation.probes``.
    """
    title = "Probes, edited model against the original"
    if frame.is_empty():
        return message("No probe was run.", title=title, theme=theme)
    colours = palette(theme)
    names = [
        safe(name.replace("_", " ")) + ("" if enough else " (too few)")
        for name, enough in frame.select("probe", "enough").iter_rows()
    ]
    clear = frame["enough"] & ((frame["difference_high"] < 0) | (frame["difference_low"] > 0)).fill_null(False)
    figure = go.Figure(
        go.Scatter(
            x=frame["difference"], y=names, mode="markers+text",
            error_x=whiskers(
                frame["difference"], frame["difference_low"], frame["difference_high"], colour=colours.muted
            ),
            marker={"size": 10, "symbol": "diamond",
                    "color": [colours.alarm if one else colours.accent for one in clear]},
            text=[f"{base:.0%} → {model:.0%}" for base, model in frame.select("base", "model").iter_rows()],
            textposition="top center", cliponaxis=False,
            customdata=list(zip(frame["items"], map(safe, frame["asks"]), strict=True)),
            hovertemplate="%{y}: %{x:+.1%} right<br>%{customdata[1]}<br>%{customdata[0]:,} items<extra></extra>",
        )
    )  # fmt: skip
    figure.add_vline(x=0.0, line={"color": colours.muted, "dash": "dot", "width": 1.4})
    height = 130 + 44 * len(frame)
    layout(
        figure, title=title, x="change in the share of right answers", y="", theme=theme, height=height, legend=False
    )
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_xaxes(tickformat="+.0%")
    return figure
