"""Figures of caching: hit rates by size, what they are made of, and milliseconds per token by memory."""

from __future__ import annotations

import plotly.graph_objects as go
import polars as pl

from app.figures.interval import band
from app.figures.style import Theme, colours_of, fade, layout, log_ticks, message, palette, safe
from app.text import size

POLICIES = {"lru": "LRU", "lfu": "LFU", "static": "most used (static)"}
BOUNDS = {
    "min_bypass": "bound, may bypass", "min_flat": "bound, one by one", "min_set": "bound, whole sets",
}  # fmt: skip
CONTROLS = {
    "shuffled_within_requests": ("shuffled within", "dash"),
    "shuffled_over_all": ("shuffled over all", "dot"),
    "uniform_experts": ("random experts", "dashdot"),
}
PARTS = {
    "random": "random", "popularity": "popularity", "topic": "topic", "locality": "locality",
}  # fmt: skip
_UNITS = {1: "bytes", 2**10: "KiB", 2**20: "MiB", 2**30: "GiB"}
_LOG_FROM = 30.0
"""Times whose largest is so many times the smallest stand on a log axis."""


def hit_rate_curves(frame: pl.DataFrame, *, each: float, theme: Theme = "light") -> go.Figure:
    """Hit rate against slots per layer: policies with 95 % bands, bounds, and LRU on its controls.

    frame: ``app.frames.caching.hit_rates``. each: slots per layer that the device has room for.
    """
    title = "Hit rate by slots per layer"
    if frame.is_empty():
        return message("No cache was replayed.", title=title, theme=theme)
    figure, colours = go.Figure(), palette(theme)
    wheel = colours_of([*POLICIES, *BOUNDS], theme)
    observed = frame.filter(pl.col("control") == "observed")
    for policy, words in POLICIES.items():
        part = observed.filter(pl.col("policy") == policy)
        if len(part):
            known = part.filter(pl.col("low").is_not_null())
            band(figure, x=known["slots"], low=known["low"], high=known["high"], colour=wheel[policy])
            figure.add_trace(_curve(part, words, {"color": wheel[policy], "width": 2.4}))
    for bound, words in BOUNDS.items():
        part = observed.filter(pl.col("policy") == bound)
        if len(part):
            figure.add_trace(_curve(part, words, {"color": wheel[bound], "width": 1.4}))
    for control, (words, dash) in CONTROLS.items():
        part = frame.filter((pl.col("policy") == "lru") & (pl.col("control") == control))
        if len(part):
            figure.add_trace(_curve(part, f"LRU, {words}", {"color": colours.muted, "width": 1.3, "dash": dash}))
    layout(figure, title=title, x="slots per layer", y="hit rate", theme=theme, height=520, wide=False)
    figure.add_vline(x=each, line={"color": colours.text, "dash": "dash", "width": 1.4})
    figure.update_yaxes(tickformat=".0%", range=[0, 1.02])
    figure.update_xaxes(rangemode="tozero")
    return figure


def _curve(part: pl.DataFrame, name: str, line: dict[str, object]) -> go.Scatter:
    ends = [
        "" if low is None else f"<br>95 % interval {low:.1%} to {high:.1%}"
        for low, high in part.select("low", "high").iter_rows()
    ]
    return go.Scatter(
        x=part["slots"], y=part["rate"], name=name, mode="lines", line=line, customdata=ends,
        hovertemplate=f"{name}<br>%{{x}} slots per layer: %{{y:.1%}}%{{customdata}}<extra></extra>",
    )  # fmt: skip


def hit_rate_parts(frame: pl.DataFrame, *, each: float, theme: Theme = "light") -> go.Figure:
    """What the hit rate with ``each`` slots per layer is made of, one bar per policy.

    frame: ``app.frames.caching.parts``.
    """
    title = f"What the hit rate with {each:.3g} slots per layer is made of"
    if frame.is_empty():
        return message("No cache was replayed.", title=title, theme=theme)
    figure, colours = go.Figure(), palette(theme)
    wheel = dict(zip(PARTS, (fade(colours.muted, 0.55), *colours.categorical[:3]), strict=True))
    names = [POLICIES.get(policy, policy) for policy in frame["policy"].unique(maintain_order=True)]
    for part, words in PARTS.items():
        rows = frame.filter(pl.col("part") == part)
        figure.add_bar(
            y=[POLICIES.get(policy, policy) for policy in rows["policy"]], x=rows["points"], orientation="h",
            name=words, marker={"color": wheel[part]}, textposition="inside", insidetextanchor="middle",
            text=[f"{100 * points:.0f}" if abs(points) >= 0.025 else "" for points in rows["points"]],
            textangle=0, insidetextfont={"color": colours.text if part == "random" else colours.background},
            hovertemplate=f"%{{y}}<br>{words}: %{{x:.1%}}<extra></extra>",
        )  # fmt: skip
    layout(figure, title=title, x="hit rate", y="", theme=theme, height=330, wide=False, barmode="relative",
           bargap=0.45)  # fmt: skip
    figure.update_xaxes(tickformat=".0%")
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1], showgrid=False)
    return figure


