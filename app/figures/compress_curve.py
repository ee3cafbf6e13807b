"""Figure of size against predicted cost: one point per plan, measured ones beside, and where the budget stands."""

from __future__ import annotations

import plotly.graph_objects as go
import polars as pl

from app.figures.interval import whiskers
from app.figures.style import Theme, layout, log_ticks, message, palette, safe
from app.text import size

MIXES = {
    "quantize": 0, "slim": 1, "slim + quantize": 2, "drop": 3, "drop + quantize": 4, "merge": 7, "merge + quantize": 9,
    "factor": 5, "factor + quantize": 6,
}  # fmt: skip
"""Kinds of plans in the order of the legend -> place of their colour; others share one."""

_OTHER = 8

_LEAST = 1e-7
"""What costs less is drawn here: a log axis has no zero."""


def cost_by_size(
    frame: pl.DataFrame, *, budget: int | None = None, chosen: str = "", theme: Theme = "light"
) -> go.Figure:
    """Size of all experts against predicted KL divergence, log scale; hollow = predicted, filled = measured.

    Args:
        frame: ``app.frames.compress_curve.points``.
        budget: bytes of the experts, drawn as a line.
        chosen: digest of the plan that stands out.
        theme: light or dark.
    """
    title = "Size against predicted cost, every plan"
    shown = frame.filter(pl.col("kl").is_not_null() | pl.col("measured").is_not_null())
    if shown.is_empty():
        return message(
            "No plan can be priced: the run did not see the residual stream. Collect it with --level activations.",
            title=title, theme=theme,
        )  # fmt: skip
    colours, unit = palette(theme), _unit(frame)
    figure = go.Figure()
    for mix in _ordered(shown):
        colour = colours.categorical[MIXES.get(mix, _OTHER)]
        part = shown.filter(pl.col("mix") == mix)
        figure.add_trace(_predicted(part.filter(pl.col("kl").is_not_null()), mix, colour, unit))
        seen = part.filter(pl.col("measured").is_not_null())
        if len(seen):
            figure.add_trace(_measured(seen, mix, colour, unit))
    if shown["measured"].null_count() < len(shown):
        figure.add_scatter(
            x=[None], y=[None], mode="markers", name="filled: measured", hoverinfo="skip",
            marker={"symbol": "circle", "size": 10, "color": colours.muted},
        )  # fmt: skip
    line = shown.filter("pareto").sort("bytes")
    figure.add_scatter(
        x=line["bytes"] / unit, y=_clipped(line["kl"]), mode="lines", name="best of its size",
        line={"color": colours.muted, "width": 1.4, "shape": "hv"}, hoverinfo="skip",
    )  # fmt: skip
    own = shown.filter(pl.col("digest") == chosen)
    if len(own):
        figure.add_scatter(
            x=own["bytes"] / unit, y=_clipped(own["measured"].fill_null(own["kl"])), mode="markers",
            name="best for the budget", hoverinfo="skip",
            marker={"symbol": "circle-open", "size": 18, "color": colours.alarm, "line": {"width": 2.2}},
        )  # fmt: skip
    if budget is not None:
        figure.add_vline(x=budget / unit, line={"color": colours.text, "dash": "dash", "width": 1.4})
    values = [*shown["kl"].drop_nulls(), *shown["measured"].drop_nulls()]
    layout(
        figure, title=title, x=f"weights of all experts, {_UNITS[unit]}", y="KL divergence, nats per token (log scale)",
        theme=theme, height=500, wide=False,
    )  # fmt: skip
    figure.update_yaxes(**log_ticks(max(value, _LEAST) for value in values))
    figure.update_xaxes(rangemode="tozero")
    return figure


def _predicted(part: pl.DataFrame, mix: str, colour: str, unit: int) -> go.Scatter:
    words = [
        (
            safe(row["name"]), size(row["bytes"]), f"{row['share']:.0%}", f"{row['bits']:.3g}",
            f"{row['low']:.3g} to {row['high']:.3g}, {row['coverage']:.0%} interval",
            "from the run's sums" if row["basis"] == "sums" else f"corrected by {row['plans']} measured plans",
            "not measured" if row["measured"] is None else f"measured {row['measured']:.3g}",
        )
        for row in part.iter_rows(named=True)
    ]  # fmt: skip
    return go.Scatter(
        x=part["bytes"] / unit, y=_clipped(part["kl"]), mode="markers", name=safe(mix), legendgroup=mix,
        customdata=words, marker={"symbol": "circle-open", "size": 9, "color": colour, "line": {"width": 1.8}},
        hovertemplate="%{customdata[0]}<br>%{customdata[1]}, %{customdata[2]} of now; %{customdata[3]} bits a weight"
        "<br>predicted %{y:.3g} nats (%{customdata[4]})<br>%{customdata[5]}<br>%{customdata[6]}<extra>"
        f"{safe(mix)}</extra>",
    )  # fmt: skip


def _measured(part: pl.DataFrame, mix: str, colour: str, unit: int) -> go.Scatter:
    values = part["measured"]
    ends = whiskers(values, part["measured_low"], part["measured_high"])
    words = list(zip(map(safe, part["name"]), map(size, part["bytes"]), part["measured_tokens"], strict=True))
    return go.Scatter(
        x=part["bytes"] / unit, y=_clipped(values), mode="markers", name=f"{safe(mix)}, measured", error_y=ends,
        legendgroup=mix, showlegend=False,
        customdata=words, marker={"symbol": "circle", "size": 10, "color": colour},
        hovertemplate="%{customdata[0]}<br>%{customdata[1]}<br>measured %{y:.3g} nats on %{customdata[2]:,} tokens"
        f"<extra>{safe(mix)}</extra>",
    )  # fmt: skip


_UNITS = {1: "bytes", 2**10: "KiB", 2**20: "MiB", 2**30: "GiB"}


def _unit(frame: pl.DataFrame) -> int:
    largest = int(frame["bytes"].max() or 1)  # type: ignore[arg-type]
    return max((unit for unit in _UNITS if unit <= largest), default=1)


def _ordered(frame: pl.DataFrame) -> list[str]:
    return sorted(frame["mix"].unique().to_list(), key=lambda mix: (_place(mix), mix))


def _place(mix: str) -> int:
    return list(MIXES).index(mix) if mix in MIXES else len(MIXES)


def _clipped(values: pl.Series) -> pl.Series:
    return values.clip(lower_bound=_LEAST)
