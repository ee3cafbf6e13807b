"""Maps of layers x experts."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl
from numpy.typing import NDArray

from app.figures.style import Theme, colorbar, layout, message, palette, rows_height, scale

MAX_DETAIL_CELLS = 8192
"""Up to so many cells the hover text carries a second figure; beyond, the map carries its values only."""


def matrix(frame: pl.DataFrame, value: str) -> tuple[NDArray[np.float32], list[str], int]:
    """The frame (one row per label and expert) as (layers, experts) float32, NaN where it has no row; and its labels."""
    labels = frame["label"].unique(maintain_order=True).to_list()
    width = int(frame["expert"].max()) + 1 if len(frame) else 0  # type: ignore[arg-type]
    cells = np.full((len(labels), width), np.nan, np.float32)
    row = {label: index for index, label in enumerate(labels)}
    rows = np.array([row[label] for label in frame["label"]], int)
    cells[rows, frame["expert"].to_numpy()] = frame[value].cast(pl.Float32).fill_null(float("nan")).to_numpy()
    return cells, labels, width


def load_map(frame: pl.DataFrame, *, value: str = "relative", where: str = "all text", theme: Theme = "light") -> go.Figure:
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
            cells = np.clip(np.log2(relative), -3.0, 3.0).astype(np.float32)
        colours: dict[str, Any] = {
            "colorscale": scale(palette(theme).diverging), "zmid": 0.0, "zmin": -3.0, "zmax": 3.0,
            "colorbar": colorbar("times the uniform share", theme, tickvals=[-3, -2, -1, 0, 1, 2, 3],
                                 ticktext=["≤ ⅛", "¼", "½", "1", "2", "4", "≥ 8"]),
        }  # fmt: skip
    else:
        cells = share * 100
        colours = {"colorscale": scale(palette(theme).sequential), "zmin": 0.0,
                   "colorbar": colorbar("% of selections", theme, ticksuffix=" %")}  # fmt: skip
    hover = "layer %{y}, expert %{x}<br>%{customdata[0]:.2%} of the layer's selections"
    hover += "<br>%{customdata[1]:.2f} × the uniform share<br>%{customdata[2]:,.0f} tokens<extra></extra>"
    heat = go.Heatmap(z=cells, y=labels, hoverongaps=False, **colours)
    if cells.size <= MAX_DETAIL_CELLS:
        heat.update(customdata=np.stack([share, relative, tokens], axis=-1).astype(np.float32), hovertemplate=hover)
    elif value == "relative":
        heat.update(hovertemplate="layer %{y}, expert %{x}<br>2^%{z:.2f} × the uniform share<extra></extra>")
    else:
        heat.update(hovertemplate="layer %{y}, expert %{x}<br>%{z:.3f} % of selections<extra></extra>")
    return _map(go.Figure(heat), title=title, labels=labels, width=width, theme=theme)


def difference_map(frame: pl.DataFrame, *, domain: str, theme: Theme = "light") -> go.Figure:
    """How one domain's load differs from the mean of the domains, in percentage points.

    frame: ``app.frames.domains.domain_shares`` of one domain.
    """
    from app.figures.style import safe

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
        z=points, y=labels, zmid=0.0, zmin=-bound, zmax=bound, colorscale=scale(palette(theme).diverging),
        colorbar=colorbar("percentage points", theme), hovertemplate=hover, hoverongaps=False,
    )  # fmt: skip
    if points.size <= MAX_DETAIL_CELLS:
        heat.update(customdata=np.stack([share, pooled], axis=-1).astype(np.float32))
    else:
        heat.update(hovertemplate="layer %{y}, expert %{x}<br>difference %{z:+.2f} points<extra></extra>")
    return _map(go.Figure(heat), title=title, labels=labels, width=width, theme=theme)


def output_map(frame: pl.DataFrame, *, tokens: str = "all", theme: Theme = "light") -> go.Figure:
    """Largest |down_proj output| of every expert on a log scale, super experts by the paper's rule ringed.

    frame: ``app.frames.super_experts.output_maxima``. Shared experts stand in columns of their own at the right.
    """
    words = "all tokens" if tokens == "all" else "first routed token of each sequence"
    title = f"Largest output of each expert, {words}"
    placed, columns = _with_columns(frame)
    if placed.is_empty() or not (placed["value"] > 0).any():
        return message("No expert outputs recorded.", title=title, theme=theme)
    cells, labels, width = matrix(placed.sort("layer", "step"), "value")
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(cells > 0, np.log10(cells), np.nan).astype(np.float32)
    low, high = float(np.floor(np.nanmin(logs))), float(np.ceil(np.nanmax(logs)))
    ticks = np.arange(low, high + 1)
    heat = go.Heatmap(
        z=logs, x=columns[:width], y=labels, colorscale=scale(palette(theme).sequential), zmin=low, zmax=high, hoverongaps=False,
        colorbar=colorbar("largest |output|", theme, tickvals=ticks, ticktext=[f"{10.0**tick:g}" for tick in ticks]),
    )  # fmt: skip
    if cells.size <= MAX_DETAIL_CELLS:
        heat.update(customdata=cells, hovertemplate="layer %{y}, expert %{x}<br>largest |output| %{customdata:,.3g}<extra></extra>")
    else:
        heat.update(hovertemplate="layer %{y}, expert %{x}<br>largest |output| 10^%{z:.2f}<extra></extra>")
    figure = go.Figure(heat)
    marked = placed.filter(pl.col("paper"))
    if len(marked):
        figure.add_scatter(
            x=[columns[index] for index in marked["expert"]], y=marked["label"].to_list(), mode="markers", showlegend=False,
            marker={"symbol": "circle-open", "size": 15, "color": palette(theme).alarm, "line": {"width": 2.5}},
            customdata=marked["value"].to_numpy(),
            hovertemplate="super expert<br>layer %{y}, expert %{x}<br>largest |output| %{customdata:,.3g}<extra></extra>",
        )  # fmt: skip
    return _map(figure, title=title, labels=labels, width=width, theme=theme)


def _with_columns(frame: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
    """The frame with shared experts moved behind the routed ones, and the name of every column of the map."""
    routed = frame.filter(pl.col("kind") == "routed")
    shared = frame.filter(pl.col("kind") == "shared")
    count = int(routed["expert"].max()) + 1 if len(routed) else 0  # type: ignore[arg-type]
    extra = int(shared["expert"].max()) + 1 if len(shared) else 0  # type: ignore[arg-type]
    moved = shared.with_columns((pl.col("expert") + count).cast(frame.schema["expert"]))
    names = [str(index) for index in range(count)] + [f"shared {index}" for index in range(extra)]
    return pl.concat([routed, moved]), names


def _map(figure: go.Figure, *, title: str, labels: list[str], width: int, theme: Theme) -> go.Figure:
    layout(figure, title=title, x=f"expert (0 to {width - 1})", y="layer", theme=theme,
           height=rows_height(len(labels)), legend=False)  # fmt: skip
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False, categoryorder="array", categoryarray=labels,
                        nticks=24, ticks="")  # fmt: skip
    figure.update_xaxes(showgrid=False, zeroline=False, ticks="", type="category" if figure.data[0].x is not None else "linear")
    figure.update_xaxes(nticks=24)
    return figure
