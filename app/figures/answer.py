"""A chart of any answer: a heatmap, curves, bars, points or a histogram of chosen columns."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
import polars as pl

from app.figures.style import Theme, colorbar, colours_of, layout, message, palette, pickable, rows_height, safe, scale

Kind = Literal["heatmap", "line", "bar", "points", "histogram"]
KINDS: tuple[Kind, ...] = ("heatmap", "line", "bar", "points", "histogram")
MOST_GROUPS, MOST_CELLS = 12, 400_000
"""Colours that can be told apart, and cells of a heatmap that a browser draws."""

_PARTS = {"layer": ("label", "layer"), "expert": ("expert",), "sequence": ("sequence",), "token": ("position",)}


def answer_chart(
    frame: pl.DataFrame, *, kind: Kind, x: str, y: str, colour: str = "", theme: Theme = "light"
) -> go.Figure:
    """Draw columns of a frame of plain cells.

    Args:
        kind: ``heatmap`` draws ``colour`` over ``x`` and ``y``, the mean where several rows share a cell; ``histogram``
            counts ``x``; the others draw ``y`` over ``x``.
        colour: the column that tells groups apart; of a heatmap, the value.
    """
    wanted = {"heatmap": (x, y, colour), "histogram": (x,)}.get(kind, (x, y))
    title = {"heatmap": f"{colour} over {x} and {y}", "histogram": f"Histogram of {x}"}.get(kind, f"{y} over {x}")
    title = safe(title, 100)
    if frame.is_empty():
        return message("The answer has no rows.", title=title, theme=theme)
    if any(name not in frame.columns for name in wanted):
        return message("Choose columns for the axes.", title="Chart", theme=theme)
    number = colour if kind == "heatmap" else x if kind == "histogram" else y
    if not frame.schema[number].is_numeric():
        return message(f"Column {number} holds no numbers.", title=title, theme=theme)
    if kind == "heatmap":
        return _heatmap(frame, x, y, colour, title, theme)
    groups = _groups(frame, colour if kind != "histogram" or colour != x else "")
    if len(groups) > MOST_GROUPS:
        return message(
            f"Column {colour} has {len(groups):,} values, more than {MOST_GROUPS} colours can tell apart.",
            title=title, theme=theme,
        )  # fmt: skip
    return _groups_figure(groups, kind, x, y, colour, title, theme)


def _heatmap(frame: pl.DataFrame, x: str, y: str, value: str, title: str, theme: Theme) -> go.Figure:
    # One column may be asked for twice; what is no number is missing, and equals nothing, itself included.
    frame = frame.select(
        _without_nan(frame[x]).alias("x"),
        _without_nan(frame[y]).alias("y"),
        frame[value].cast(pl.Float64).alias("value"),
    )
    cells = frame.group_by("x", "y", maintain_order=True).agg(pl.col("value").mean())
    across, down = _ordered(frame["x"]), _ordered(frame["y"])
    if len(across) * len(down) > MOST_CELLS:
        return message(f"{len(across):,} x {len(down):,} cells are too many to draw.", title=title, theme=theme)
    values = np.full((len(down), len(across)), np.nan)
    places = [{entry: index for index, entry in enumerate(axis)} for axis in (down, across)]
    for column, row, cell in cells.iter_rows():
        values[places[0][row], places[1][column]] = np.nan if cell is None else cell
    signed = bool(np.nanmin(values, initial=0.0) < 0 < np.nanmax(values, initial=0.0))
    figure = go.Figure(
        go.Heatmap(
            z=values.astype(np.float32), x=[safe(entry) for entry in across], y=[safe(entry) for entry in down],
            colorscale=scale(palette(theme).diverging if signed else palette(theme).sequential),
            zmid=0.0 if signed else None, colorbar=colorbar(safe(value, 30)), hoverongaps=False,
            hovertemplate=f"{safe(y, 30)} %{{y}}, {safe(x, 30)} %{{x}}<br>{safe(value, 30)} %{{z:.4g}}<extra></extra>",
        )
    )  # fmt: skip
    layout(
        figure, title=title, x=safe(x), y=safe(y), theme=theme, height=rows_height(len(down)), legend=False,
        xaxis={"type": "category", "title": {"text": safe(x)}, "nticks": 30},
        yaxis={"type": "category", "autorange": "reversed", "title": {"text": safe(y)}, "nticks": 40},
    )  # fmt: skip
    sources = {part: axis for part, names in _PARTS.items() for name, axis in ((x, "x"), (y, "y")) if name in names}
    return pickable(figure, **sources) if sources else figure


def _groups_figure(
    groups: dict[str, pl.DataFrame], kind: str, x: str, y: str, colour: str, title: str, theme: Theme
) -> go.Figure:
    figure = go.Figure()
    paints = colours_of(list(groups), theme)
    picked = _picked(next(iter(groups.values())))
    for name, part in groups.items():
        shared: dict[str, Any] = {"name": safe(name, 40), "showlegend": bool(colour)}
        across = _axis(part[x])
        if kind == "histogram":
            figure.add_histogram(x=across, marker={"color": paints[name]}, opacity=0.75, **shared)
            continue
        shared |= {
            "x": across, "y": part[y].cast(pl.Float64).to_numpy(), "customdata": _customdata(part, picked),
            "hovertemplate": f"{safe(x, 30)} %{{x}}<br>{safe(y, 30)} %{{y:.4g}}",
        }  # fmt: skip
        if kind == "bar":
            figure.add_bar(marker={"color": paints[name]}, **shared)
        elif kind == "line":
            figure.add_scatter(mode="lines+markers", line={"color": paints[name]}, marker={"size": 5}, **shared)
        else:
            figure.add_scatter(mode="markers", marker={"color": paints[name], "size": 6, "opacity": 0.7}, **shared)
    if kind == "histogram":
        figure.update_layout(barmode="overlay")
    layout(
        figure, title=title, x=safe(x), y="rows" if kind == "histogram" else safe(y), theme=theme, legend=bool(colour),
        height=420,
    )  # fmt: skip
    sources = {part: f"customdata.{place}" for place, part in enumerate(picked)}
    return pickable(figure, **sources) if sources and kind != "histogram" else figure


def _groups(frame: pl.DataFrame, colour: str) -> dict[str, pl.DataFrame]:
    if not colour or colour not in frame.columns:
        return {"": frame}
    parts = frame.partition_by(colour, as_dict=True, maintain_order=True)
    return {"missing" if key[0] is None else str(key[0]): part for key, part in parts.items()}


def _picked(frame: pl.DataFrame) -> dict[str, str]:
    """Which parts of the focus the rows name, with their columns."""
    found = {part: next((name for name in names if name in frame.columns), "") for part, names in _PARTS.items()}
    return {part: name for part, name in found.items() if name}


def _customdata(frame: pl.DataFrame, picked: dict[str, str]) -> list[list[Any]] | None:
    return [list(row) for row in frame.select(list(picked.values())).iter_rows()] if picked else None


def _axis(column: pl.Series) -> Any:
    """Numbers and times as they are; all else as safe text."""
    if column.dtype.is_numeric() or column.dtype.is_temporal():
        return column.to_list()
    return [safe("missing" if value is None else value) for value in column.to_list()]


def _without_nan(column: pl.Series) -> pl.Series:
    return column.fill_nan(None) if column.dtype.is_float() else column


def _ordered(column: pl.Series) -> list[Any]:
    """Different values: numbers in their order, others as they come; missing ones last."""
    values = column.unique(maintain_order=True)
    ordered = values.drop_nulls()
    if column.dtype.is_numeric():
        ordered = ordered.sort()
    return [*ordered.to_list(), *([None] if values.null_count() else [])]
