"""Figures of one expert in a cache: how soon it is used again, and how often a cache of its layer holds it."""

from __future__ import annotations

import plotly.graph_objects as go
import polars as pl

from app.figures.style import Theme, layout, log_ticks, message, palette


def reuse_curve(frame: pl.DataFrame, *, title: str, theme: Theme = "light") -> go.Figure:
    """Share of the expert's uses that are followed by another within so many tokens, beside shuffled text.

    frame: ``app.frames.expert_cache.reuse``.
    """
    if frame.is_empty():
        return message("The expert was used too rarely to say when it is used again.", title=title, theme=theme)
    colours, figure = palette(theme), go.Figure()
    hover = "within %{x} tokens<br>%{y:.1%} of its uses"
    looks = (
        ("share", "this expert", colours.accent, "solid", 2.2, hover + "<br>%{customdata:,} uses<extra></extra>"),
        ("in_sequence", "tokens shuffled in their sequence", colours.categorical[1], "dash", 1.6,
         hover + "<extra>shuffled in the sequence</extra>"),
        ("shuffled", "all tokens shuffled", colours.muted, "dot", 1.6, hover + "<extra>all tokens shuffled</extra>"),
    )  # fmt: skip
    for column, name, colour, dash, width, words in looks:
        figure.add_scatter(
            x=frame["tokens"], y=frame[column], name=name, customdata=frame["uses"], hovertemplate=words,
            mode="lines+markers" if column == "share" else "lines",
            line={"color": colour, "dash": dash, "width": width}, marker={"size": 6},
        )  # fmt: skip
    layout(figure, title=title, x="tokens later, at most (log scale)", y="used again", theme=theme, height=380,
           wide=False)  # fmt: skip
    figure.update_xaxes(**log_ticks(frame["tokens"].to_list()))
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return figure


def hit_rate_curve(frame: pl.DataFrame, *, title: str, top_k: int, theme: Theme = "light") -> go.Figure:
    """Part of the expert's uses that find it in an LRU cache of its layer, by the cache's size, beside all experts.

    frame: ``app.frames.expert_cache.hit_rates``. top_k: experts that a token needs at once, drawn as a line.
    """
    if frame.is_empty():
        return message("The expert was never used.", title=title, theme=theme)
    colours, figure = palette(theme), go.Figure()
    for column, name, colour, dash, width in (
        ("value", "this expert", colours.accent, "solid", 2.2),
        ("layer", "all experts of the layer", colours.muted, "dash", 1.6),
    ):
        figure.add_scatter(
            x=frame["slots"], y=frame[column], name=name, mode="lines", line={"color": colour, "dash": dash,
            "width": width}, hovertemplate=f"{name}<br>%{{x}} slots: %{{y:.1%}} hits<extra></extra>",
        )  # fmt: skip
    figure.add_vline(x=top_k, line={"color": colours.muted, "width": 1})
    figure.add_annotation(
        x=top_k, y=0.04, yref="paper", xanchor="left", xshift=4, text="top-k", showarrow=False, font={"size": 11}
    )
    layout(figure, title=title, x="slots of the layer's cache", y="hit rate", theme=theme, height=380, wide=False)
    figure.update_yaxes(tickformat=".0%", range=[0, 1.02])
    return figure


def consistency_curve(frame: pl.DataFrame, *, title: str, theme: Theme = "light") -> go.Figure:
    """SRP of the expert by segment length, beside the layer's mean and what always keeping it would give.

    frame: ``app.frames.expert_cache.consistency``.
    """
    if frame.is_empty():
        return message("Its SRP was not computed.", title=title, theme=theme)
    colours, figure = palette(theme), go.Figure()
    for column, name, colour, dash, width in (
        ("value", "this expert", colours.accent, "solid", 2.2),
        ("layer", "mean of the layer", colours.categorical[1], "dash", 1.6),
        ("lower_bound", "always kept", colours.muted, "dot", 1.6),
    ):
        figure.add_scatter(
            x=frame["segment_length"], y=frame[column], name=name, line={"color": colour, "dash": dash, "width": width},
            mode="lines+markers" if column == "value" else "lines", marker={"size": 6},
            hovertemplate=f"{name}<br>segments of %{{x}} tokens: %{{y:.1%}}<extra></extra>",
        )  # fmt: skip
    layout(figure, title=title, x="tokens of a segment (log scale)", y="SRP", theme=theme, height=320)
    figure.update_xaxes(type="log", tickvals=frame["segment_length"], ticktext=frame["segment_length"].cast(pl.Int64))
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return figure
