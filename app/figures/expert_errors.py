"""Figure of what narrower weights do to one expert's output."""

from __future__ import annotations

import plotly.graph_objects as go
import polars as pl

from app.figures.style import Theme, layout, log_ticks, message, palette

_LEAST = 1e-6


def errors_by_width(frame: pl.DataFrame, *, title: str, theme: Theme = "light") -> go.Figure:
    """Relative change of the expert's output by width, log scale, beside the median of its layer.

    frame: ``app.frames.expert_errors.errors``.
    """
    if frame.is_empty():
        return message("No sampled token used this expert.", title=title, theme=theme)
    colours, figure = palette(theme), go.Figure()
    looks = {
        "whole": ("all projections", colours.accent, "solid", 2.4),
        "gate": ("gate alone", colours.categorical[1], "dot", 1.4),
        "up": ("up alone", colours.categorical[2], "dot", 1.4),
        "down": ("down alone", colours.categorical[3], "dot", 1.4),
        "median": ("median of the layer", colours.muted, "dash", 1.6),
    }
    for column, (name, colour, dash, width) in looks.items():
        if frame[column].null_count() == len(frame):
            continue
        figure.add_scatter(
            x=frame["width"], y=frame[column].clip(lower_bound=_LEAST), name=name, mode="lines+markers",
            line={"color": colour, "dash": dash, "width": width}, marker={"size": 6},
            hovertemplate=f"{name}: %{{x}} bits<br>the output changes by %{{y:.2%}} of its size<extra></extra>",
        )  # fmt: skip
    layout(figure, title=title, x="bits of a weight", y="change of the output, part of its size (log scale)",
           theme=theme, height=380)  # fmt: skip
    values = [value for column in looks for value in frame[column].drop_nulls()]
    figure.update_yaxes(**log_ticks(max(value, _LEAST) for value in values))
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=frame["width"].to_list())
    return figure
