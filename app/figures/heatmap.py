"""Maps of layers x experts."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl
from numpy.typing import NDArray

from app.figures.style import Theme, colorbar, layout, message, palette, pickable, rows_height, safe, scale

MAX_DETAIL_CELLS = 8192
"""Up to so many cells the hover text carries a second figure; beyond, the map carries its values only."""


def matrix(frame: pl.DataFrame, value: str) -> tuple[NDArray[np.float32], list[str], int]:
    """The frame (one row per label and expert) as (layers, experts) float32, NaN without a row; labels; experts."""
    labels = frame["label"].unique(maintain_order=True).to_list()
    width = int(frame["expert"].max()) + 1 if len(frame) else 0  # type: ignore[arg-type]
    cells = np.full((len(labels), width), np.nan, np.float32)
    rows = frame["label"].replace_strict(labels, range(len(labels)), return_dtype=pl.Int64).to_numpy()
    cells[rows, frame["expert"].to_numpy()] = frame[value].cast(pl.Float32).fill_null(float("nan")).to_numpy()
    return cells, labels, width


def load_map(
    frame: pl.DataFrame, *, value: str = "relative", where: str = "all text", theme: Theme = "light"
) -> go.Figure:
    """Load of every expert: share of the layer's selections, or relative to the uniform share.

    frame: ``app.frames.load.expert_load``. value "relative" is drawn diverging around 1 (log2), "share" sequential.
    """
    title = f"Load of each expert, {where}"
    if frame.is_empty() or not frame["tokens"].sum():
        return message("No selections recorded for this choice.", title=title, theme=theme)
    share, labels, width = matrix(frame, "share")
    tokens, _, _ = matrix(frame, "tokens")
    relative, _, _ = matrix(frame, "relative")
    if value == "relative":
        with np.errstate(divide="ignore"):
            logs = np.log2(relative)
        bound = float(np.clip(np.ceil(np.nanmax(np.abs(logs))), 1.0, 3.0))
        cells = np.clip(logs, -bound, bound).astype(np.float32)
        colours: dict[str, Any] = {
            "colorscale": scale(palette(theme).diverging),
            "zmid": 0.0,
            "zmin": -bound,
            "zmax": bound,
            "colorbar": colorbar("times the uniform share", **_factor_ticks(int(bound))),
        }
    else:
        cells = share * 100
        colours = {
            "colorscale": scale(palette(theme).sequential),
            "zmin": 0.0,
            "colorbar": colorbar("% of selections", ticksuffix=" %"),
        }
    hover = "layer %{y}, expert %{x}<br>%{customdata[0]:.2%} of the layer's selections"
    hover += "<br>%{customdata[1]:.2f} × the uniform share<br>%{customdata[2]:,.0f} tokens<extra></extra>"
    heat = go.Heatmap(z=cells, y=labels, hoverongaps=False, **colours)
    if cells.size <= MAX_DETAIL_CELLS:
        heat.update(customdata=np.stack([share, relative, tokens], axis=-1).astype(np.float32), hovertemplate=hover)
    elif value == "relative":
        words = "layer %{y}, expert %{x}<br>%{customdata:,} % of the uniform share<extra></extra>"
        heat.update(customdata=percent_of_chance(relative), hovertemplate=words)
    else:
        heat.update(hovertemplate="layer %{y}, expert %{x}<br>%{z:.3f} % of selections<extra></extra>")
    return expert_map(go.Figure(heat), title=title, labels=labels, width=width, theme=theme)


def difference_map(frame: pl.DataFrame, *, domain: str, theme: Theme = "light") -> go.Figure:
    """How one domain's load differs from the mean of the domains, in percentage points.

    frame: ``app.frames.domains.domain_shares`` of one domain.
    """
    title = f"Load of {safe(domain)} against the mean of the domains"
    if frame.is_empty():
        return message("No selections of this domain.", title=title, theme=theme)
    points, labels, width = matrix(frame.with_columns((pl.col("difference") * 100).alias("points")), "points")
    share, _, _ = matrix(frame, "share")
    pooled, _, _ = matrix(frame, "pooled_share")
    bound = max(float(np.nanmax(np.abs(points))), 1e-6)
    hover = "layer %{y}, expert %{x}<br>%{customdata[0]:.2%} of the domain's selections"
    hover += "<br>%{customdata[1]:.2%} in the mean of the domains<br>difference %{z:+.2f} points<extra></extra>"
    heat = go.Heatmap(
        z=points,
        y=labels,
        zmid=0.0,
        zmin=-bound,
        zmax=bound,
        colorscale=scale(palette(theme).diverging),
        colorbar=colorbar("percentage points"),
        hovertemplate=hover,
        hoverongaps=False,
    )
    if points.size <= MAX_DETAIL_CELLS:
        heat.update(customdata=np.stack([share, pooled], axis=-1).astype(np.float32))
    else:
        heat.update(hovertemplate="layer %{y}, expert %{x}<br>difference %{z:+.2f} points<extra></extra>")
    return expert_map(go.Figure(heat), title=title, labels=labels, width=width, theme=theme)


def percent_of_chance(ratios: NDArray[np.floating[Any]]) -> NDArray[np.uint16 | np.uint32]:
    """Ratios to chance as whole per cent, for the hover text of a large map: two bytes a cell; unknown ones are 0."""
    percent = np.nan_to_num(ratios * 100, nan=0.0, posinf=0.0).round()
    return percent.astype(np.uint16 if percent.max(initial=0) <= np.iinfo(np.uint16).max else np.uint32)


def _factor_ticks(bound: int) -> dict[str, Any]:
    """Ticks of a log2 scale in words: 1/2 .. 2 up to 1/8 .. 8; the ends hold what lies beyond."""
    values = list(range(-bound, bound + 1))
    words = {-3: "⅛", -2: "¼", -1: "½", 0: "1", 1: "2", 2: "4", 3: "8"}
    texts = [words[value] for value in values]
    texts[0], texts[-1] = f"≤ {texts[0]}", f"≥ {texts[-1]}"
    return {"tickvals": values, "ticktext": texts}


def expert_map(figure: go.Figure, *, title: str, labels: list[str], width: int, theme: Theme) -> go.Figure:
    layout(
        figure,
        title=title,
        x=f"expert (0 to {width - 1})",
        y="layer",
        theme=theme,
        height=rows_height(len(labels)),
        legend=False,
    )
    figure.update_yaxes(
        type="category",
        range=[len(labels) - 0.5, -0.5],  # marks on the map would otherwise leave a margin
        showgrid=False,
        categoryorder="array",
        categoryarray=labels,
        nticks=24,
        ticks="",
    )
    named = figure.data[0].x is not None
    figure.update_xaxes(showgrid=False, zeroline=False, ticks="", type="category" if named else "linear", nticks=24)
    if not named:
        figure.update_xaxes(range=[-0.5, width - 0.5], **({"dtick": 1} if width <= 24 else {}))
    return pickable(figure, layer="y", expert="x")
