"""Figures of a placement: load per device before and after, balance, traffic, and what has to be moved."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl

from app.figures.heatmap import expert_map, matrix
from app.figures.interval import band
from app.figures.style import (
    Theme,
    colorbar,
    fade,
    layout,
    message,
    palette,
    pickable,
    rows_height,
    safe,
    scale,
)
from app.frames.placement import WORDS

NARROW = 2048
"""Cells up to which a map says more in its hover text."""

SHORT = {
    "before": "as experts lie", "after": "this placement", "packed": "LPT, no replicas", "best": "LPT, later text",
    "chance": "uniform experts",
}  # fmt: skip
"""Names for legends."""

_DASHES = {"packed": "dash", "best": "dashdot", "chance": "dot"}
_QUANTITIES = {
    "balancedness": ("Balancedness per layer, windows of text", "balancedness (mean over largest load)"),
    "per_pass": ("Balancedness per layer, forward passes", "balancedness per pass (0 to 1)"),
    "remote": ("Token-expert pairs that leave their device", "share of pairs"),
    "devices": ("Devices that a token is spread over", "devices per token"),
}


def colour(name: str, theme: Theme = "light") -> str:
    """The colour of one of the placements beside each other."""
    wheel, muted = palette(theme).categorical, palette(theme).muted
    return {"before": wheel[1], "after": wheel[0], "packed": wheel[2], "best": wheel[3]}.get(name, muted)


def bound_of(frame: pl.DataFrame) -> float:
    """The end of the common colour scale of both maps: the largest load over the mean, at least 1.2, at most 2."""
    largest = frame["relative"].drop_nulls().max()
    return float(np.clip(np.ceil(float(largest or 1.0) * 10) / 10, 1.2, 2.0))  # type: ignore[arg-type]


def load_map(frame: pl.DataFrame, *, name: str, bound: float, theme: Theme = "light") -> go.Figure:
    """Load of every device over the mean of its layer, one placement. Both sides share ``bound``.

    frame: ``app.frames.placement.device_loads``; name: before | after.
    """
    title = f"Load per device, {WORDS[name]}"
    mine = frame.filter(pl.col("name") == name).rename({"device": "expert"})
    if mine.is_empty() or not mine["load"].sum():
        return message("No text was left to score on.", title=title, theme=theme)
    cells, labels, width = matrix(mine, "relative")
    loads, _, _ = matrix(mine, "load")
    hover = "layer %{y}, device %{x}<br>%{z:.2f} × the mean of the layer<extra></extra>"
    heat = go.Heatmap(
        z=cells, y=labels, zmin=2.0 - bound, zmid=1.0, zmax=bound, hoverongaps=False, hovertemplate=hover,
        colorscale=scale(palette(theme).diverging[::-1]), colorbar=colorbar("times the mean", **_ticks(bound)),
    )  # fmt: skip
    if cells.size <= NARROW:
        hover = hover.replace("<extra>", "<br>%{customdata:,.0f} token-expert pairs<extra>")
        heat.update(customdata=loads, hovertemplate=hover)
    figure = go.Figure(heat)
    height = rows_height(len(labels))
    x = f"device (0 to {width - 1})"
    layout(figure, title=title, x=x, y="layer", theme=theme, height=height, legend=False, wide=False)
    _layer_rows(figure, labels)
    figure.update_xaxes(dtick=1 if width <= 16 else None, nticks=24 if width > 16 else None)
    return pickable(figure, layer="y")


def layer_curves(frame: pl.DataFrame, *, quantity: str, theme: Theme = "light") -> go.Figure:
    """One quantity per layer for the placements beside each other; windows with their extremes for this placement.

    frame: ``app.frames.placement.layers``; quantity: balancedness | per_pass | remote | devices.
    """
    title, axis = _QUANTITIES[quantity]
    if quantity == "balancedness" and not frame["per_pass"].count():
        title = "Balancedness per layer, the counts"
    shown = frame.drop_nulls(quantity)
    if shown.is_empty():
        return message("Not known without a trace.", title=title, theme=theme)
    figure = go.Figure()
    share = quantity != "devices"
    value = "%{y:.1%}" if quantity == "remote" else "%{y:.3f}"
    if quantity == "balancedness":
        _spread(figure, shown.filter(pl.col("name") == "after"), theme)
    for name in WORDS:
        part = shown.filter(pl.col("name") == name)
        if len(part):
            figure.add_scatter(
                x=part["label"], y=part[quantity], name=SHORT[name], **_line(name, theme),
                hovertemplate=f"layer %{{x}}: {value}<br>{WORDS[name]}<extra></extra>",
            )  # fmt: skip
    layout(figure, title=title, x="layer", y=axis, theme=theme, height=400, wide=False)
    figure.update_xaxes(type="category", nticks=24, showgrid=False)
    if quantity == "remote":
        figure.update_yaxes(tickformat=".0%")
    if share:
        low = float(shown[quantity].min())  # type: ignore[arg-type]
        figure.update_yaxes(range=[max(np.floor(low * 10 - 1) / 10, 0.0), 1.01])
    return pickable(figure, layer="x")


def move_curves(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """Moves from layer to layer. frame: ``app.frames.placement.moves``."""
    title = "Moves from layer to layer"
    if frame.drop_nulls("moves").is_empty():
        return message("Not known without a trace, or with one layer.", title=title, theme=theme)
    figure = go.Figure()
    for name in ("before", "after", "chance"):
        part = frame.filter(pl.col("name") == name)
        figure.add_scatter(
            x=part["label"], y=part["moves"], name=SHORT[name], **_line(name, theme),
            customdata=[label.split(" ")[0] for label in part["label"]],
            hovertemplate=f"layers %{{x}}: %{{y:.1%}} on another device<br>{WORDS[name]}<extra></extra>",
        )  # fmt: skip
    layout(
        figure, title=title, x="from layer → to layer", y="share of pairs on different devices", theme=theme,
        height=400, wide=False,
    )  # fmt: skip
    low = float(frame["moves"].drop_nulls().min())  # type: ignore[arg-type]
    figure.update_yaxes(tickformat=".0%", range=[max(np.floor(low * 10 - 1) / 10, 0.0), 1.01])
    figure.update_xaxes(type="category", nticks=8, tickangle=0, showgrid=False)
    return pickable(figure, layer="customdata.0")


def pass_histogram(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """How the balancedness of forward passes spreads. frame: ``app.frames.placement.by_pass``."""
    title = "Balancedness by forward pass"
    if frame.is_empty() or not frame["passes"].sum():
        return message("Not known without a trace.", title=title, theme=theme)
    figure = go.Figure()
    for name in ("before", "after", "chance"):
        part = frame.filter(pl.col("name") == name)
        look = _line(name, theme)
        figure.add_scatter(
            x=part["low"], y=part["share"], name=SHORT[name], mode="lines",
            line={**look["line"], "shape": "hv"}, fill="tozeroy" if name == "after" else None,
            fillcolor=fade(colour(name, theme), 0.15), customdata=part.select("high", "passes").rows(),
            hovertemplate="%{x:.0%} to %{customdata[0]:.0%} busy: %{y:.1%} of the passes"
            f" (%{{customdata[1]:,}})<br>{WORDS[name]}<extra></extra>",
        )  # fmt: skip
    layout(
        figure, title=title, x="part of the devices' time that is used", y="share of forward passes", theme=theme,
        height=380, wide=False,
    )  # fmt: skip
    seen = frame.filter(pl.col("passes") > 0)
    edges = float(seen["low"].min()), float(seen["high"].max())  # type: ignore[arg-type]
    figure.update_xaxes(tickformat=".0%", range=[max(edges[0] - 0.04, 0.0), min(edges[1] + 0.04, 1.0)])
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return figure


def size_curves(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """Balancedness of passes by how many tokens run together. frame: ``app.frames.placement.by_size``."""
    title = "Balancedness by tokens in a pass"
    shown = frame.drop_nulls("balancedness")
    if shown.is_empty():
        return message("Not known without a trace.", title=title, theme=theme)
    figure = go.Figure()
    for name in ("before", "after", "chance"):
        part = shown.filter(pl.col("name") == name)
        look = _line(name, theme)
        figure.add_scatter(
            x=part["tokens"], y=part["balancedness"], name=SHORT[name],
            mode="markers" if name != "chance" else "lines", line=look["line"],
            marker={"size": _sizes(part), "color": fade(colour(name, theme), 0.75), "line": {"width": 0}},
            customdata=part["passes"],
            hovertemplate="%{x} tokens in a pass: %{y:.1%} busy<br>%{customdata:,} passes"
            f"<br>{WORDS[name]}<extra></extra>",
        )  # fmt: skip
    layout(
        figure, title=title, x="tokens in a forward pass", y="part of the devices' time that is used", theme=theme,
        height=380, wide=False,
    )  # fmt: skip
    figure.update_yaxes(tickformat=".0%")
    return figure


def replica_map(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """Slots of every expert. frame: ``app.frames.placement.replicas``."""
    title = "Slots of each expert"
    if frame.is_empty() or frame["slots"].max() == 1:
        return message("Every expert has one slot.", title=title, theme=theme)
    cells, labels, width = matrix(frame, "slots")
    devices, _, _ = matrix(frame, "devices")
    share, _, _ = matrix(frame, "share")
    most = int(np.nanmax(cells))
    colours = palette(theme).sequential
    last = len(colours) - 1 if most > 3 else len(colours) - 4
    picked = [colours[round(at * last / (most - 1))] for at in range(most)]
    steps = [(edge / most, tone) for index, tone in enumerate(picked) for edge in (index, index + 1)]
    heat = go.Heatmap(
        z=cells, y=labels, zmin=0.5, zmax=most + 0.5, colorscale=steps if most <= 8 else scale(colours),
        hoverongaps=False, hovertemplate="layer %{y}, expert %{x}<br>%{z:.0f} slots<extra></extra>",
        colorbar=colorbar("slots", **({"tickvals": list(range(1, most + 1))} if most <= 8 else {})),
    )  # fmt: skip
    if cells.size <= NARROW * 4:
        heat.update(
            customdata=np.stack([devices, share], axis=-1),
            hovertemplate="layer %{y}, expert %{x}<br>%{z:.0f} slots on %{customdata[0]:.0f} devices"
            "<br>%{customdata[1]:.2%} of the layer's tokens<extra></extra>",
        )
    return expert_map(go.Figure(heat), title=title, labels=labels, width=width, theme=theme)


def movement_bars(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """Slots that change and experts that are sent, per layer. frame: ``app.frames.placement.movement``."""
    title = "What has to be moved, per layer"
    figure = go.Figure()
    for name, words, tone in (
        ("changed", "slots that change", colour("before", theme)),
        ("copied", "experts sent to a device", colour("after", theme)),
    ):
        figure.add_bar(
            x=frame["label"], y=frame[name], name=words, marker={"color": tone}, customdata=frame["slots"],
            hovertemplate=f"layer %{{x}}: %{{y}} {words}<br>of %{{customdata}} slots<extra></extra>",
        )  # fmt: skip
    layout(figure, title=title, x="layer", y="slots", theme=theme, height=380, barmode="group", wide=False)
    figure.update_xaxes(type="category", nticks=12, tickangle=0, showgrid=False)
    return pickable(figure, layer="x")


def domain_bars(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """Balancedness per pass of each domain, before and after; the worst is marked.

    frame: ``app.frames.placement.domains``.
    """
    title = "By domain: balancedness per pass"
    shown = frame.drop_nulls("after")
    if shown.is_empty():
        return message("Not known without a trace.", title=title, theme=theme)
    names = [
        safe(domain, 26) + (" (worst)" if worst and len(shown) > 1 else "")
        for domain, worst in shown.select("domain", "worst").iter_rows()
    ]
    figure = go.Figure()
    for start, end, name in zip(shown["before"], shown["after"], names, strict=True):
        figure.add_scatter(
            x=[start, end], y=[name, name], mode="lines", showlegend=False, hoverinfo="skip",
            line={"color": palette(theme).grid, "width": 4},
        )  # fmt: skip
    for column, symbol in (("before", "circle-open"), ("after", "circle")):
        figure.add_scatter(
            x=shown[column], y=names, name=WORDS[column], mode="markers",
            marker={"color": colour(column, theme), "size": 11, "symbol": symbol, "line": {"width": 2}},
            customdata=shown["tokens"],
            hovertemplate=f"%{{y}}: %{{x:.1%}} busy<br>{WORDS[column]}<br>%{{customdata:,}} tokens<extra></extra>",
        )  # fmt: skip
    height = 140 + 28 * len(shown)
    x = "devices' time that is used"
    layout(figure, title=title, x=x, y="", theme=theme, height=max(height, 300), wide=False)
    figure.update_yaxes(autorange="reversed", type="category", categoryorder="array", categoryarray=names)
    figure.update_xaxes(tickformat=".0%")
    return figure


def _line(name: str, theme: Theme) -> dict[str, Any]:
    """The look of a placement's line."""
    strong = name in ("before", "after")
    line = {"color": colour(name, theme), "width": 2.2 if strong else 1.6, "dash": _DASHES.get(name, "solid")}
    return {"line": line, "mode": "lines+markers" if strong else "lines", "marker": {"size": 6 if strong else 4}}


