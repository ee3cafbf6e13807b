"""Similarity of experts: a map of pairs in clustered order, a band over the layers, and agreement between kinds."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl
from numpy.typing import NDArray

from app.figures.interval import band
from app.figures.style import Theme, colorbar, layout, message, palette, pickable, safe, scale

_NOTHING = "This run says nothing of this kind in this layer."
_WORDS = {"similarity": "similarity", "angular": "1 − arccos(s) / π", "shifted": "(s + 1) / 2"}


def similarity_map(
    frame: pl.DataFrame, *, title: str, layer: str, value: str = "similarity", theme: Theme = "light"
) -> go.Figure:
    """Experts by experts in the frame's order, the diagonal left out; a click picks the expert of the row.

    frame: ``app.frames.similarity.matrix`` of one layer, whose label ``layer`` is. Values on both sides of 0 are drawn
    diverging around it, others from the least to the most.
    """
    if frame[value].drop_nulls().is_empty():
        return message(_NOTHING, title=title, theme=theme, height=420)
    cells, experts = _cells(frame, value)
    names = [str(expert) for expert in experts]
    colours: dict[str, Any] = {"colorscale": scale(palette(theme).sequential)}
    least, most = float(np.nanmin(cells)), float(np.nanmax(np.abs(cells)))
    if least < -0.05 * most:
        colours = {"colorscale": scale(palette(theme).diverging), "zmid": 0.0, "zmin": -most, "zmax": most}
    figure = go.Figure(
        go.Heatmap(
            z=cells,
            x=names,
            y=names,
            hoverongaps=False,
            colorbar=colorbar(_WORDS[value]),
            hovertemplate="experts %{y} and %{x}<br>" + _WORDS[value] + " %{z:.3f}<extra></extra>",
            **colours,
        )
    )
    layout(figure, title=title, x="expert", y="expert", theme=theme, height=460, legend=False)
    axis = {"type": "category", "showgrid": False, "zeroline": False, "ticks": "", "nticks": 20}
    figure.update_xaxes(categoryorder="array", categoryarray=names, **axis)
    figure.update_yaxes(categoryorder="array", categoryarray=names, autorange="reversed", **axis)
    return pickable(figure, layer=f"={layer}", expert="y")


def redundancy_band(frame: pl.DataFrame, *, title: str, theme: Theme = "light") -> go.Figure:
    """Similarity of a layer's pairs over the layers: largest, middle 90 % and 50 %, median, and random vectors.

    frame: ``app.frames.similarity.redundancy`` of one kind.
    """
    if frame.is_empty():
        return message("This run says nothing of this kind.", title=title, theme=theme)
    colours = palette(theme)
    x = frame["label"].to_list()
    figure = go.Figure()
    # Both bands have one entry in the legend, where their colours would look alike.
    for upper, lower, words in (("p95", "p05", "middle 90 % and 50 % of pairs"), ("p75", "p25", "")):
        band(figure, x=x, low=frame[lower], high=frame[upper], colour=colours.accent, name=words)
    extra = frame.select("p05", "p95", "pairs", "mean").to_numpy()
    hover = "layer %{x}<br>median %{y:.3f}, mean %{customdata[3]:.3f}"
    hover += "<br>90 % of pairs %{customdata[0]:.3f} to %{customdata[1]:.3f}"
    hover += "<br>%{customdata[2]:,.0f} pairs<extra></extra>"
    figure.add_scatter(
        x=x, y=frame["p50"], customdata=extra, mode="lines+markers", name="median pair", hovertemplate=hover,
        line={"color": colours.accent, "width": 2}, marker={"size": 6},
    )  # fmt: skip
    pair = frame.select("expert", "other").to_numpy()
    figure.add_scatter(
        x=x, y=frame["largest"], customdata=pair, mode="markers", name="most alike pair",
        hovertemplate="layer %{x}<br>experts %{customdata[0]} and %{customdata[1]}: %{y:.3f}<extra></extra>",
        marker={"size": 7, "color": colours.alarm, "symbol": "diamond"},
    )  # fmt: skip
    if frame["chance"].drop_nulls().len():
        figure.add_scatter(
            x=x, y=frame["chance"], mode="lines", name="random vectors, mean |value|",
            line={"color": colours.muted, "dash": "dot", "width": 1.5},
            hovertemplate="layer %{x}<br>random vectors ±%{y:.4f}<extra></extra>",
        )  # fmt: skip
    layout(figure, title=title, x="layer", y="similarity of pairs", theme=theme, height=400)
    figure.update_xaxes(type="category", showgrid=False, nticks=24)
    return pickable(figure, layer="x")


def agreement_map(
    frame: pl.DataFrame,
    titles: dict[str, str],
    *,
    title: str,
    theme: Theme = "light",
    beside: tuple[str, str, str] = ("r_squared", "R²", "renamed experts"),
) -> go.Figure:
    """Kinds by kinds of one layer: rank correlation; those that chance could give in brackets.

    frame: ``app.frames.similarity.agreement`` of one layer, or ``app.frames.coverage.agreement``. titles: by kind.
    beside: a further column for the hover text, its words, and what the band of chance is of.
    """
    column, words, band = beside
    if frame.is_empty():
        return message("Two kinds are needed to compare them.", title=title, theme=theme, height=420)
    kinds = list(dict.fromkeys([*frame["first"], *frame["second"]]))
    kinds = [kind for kind in titles if kind in kinds]
    place = {kind: index for index, kind in enumerate(kinds)}
    cells = np.full((len(kinds), len(kinds)), np.nan)
    texts = np.full(cells.shape, "", dtype=object)
    hover = np.full((*cells.shape, 3), np.nan)
    for row in frame.iter_rows(named=True):
        i, j = sorted((place[row["first"]], place[row["second"]]), reverse=True)
        if row["spearman"] is None:
            continue
        cells[i, j] = row["spearman"]
        chance = row["low"] <= row["spearman"] <= row["high"]
        texts[i, j] = f"<i>({row['spearman']:.2f})</i>" if chance else f"{row['spearman']:.2f}"
        hover[i, j] = row["low"], row["high"], row[column]
    names = [safe(titles[kind]) for kind in kinds]
    template = f"%{{y}}<br>%{{x}}<br>rank correlation %{{z:.3f}}<br>{band} %{{customdata[0]:.2f}} to "
    template += f"%{{customdata[1]:.2f}}<br>{words} %{{customdata[2]:.3f}}<extra></extra>"
    figure = go.Figure(
        go.Heatmap(
            z=cells[1:, :-1], x=names[:-1], y=names[1:], text=texts[1:, :-1], customdata=hover[1:, :-1],
            texttemplate="%{text}", textfont={"size": 11}, hovertemplate=template, hoverongaps=False,
            colorscale=scale(palette(theme).diverging), zmid=0.0, zmin=-1.0, zmax=1.0,
            colorbar=colorbar("rank correlation"),
        )
    )  # fmt: skip
    layout(figure, title=title, x="", y="", theme=theme, height=440, legend=False)
    figure.update_xaxes(type="category", showgrid=False, ticks="")
    figure.update_yaxes(type="category", showgrid=False, ticks="", autorange="reversed")
    return figure


def agreement_curve(frame: pl.DataFrame, *, title: str, theme: Theme = "light") -> go.Figure:
    """Rank correlation of two kinds over the layers, beside the band of renamed experts.

    frame: ``app.frames.similarity.agreement`` of two kinds.
    """
    if frame.is_empty():
        return message("Choose two different kinds that this run has.", title=title, theme=theme, height=420)
    colours = palette(theme)
    x = frame["label"].to_list()
    figure = go.Figure()
    band(figure, x=x, low=frame["low"], high=frame["high"], colour=colours.muted, name="95 % of renamed experts")
    extra = frame.select("low", "high", "p_value", "kendall", "r_squared", "pairs").to_numpy()
    hover = "layer %{x}<br>Spearman %{y:.3f}, Kendall %{customdata[3]:.3f}, R² %{customdata[4]:.3f}"
    hover += "<br>renamed experts %{customdata[0]:.3f} to %{customdata[1]:.3f}, p = %{customdata[2]:.3f}"
    hover += "<br>%{customdata[5]:,.0f} pairs<extra></extra>"
    figure.add_scatter(
        x=x, y=frame["spearman"], customdata=extra, mode="lines+markers", name="the experts as they are",
        hovertemplate=hover, line={"color": colours.accent, "width": 2}, marker={"size": 6},
    )  # fmt: skip
    layout(figure, title=title, x="layer", y="rank correlation (−1 to 1)", theme=theme, height=340)
    figure.update_xaxes(type="category", showgrid=False, nticks=24)
    return pickable(figure, layer="x")


def _cells(frame: pl.DataFrame, value: str) -> tuple[NDArray[np.float32], list[int]]:
    """(experts, experts) in the frame's order, and the experts in it."""
    size = int(frame["place"].max()) + 1  # type: ignore[arg-type]
    cells = np.full((size, size), np.nan, np.float32)
    values = frame[value].cast(pl.Float32).fill_null(float("nan")).to_numpy()
    cells[frame["place"].to_numpy(), frame["other_place"].to_numpy()] = values
    order = frame.unique("place").sort("place")
    return cells, order["expert"].to_list()
