"""Figures of a plan's widths: a map of every expert, and how many weights have which; and where its cost comes from."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import polars as pl
from numpy.typing import NDArray

from app.figures.compress import MARKED_CELLS
from app.figures.heatmap import MAX_DETAIL_CELLS, expert_map, matrix
from app.figures.style import Theme, colorbar, layout, message, palette, pickable, safe
from app.frames.compress_bits import CHANGES, WIDTHS

WRITTEN_CELLS = 512
"""Up to so many cells each carries its width in figures."""


def bits_map(frame: pl.DataFrame, *, part: str, title: str, theme: Theme = "light") -> go.Figure:
    """Layers by experts: the width of one projection; crosses: experts that go.

    frame: ``app.frames.compress_bits.widths``. part: gate | up | down.
    """
    if frame.is_empty():
        return message("The plan gives no expert a width.", title=title, theme=theme)
    places = {name: place for place, name in enumerate(WIDTHS)}
    placed = frame.with_columns(pl.col(part).replace_strict(places, default=None, return_dtype=pl.Float64).alias("at"))
    values, labels, width = matrix(placed, "at")
    heat = go.Heatmap(
        z=values, y=labels, zmin=-0.5, zmax=len(WIDTHS) - 0.5, colorscale=_steps(theme), hoverongaps=False,
        colorbar=colorbar("bits of a weight", tickvals=list(range(len(WIDTHS))), ticktext=list(WIDTHS)),
        hovertemplate="layer %{y}, expert %{x}<extra></extra>",
    )  # fmt: skip
    if values.size <= MAX_DETAIL_CELLS:
        words = _words(frame, labels, width)
        heat.update(customdata=words, hovertemplate="layer %{y}, expert %{x}<br>%{customdata}<extra></extra>")
    if values.size <= WRITTEN_CELLS:
        short = {float(place): {"ternary": "t", "as it is": "–"}.get(name, name) for name, place in places.items()}
        heat.update(text=[[short.get(float(one), "") for one in row] for row in values], texttemplate="%{text}")
    figure = go.Figure(heat)
    gone = frame.filter("gone")
    if len(gone) and values.size <= MARKED_CELLS:
        figure.add_scatter(
            x=gone["expert"], y=gone["label"], mode="markers", hoverinfo="skip", showlegend=False,
            marker={"symbol": "x-thin", "size": 7, "line": {"width": 1.2, "color": palette(theme).muted}},
        )  # fmt: skip
    return expert_map(figure, title=title, labels=labels, width=width, theme=theme)


def histogram(frame: pl.DataFrame, *, title: str, theme: Theme = "light") -> go.Figure:
    """Share of the experts' weights by width.

    frame: ``app.frames.compress_bits.histogram``.
    """
    if frame.is_empty():
        return message("The plan gives no expert a width.", title=title, theme=theme)
    figure = go.Figure(
        go.Bar(
            x=frame["width"], y=frame["share"], marker={"color": palette(theme).accent}, cliponaxis=False,
            text=[f"{share:.1%}" for share in frame["share"]], textposition="outside",
            customdata=frame.select("experts", "projections", "weights").rows(),
            hovertemplate="%{x} bits: %{y:.1%} of the weights<br>%{customdata[0]:,} experts, %{customdata[1]:,} "
            "projections, %{customdata[2]:,} weights<extra></extra>",
        )
    )  # fmt: skip
    layout(figure, title=title, x="bits of a weight", y="share of the experts' weights", theme=theme, height=340,
           legend=False, wide=False, bargap=0.4)  # fmt: skip
    order = [name for name in WIDTHS if name in set(frame["width"])]
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=order, showgrid=False)
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return figure


def cost_by_layer(frame: pl.DataFrame, *, title: str, theme: Theme = "light") -> go.Figure:
    """Predicted cost by decoder layer, stacked by what changes the residual stream.

    frame: ``app.frames.compress_bits.turns``.
    """
    if frame.is_empty():
        return message("The run cannot price this plan.", title=title, theme=theme)
    figure, wheel = go.Figure(), palette(theme).categorical
    for place, (kind, words) in enumerate(CHANGES.items()):
        part = frame.filter(pl.col("change") == kind)
        if part["kl"].sum() > 0:
            figure.add_bar(
                x=[str(layer) for layer in part["layer"]], y=part["kl"], name=words, marker={"color": wheel[place]},
                customdata=part["turned"],
                hovertemplate=f"layer %{{x}}: %{{y:.3g}} nats by {safe(words)}<br>turns the stream by "
                "%{customdata:.3g}<extra></extra>",
            )  # fmt: skip
    layout(figure, title=title, x="decoder layer", y="predicted KL, nats per token", theme=theme, height=340,
           wide=False, barmode="stack", bargap=0.3)  # fmt: skip
    order = [str(layer) for layer in sorted(frame["layer"].unique())]
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=order, nticks=24, showgrid=False)
    figure.update_yaxes(rangemode="tozero", exponentformat="power")
    return pickable(figure, layer="x")


def _words(frame: pl.DataFrame, labels: list[str], width: int) -> NDArray[np.object_]:
    """(layers, experts) the widths of all projections in words; a large map has to do without."""
    words: NDArray[np.object_] = np.full((len(labels), width), "", dtype=object)
    rows = {label: row for row, label in enumerate(labels)}
    for label, expert, *bits in frame.select("label", "expert", "gate", "up", "down").iter_rows():
        names = [f"{name} {one}" for name, one in zip(("gate", "up", "down"), bits, strict=True) if one is not None]
        words[rows[label], expert] = ", ".join(names)
    return words


def _steps(theme: Theme) -> list[tuple[float, str]]:
    """One colour per width, the narrowest the strongest: it costs most."""
    colours = palette(theme).sequential
    chosen = [colours[round(place)] for place in np.linspace(len(colours) - 1, 0, len(WIDTHS))]
    count = len(chosen)
    return [(at, colour) for place, colour in enumerate(chosen) for at in (place / count, (place + 1) / count)]