def _sizes(part: pl.DataFrame) -> list[float]:
    """Points whose area grows with the number of passes, 4 to 12 pixels."""
    most = max(int(part["passes"].max() or 1), 1)  # type: ignore[arg-type]
    return [4.0 + 8.0 * (count / most) ** 0.5 for count in part["passes"]]


def _spread(figure: go.Figure, part: pl.DataFrame, theme: Theme) -> None:
    """The lowest and highest window as a band."""
    if part.is_empty() or (part["low"] == part["high"]).all():
        return
    tone = colour("after", theme)
    band(figure, x=part["label"], low=part["low"], high=part["high"], colour=tone, name="its windows")


def _layer_rows(figure: go.Figure, labels: list[str]) -> None:
    figure.update_yaxes(
        type="category", autorange="reversed", showgrid=False, categoryorder="array", categoryarray=labels, nticks=24,
        ticks="",
    )  # fmt: skip
    figure.update_xaxes(showgrid=False, zeroline=False, ticks="")


def _ticks(bound: float) -> dict[str, Any]:
    """Ticks of loads over the mean, from both ends and 1."""
    low = 2.0 - bound
    values = [low, (1.0 + low) / 2, 1.0, (1.0 + bound) / 2, bound]
    texts = [f"{value:.3g}" for value in values]
    texts[0], texts[-1] = f"≤ {texts[0]}", f"≥ {texts[-1]}"
    return {"tickvals": values, "ticktext": texts}