def time_by_memory(frame: pl.DataFrame, *, asked: float, resident: float, theme: Theme = "light") -> go.Figure:
    """Milliseconds per token against bytes for experts; the region where caching pays is shaded.

    frame: ``app.frames.caching.times``. asked: bytes for experts that the device has. resident: ms with all of them.
    """
    title = "Time per token by memory for experts"
    if frame.is_empty():
        return message("No size was timed.", title=title, theme=theme)
    colours, figure = palette(theme), go.Figure()
    unit = max((one for one in _UNITS if one <= int(frame["bytes"].max() or 1)), default=1)  # type: ignore[arg-type]
    x = frame["bytes"] / unit
    for begin, end in paying(frame):
        figure.add_vrect(x0=begin / unit, x1=end / unit, fillcolor=fade(colours.categorical[2], 0.13), line_width=0,
                         layer="below")  # fmt: skip
    lines = (
        ("plain", "whole layers, no trace", colours.categorical[1], "dash"),
        ("chance", "on random experts", colours.muted, "dot"),
        ("bound", "bound", colours.categorical[4], "solid"),
    )
    for column, name, colour, dash in lines:
        figure.add_scatter(
            x=x, y=frame[column], name=name, mode="lines+markers", line={"color": colour, "width": 1.6, "dash": dash},
            marker={"size": 5}, customdata=[size(one) for one in frame["bytes"]],
            hovertemplate=f"{name}<br>%{{customdata}}: %{{y:.3g}} ms per token<extra></extra>",
        )  # fmt: skip
    band(figure, x=x, low=frame["low"], high=frame["high"], colour=colours.accent)
    words = [
        (size(row["bytes"]), safe(row["way"], 80), f"{row['low']:.3g} to {row['high']:.3g}", _verdict(row))
        for row in frame.iter_rows(named=True)
    ]
    figure.add_scatter(
        x=x, y=frame["ms"], name="best by the trace", mode="lines+markers", customdata=words,
        line={"color": colours.accent, "width": 2.4}, marker={"size": 8},
        hovertemplate="%{customdata[0]}: %{customdata[1]}<br>%{y:.3g} ms per token (95 %: %{customdata[2]})"
        "<br>%{customdata[3]}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=[x.min(), x.max()], y=[resident, resident], name="all on the device", mode="lines",
        line={"color": colours.text, "width": 1, "dash": "dashdot"},
        hovertemplate="all experts on the device<br>%{y:.3g} ms per token<extra></extra>",
    )  # fmt: skip
    if frame["pays"].any():
        figure.add_scatter(
            x=[None], y=[None], mode="markers", name="shaded: caching pays", hoverinfo="skip",
            marker={"symbol": "square", "size": 12, "color": fade(colours.categorical[2], 0.35)},
        )  # fmt: skip
    layout(
        figure,
        title=title,
        x=f"memory for experts, {_UNITS[unit]}",
        y="ms per token",
        theme=theme,
        height=520,
        wide=False,
    )
    figure.add_vline(x=asked / unit, line={"color": colours.text, "dash": "dash", "width": 1.4})
    values = [value for column in ("ms", "plain", "chance", "bound") for value in frame[column] if value > 0]
    if max(values) > _LOG_FROM * min(values):
        figure.update_yaxes(**log_ticks(values), title={"text": "ms per token (log scale)"})
    else:
        figure.update_yaxes(rangemode="tozero")
    figure.update_xaxes(rangemode="tozero")
    return figure


def paying(frame: pl.DataFrame) -> list[tuple[float, float]]:
    """Stretches of bytes at whose sizes caching pays; one size alone reaches half-way to its neighbours."""
    sizes, flags = frame["bytes"].to_list(), frame["pays"].to_list()
    found: list[tuple[float, float]] = []
    at = 0
    while at < len(sizes):
        last = at
        while last + 1 < len(sizes) and flags[at] and flags[last + 1]:
            last += 1
        if flags[at]:
            low, high = float(sizes[at]), float(sizes[last])
            if low == high:
                low = (low + sizes[max(at - 1, 0)]) / 2
                high = (high + sizes[min(last + 1, len(sizes) - 1)]) / 2
            found.append((low, high))
        at = last + 1
    return found


def _verdict(row: dict[str, object]) -> str:
    return f"{'pays' if row['pays'] else 'does not pay'} against {row['without']:.3g} ms without a cache"
