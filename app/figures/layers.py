"""Curves over the MoE layers: how every figure draws one, with its interval, and the axis that they share."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
import polars as pl

from app.figures.interval import band
from app.figures.style import pickable

MANY = 48
"""With more layers, curves have no markers: they would touch."""


def curve(
    figure: go.Figure,
    frame: pl.DataFrame,
    value: str,
    *,
    name: str,
    colour: str,
    hover: str,
    dash: str = "solid",
    width: float = 2.0,
    markers: bool = True,
    **more: Any,
) -> None:
    """A line over the layers and, where the frame has ``low`` and ``high``, the band between them.

    Args:
        frame: one row per layer with ``label`` and ``value``; nothing is drawn of an empty one.
        hover: what hovering says, without the trace's name.
        more: further settings of the line, such as ``customdata``, or ``row`` and ``col``.
    """
    if frame.is_empty():
        return
    x = frame["label"].to_list()
    place = {key: more[key] for key in ("row", "col") if key in more}
    if {"low", "high"} <= set(frame.columns):
        band(figure, x=x, low=frame["low"], high=frame["high"], colour=colour, **place)
    figure.add_scatter(
        x=x, y=frame[value], name=name, mode="lines+markers" if markers and len(x) <= MANY else "lines",
        line={"color": colour, "width": width, "dash": dash}, marker={"size": 5},
        hovertemplate=hover + "<extra></extra>", **more,
    )  # fmt: skip


def over_layers(figure: go.Figure, *, percent: bool = False, labels: list[str] | None = None) -> go.Figure:
    """Give a figure its axes: layers from left to right, values from 0; a click picks the layer.

    Args:
        percent: whether values are shares.
        labels: the layers in their order, where no curve holds all of them.
    """
    order: dict[str, Any] = {"categoryorder": "array", "categoryarray": labels} if labels else {}
    figure.update_xaxes(type="category", showgrid=False, nticks=24, **order)
    figure.update_yaxes(rangemode="tozero", **({"tickformat": ".0%"} if percent else {}))
    return pickable(figure, layer="x")
