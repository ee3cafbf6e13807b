"""Axes and kinds: experts by value of an axis, how far values lie apart, and what kinds take of the selections."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import polars as pl

from app.figures.interval import whiskers
from app.figures.layers import curve, over_layers
from app.figures.style import (
    Theme,
    colorbar,
    layout,
    message,
    palette,
    pickable,
    rows_height,
    safe,
    scale,
)

_BOUND = 2.0
_TICKS = {"tickvals": [-2, -1, 0, 1, 2], "ticktext": ["≤ ¼", "½", "1", "2", "≥ 4"]}


def share_map(frame: pl.DataFrame, *, axis: str, label: str, theme: Theme = "light") -> go.Figure:
    """Value x expert: share of the value's selections over that of all. frame: ``app.frames.axis.shares``."""
    title = f"Experts by {safe(axis, 30)}, layer {safe(label)}"
    if frame.is_empty():
        return message("No token of this axis was recorded.", title=title, theme=theme)
    places = frame["place"].unique(maintain_order=True).to_list()
    names = [safe(name, 24) for name in frame.unique("place", maintain_order=True)["value"]]
    width = int(frame["expert"].max()) + 1  # type: ignore[arg-type]
    cells = np.full((len(places), width), np.nan)
    detail = np.zeros((len(places), width, 3), np.float32)
    rows = frame["place"].replace_strict(places, range(len(places)), return_dtype=pl.Int64).to_numpy()
    experts = frame["expert"].to_numpy()
    with np.errstate(divide="ignore"):
        cells[rows, experts] = np.log2(frame["ratio"].cast(pl.Float64).fill_null(float("nan")).to_numpy())
    columns = [pl.col("share").fill_null(0), pl.col("pooled_share").fill_null(0), pl.col("tokens").cast(pl.Float64)]
    detail[rows, experts] = frame.select(columns).to_numpy()
    hover = f"{safe(axis, 30)} %{{y}}, expert %{{x}}<br>%{{customdata[0]:.2%}} of its selections"
    hover += "<br>%{customdata[1]:.2%} of all selections<br>%{customdata[2]:,.0f} tokens<extra></extra>"
    figure = go.Figure(
        go.Heatmap(
            z=np.clip(cells, -_BOUND, _BOUND).astype(np.float32), y=list(range(len(names))), customdata=detail,
            hovertemplate=hover.replace("%{y}", "%{text}"), text=[[name] * width for name in names], hoverongaps=False,
            colorscale=scale(palette(theme).diverging), zmid=0.0, zmin=-_BOUND, zmax=_BOUND,
            colorbar=colorbar("times the share of all", **_TICKS),
        )
    )  # fmt: skip
    layout(
        figure, title=title, x=f"expert (0 to {width - 1})", y=safe(axis, 30), theme=theme,
        height=rows_height(len(names), each=24), legend=False,
    )  # fmt: skip
    figure.update_yaxes(
        range=[len(names) - 0.5, -0.5], showgrid=False, zeroline=False, ticks="", tickmode="array",
        tickvals=list(range(len(names))), ticktext=names,
    )  # fmt: skip
    figure.update_xaxes(
        showgrid=False, zeroline=False, ticks="", dtick=max(1, -(-width // 24)), range=[-0.5, width - 0.5]
    )
    return pickable(figure, layer=f"={label}", expert="x")


def distance_curves(frame: pl.DataFrame, *, axis: str, theme: Theme = "light") -> go.Figure:
    """How much routing depends on an axis, over the layers. frame: ``frames.axis.distances`` of the axis as a whole."""
    title = f"How much routing goes with {safe(axis, 30)}"
    if frame.is_empty():
        return message("Computed when the run is finished.", title=title, theme=theme)
    colours = palette(theme)
    figure = go.Figure()
    curve(
        figure, frame, "distance", name="as labelled", colour=colours.accent,
        hover="layer %{x}<br>%{y:.1%} of the selections",
    )  # fmt: skip
    chance = frame.select("label", "chance", low="chance_low", high="chance_high")
    curve(
        figure, chance, "chance", name="shuffled", colour=colours.muted, dash="dot", width=1.5, markers=False,
        hover="layer %{x}<br>%{y:.1%} with values shuffled",
    )  # fmt: skip
    layout(figure, title=title, x="layer", y="distance from the average", theme=theme, height=400, wide=False)
    return over_layers(figure, percent=True)


def value_distances(frame: pl.DataFrame, *, axis: str, label: str, theme: Theme = "light") -> go.Figure:
    """How far each value of an axis lies from the average in one layer. frame: ``frames.axis.distances`` of both."""
    title = f"Distance by {safe(axis, 30)}, layer {safe(label)}"
    if frame.is_empty():
        return message("Computed when the run is finished.", title=title, theme=theme)
    colours = palette(theme)
    x = list(range(len(frame)))
    names = [safe(name, 24) for name in frame["value"]]
    figure = go.Figure(
        go.Bar(
            x=x, y=frame["distance"], name="as labelled", marker={"color": colours.accent},
            error_y=whiskers(frame["distance"], frame["low"], frame["high"], colour=colours.text), customdata=names,
            text=None, hovertemplate=f"{safe(axis, 30)} %{{customdata}}<br>%{{y:.1%}} of its selections<extra></extra>",
            width=0.62,
        )
    )  # fmt: skip
    figure.add_scatter(
        x=x, y=frame["chance"], mode="markers", name="shuffled", customdata=names,
        marker={"symbol": "line-ew", "size": 16, "line": {"color": colours.alarm, "width": 3}},
        hovertemplate=f"{safe(axis, 30)} %{{customdata}}<br>%{{y:.1%}} with values shuffled<extra></extra>",
    )  # fmt: skip
    layout(figure, title=title, x=safe(axis, 30), y="distance from the average", theme=theme, height=400, wide=False)
    _name_places(figure, names)
    return figure.update_yaxes(tickformat=".0%", rangemode="tozero")


def value_spread(frame: pl.DataFrame, *, axis: str, label: str, theme: Theme = "light") -> go.Figure:
    """Entropy of the load and effective experts by value. frame: ``app.frames.axis.values``."""
    title = f"Active experts by {safe(axis, 30)}, layer {safe(label)}"
    if frame.is_empty():
        return message("No token of this axis was recorded.", title=title, theme=theme)
    colours = palette(theme)
    names = [safe(name, 24) for name in frame["value"]]
    x = list(range(len(names)))
    extra = [
        [name, *row]
        for name, row in zip(names, frame.select("entropy", "tokens", "experts_per_token").rows(), strict=True)
    ]
    hover = (
        f"{safe(axis, 30)} %{{customdata[0]}}<br>%{{y:.2f}} effective experts<br>entropy %{{customdata[1]:.3f}} of ln E"
    )
    hover += "<br>%{customdata[3]:.2f} experts per token<br>%{customdata[2]:,} tokens<extra></extra>"
    figure = go.Figure()
    for column, name, colour in (
        ("effective_experts", "effective experts", colours.accent),
        ("experts_per_token", "experts per token", colours.categorical[1]),
    ):
        figure.add_scatter(
            x=x, y=frame[column], mode="lines+markers", name=name, line={"color": colour, "width": 2},
            marker={"size": 6}, customdata=extra, hovertemplate=hover if column == "effective_experts" else
            f"{safe(axis, 30)} %{{customdata[0]}}<br>%{{y:.2f}} experts per token<extra></extra>",
        )  # fmt: skip
    layout(figure, title=title, x=safe(axis, 30), y="experts", theme=theme, height=400, wide=False)
    _name_places(figure, names)
    return figure.update_yaxes(rangemode="tozero")


def kind_bars(frame: pl.DataFrame, *, words: dict[str, str], where: str, theme: Theme = "light") -> go.Figure:
    """What each kind of expert takes of the selections, over the layers. frame: ``app.frames.kinds.shares``."""
    title = f"Kinds of experts, {where}"
    if frame.is_empty():
        return message("No selection was recorded for this choice.", title=title, theme=theme)
    figure = go.Figure()
    labels = frame["label"].unique(maintain_order=True).to_list()
    for kind, colour in _kind_colours(theme).items():
        part = frame.filter(pl.col("kind") == kind)
        if part.is_empty():
            continue
        extra = part.select("even", "experts", "computed").to_numpy()
        figure.add_bar(
            x=part["label"].to_list(), y=part["share"], name=words[kind], marker={"color": colour}, customdata=extra,
            hovertemplate=f"layer %{{x}}, {words[kind]}<br>%{{y:.1%}} of the selections"
            "<br>%{customdata[0]:.1%} of the experts (%{customdata[1]:.0f})"
            "<br>%{customdata[2]:.2f} experts with a network per token<extra></extra>",
        )  # fmt: skip
    even = frame.filter(pl.col("kind") == "routed")
    figure.add_scatter(
        x=even["label"].to_list(), y=even["even"], mode="markers", name="networks by number",
        marker={"symbol": "line-ew", "size": 18, "line": {"color": palette(theme).text, "width": 2}},
        hovertemplate="layer %{x}<br>%{y:.1%} if all experts were alike<extra></extra>",
    )  # fmt: skip
    layout(
        figure, title=title, x="layer", y="share of the selections", theme=theme, height=400, wide=False,
        barmode="stack", bargap=0.3,
    )  # fmt: skip
    return over_layers(figure, percent=True, labels=labels)


def class_bars(frame: pl.DataFrame, *, words: dict[str, str], where: str, theme: Theme = "light") -> go.Figure:
    """What each kind takes of the selections of each class of tokens. frame: ``frames.kinds.by_token().classes``."""
    title = f"Kinds by class of tokens, {where}"
    if frame.is_empty():
        return message("The run keeps no text.", title=title, theme=theme)
    figure = go.Figure()
    for kind, colour in _kind_colours(theme).items():
        part = frame.filter(pl.col("kind") == kind)
        if part.is_empty():
            continue
        figure.add_bar(
            y=part["token_class"].to_list(), x=part["share"], orientation="h", name=words[kind],
            marker={"color": colour}, customdata=part.select("computed", "tokens").to_numpy(),
            hovertemplate=f"%{{y}}, {words[kind]}<br>%{{x:.1%}} of the selections"
            "<br>%{customdata[0]:.2f} experts with a network per token<br>%{customdata[1]:,} tokens<extra></extra>",
        )  # fmt: skip
    classes = frame["token_class"].unique(maintain_order=True).to_list()
    layout(
        figure, title=title, x="share of the selections", y="", theme=theme, height=400, wide=False, barmode="stack",
        bargap=0.3,
    )  # fmt: skip
    figure.update_xaxes(tickformat=".0%", range=[0, 1.02], tickvals=[0, 0.25, 0.5, 0.75, 1])
    return figure.update_yaxes(
        type="category", categoryorder="array", categoryarray=classes, autorange="reversed", showgrid=False
    )


def _name_places(figure: go.Figure, names: list[str]) -> None:
    """Values stand at even distances, named; of many, every n-th has its name."""
    every = max(1, -(-len(names) // 12))
    shown = list(range(0, len(names), every))
    figure.update_xaxes(
        tickmode="array", tickvals=shown, ticktext=[names[at] for at in shown], showgrid=False, zeroline=False
    )


def _kind_colours(theme: Theme) -> dict[str, str]:
    colours = palette(theme)
    wheel = colours.categorical
    return {"routed": wheel[0], "copy": wheel[1], "zero": wheel[8], "constant": wheel[3]}
