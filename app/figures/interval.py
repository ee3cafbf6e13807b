"""The two ways in which every figure shows an interval: a band around a curve, whiskers at a point or bar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import polars as pl

from app.figures.style import fade

OPACITY = 0.18
"""Of a band, so that the curve and a second band stay visible through it."""


def band(
    figure: go.Figure,
    *,
    x: Sequence[Any] | pl.Series,
    low: pl.Series,
    high: pl.Series,
    colour: str,
    name: str = "",
    **more: Any,
) -> None:
    """A band between two curves; nothing where no end is known. Add it before the curve that it surrounds.

    Args:
        name: entry in the legend; without one the curve's entry stands for both.
        more: further settings of both edges, such as ``xaxis`` and ``yaxis``.
    """
    if low.drop_nulls().is_empty() or high.drop_nulls().is_empty():
        return
    edge: dict[str, Any] = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", **more}
    figure.add_scatter(x=x, y=high, showlegend=False, **edge)
    figure.add_scatter(
        x=x, y=low, fill="tonexty", fillcolor=fade(colour, OPACITY), name=name, showlegend=bool(name), **edge
    )


def whiskers(value: pl.Series, low: pl.Series, high: pl.Series, *, colour: str | None = None) -> dict[str, Any]:
    """For ``error_y`` or ``error_x``: from ``low`` to ``high`` around ``value``; where an end is unknown, none."""
    return {
        "type": "data",
        "symmetric": False,
        "array": (high - value).fill_null(0.0).clip(lower_bound=0.0),
        "arrayminus": (value - low).fill_null(0.0).clip(lower_bound=0.0),
        "thickness": 1.5,
        "width": 4,
        **({"color": colour} if colour else {}),
    }
