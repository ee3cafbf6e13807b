"""Experts as points: one point per expert, coloured by its layer; a click picks it."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl

from app.figures.style import Theme, colorbar, palette, pickable, scale

MOST_DRAWN_AS_SHAPES = 2000
"""More points are drawn by the graphics card."""


def expert_points(frame: pl.DataFrame, *, x: str, y: str, hover: str, theme: Theme = "light") -> go.Figure:
    """A figure of points; callers add its layout.

    Args:
        frame: one row per expert with layer, step, label and expert, and the columns ``x`` and ``y``.
        hover: what hovering says after the expert.
    """
    layers = frame["layer"].to_numpy().astype(np.int16)
    first, last = int(layers.min()), int(layers.max())
    points = go.Scattergl if len(frame) > MOST_DRAWN_AS_SHAPES else go.Scatter
    figure = go.Figure(
        points(
            x=frame[x].cast(pl.Float32), y=frame[y].cast(pl.Float32), mode="markers", name="expert", showlegend=False,
            customdata=_names(frame),
            hovertemplate="layer %{customdata[0]}, expert %{customdata[1]}<br>" + hover + "<extra></extra>",
            marker={
                "size": 6 if len(frame) <= MOST_DRAWN_AS_SHAPES else 4, "opacity": 0.75, "color": layers,
                "showscale": True, "colorscale": scale(palette(theme).sequential[2:]),
                "cmin": first, "cmax": max(last, first + 1), "colorbar": colorbar("layer"),
            },
        )
    )  # fmt: skip
    return pickable(figure, layer="customdata.0", expert="customdata.1")


def _names(frame: pl.DataFrame) -> Any:
    """(points, 2): the layer's label and the expert; as numbers, which are sent in binary, where labels are such."""
    if frame["step"].fill_null(0).max() == 0:
        return np.stack([frame["layer"].to_numpy(), frame["expert"].to_numpy()], axis=-1).astype(np.int16)
    return list(zip(frame["label"], frame["expert"], strict=True))
