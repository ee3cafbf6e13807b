"""Several checkpoints in order: each measure of collapse over them, layer by layer, and load against probability."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import polars as pl

from app.figures.style import Theme, colorbar, layout, message, palette, pickable, rows_height, safe, scale
from app.frames.timeline_measures import COUNTS, MEASURES, Measure


def lines(
    summary: pl.DataFrame, frame: pl.DataFrame, *, measure: str, label: str | None = None, theme: Theme = "light"
) -> go.Figure:
    """One measure over the checkpoints: the worst layer, the 90th percentile of layers towards it, the median, a chosen
    layer, and the threshold.

    summary: ``app.frames.timeline.summary``; frame: ``app.frames.timeline.over_checkpoints``; label: of a layer that
    gets a line of its own.
    """
    found = MEASURES[measure]
    part, cells = summary.filter(measure=measure), frame.filter(measure=measure).drop_nulls("value")
    title = found.title
    if part.is_empty():
        return message("No run here holds what this needs.", title=title, theme=theme)
    colours, figure = palette(theme), go.Figure()
    x = [safe(name, 40) for name in part["checkpoint"]]
    side = "highest" if found.worst == "high" else "lowest"
    hover = f"%{{x}}<br>%{{y:{_digits(found)}}}<extra>%{{fullData.name}}</extra>"
    worst = hover.replace("<extra>", "<br>layer %{customdata[0]}; %{customdata[1]} layers over<extra>")
    figure.add_scatter(
        x=x, y=part["worst"], name=f"{side} layer", mode="lines+markers", hovertemplate=worst, marker={"size": 7},
        customdata=part.select("worst_label", "over").rows(), line={"color": colours.accent, "width": 2.5},
    )  # fmt: skip
    percentile = "90th percentile of layers" if found.worst == "high" else "10th percentile of layers"
    for column, name, dash in (("near", percentile, "dash"), ("median", "median layer", "dot")):
        figure.add_scatter(
            x=x, y=part[column], name=name, mode="lines", hovertemplate=hover,
            line={"color": colours.accent, "width": 1.5, "dash": dash},
        )  # fmt: skip
    if label is not None and len(mine := cells.filter(label=label)):
        figure.add_scatter(
            x=[safe(name, 40) for name in mine["checkpoint"]], y=mine["value"], name=f"layer {safe(label)}",
            mode="lines+markers", hovertemplate=hover, line={"color": colours.categorical[1], "width": 2},
            marker={"size": 6},
        )  # fmt: skip
    _threshold(figure, cells, x, found, theme)
    layout(figure, title=title, x="checkpoint", y=found.unit, theme=theme, height=360)
    figure.update_xaxes(type="category", showgrid=False, categoryorder="array", categoryarray=x, nticks=24)
    figure.update_yaxes(rangemode="normal" if measure == "correlation" else "tozero")
    return pickable(figure, layer="customdata.0")


def layer_map(frame: pl.DataFrame, *, measure: str, theme: Theme = "light") -> go.Figure:
    """One measure by layer (down) and checkpoint (across); cells over the threshold carry a mark.

    frame: ``app.frames.timeline.over_checkpoints``.
    """
    found = MEASURES[measure]
    part = frame.filter(measure=measure)
    title = f"{found.title} by layer"
    if part.drop_nulls("value").is_empty():
        return message("No run here holds what this needs.", title=title, theme=theme)
    labels = part["label"].unique(maintain_order=True).to_list()
    checkpoints = [safe(name, 40) for name in part.unique("place", maintain_order=True)["checkpoint"]]
    places = part["place"].unique(maintain_order=True).to_list()
    cells = np.full((len(labels), len(places)), np.nan, np.float32)
    down = part["label"].replace_strict(labels, range(len(labels)), return_dtype=pl.Int64).to_numpy()
    across = part["place"].replace_strict(places, range(len(places)), return_dtype=pl.Int64).to_numpy()
    cells[down, across] = part["value"].fill_null(float("nan")).to_numpy()
    low, high, colours = _range(cells, measure, theme)
    heat = go.Heatmap(
        z=cells, x=checkpoints, y=labels, zmin=low, zmax=high, colorscale=scale(colours), hoverongaps=False,
        colorbar=colorbar(safe(found.unit.partition(",")[0].partition(" (")[0])),
        hovertemplate=f"layer %{{y}}, %{{x}}<br>{safe(found.title)} %{{z:{_digits(found)}}}<extra></extra>",
    )  # fmt: skip
    figure = go.Figure(heat)
    over = part.filter("over")
    if len(over):
        figure.add_scatter(
            x=[safe(name, 40) for name in over["checkpoint"]], y=over["label"], mode="markers", hoverinfo="skip",
            name="over the threshold",
            marker={"symbol": "diamond", "size": 8, "color": palette(theme).alarm,
                    "line": {"width": 1, "color": palette(theme).background}},
        )  # fmt: skip
    layout(
        figure, title=title, x="checkpoint", y="layer", theme=theme, height=rows_height(len(labels)),
        legend=bool(len(over)),
    )  # fmt: skip
    figure.update_yaxes(
        type="category", autorange="reversed", showgrid=False, categoryorder="array", categoryarray=labels, nticks=24,
        ticks="",
    )  # fmt: skip
    figure.update_xaxes(
        type="category", showgrid=False, ticks="", categoryorder="array", categoryarray=checkpoints, nticks=24
    )  # fmt: skip
    if len(over):
        figure.update_traces(showlegend=True, selector={"type": "scatter"})
    return pickable(figure, layer="y")


def load_against_probability(
    frame: pl.DataFrame, *, label: str, checkpoint: str, theme: Theme = "light"
) -> go.Figure:  # fmt: skip
    """Load f against router probability P of one layer's experts, both over the uniform share.

    frame: ``app.frames.timeline_measures.shares`` of that layer.
    """
    title = f"Load against probability, layer {safe(label)}, {safe(checkpoint, 40)}"
    shown = frame.drop_nulls(["load", "probability"])
    if shown.is_empty():
        return message("This run does not hold the router's probabilities.", title=title, theme=theme, height=360)
    colours = palette(theme)
    most = float(np.nanmax(shown.select("load", "probability").to_numpy())) * 1.06
    figure = go.Figure()
    figure.add_scatter(
        x=[0, most], y=[0, most], mode="lines", hoverinfo="skip", showlegend=False,
        line={"color": colours.muted, "dash": "dot", "width": 1},
    )  # fmt: skip
    figure.add_scatter(
        x=shown["probability"], y=shown["load"], mode="markers", customdata=shown.select("expert").rows(),
        marker={"size": 9, "color": colours.accent, "opacity": 0.75}, showlegend=False,
        hovertemplate="expert %{customdata[0]}<br>probability %{x:.2f} × 1/E<br>load %{y:.2f} × the uniform share"
        "<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=[1], y=[1], mode="markers", hovertemplate="a balanced router<extra></extra>", showlegend=False,
        marker={"symbol": "cross-thin", "size": 14, "line": {"width": 2, "color": colours.alarm}},
    )  # fmt: skip
    layout(
        figure, title=title, x="P × E, mean router probability over the uniform one",
        y="f × E / k, load over uniform", theme=theme, height=360, legend=False,
    )  # fmt: skip
    figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(rangemode="tozero")
    return pickable(figure, layer=f"={label}", expert="customdata.0")


def _threshold(figure: go.Figure, cells: pl.DataFrame, x: list[str], found: Measure, theme: Theme) -> None:
    """The threshold as a line: one where it is the same everywhere, else that of the layer nearest to the bad end."""
    limits = cells.drop_nulls("threshold")
    if limits.is_empty():
        return
    strictest = pl.col("threshold").min() if found.worst == "high" else pl.col("threshold").max()
    per = limits.group_by("place", "checkpoint").agg(strictest).sort("place")
    same = limits["threshold"].n_unique() == 1
    figure.add_scatter(
        x=x if same else [safe(name, 40) for name in per["checkpoint"]],
        y=[limits["threshold"][0]] * len(x) if same else per["threshold"],
        name="threshold" if same else "threshold, strictest layer", mode="lines",
        line={"color": palette(theme).alarm, "width": 1.5, "dash": "longdash"},
        hovertemplate="threshold %{y:.3g}<extra></extra>",
    )  # fmt: skip


def _range(cells: np.ndarray, measure: str, theme: Theme) -> tuple[float, float, tuple[str, ...]]:
    """Ends of the colours, and the colours: "much" is the bad end."""
    colours = palette(theme).sequential
    known = cells[np.isfinite(cells)]
    low, high = float(known.min()), float(known.max())
    if measure in COUNTS:
        low, high = 0.0, max(high, 1.0)
    elif high - low < 1e-9:
        high = low + 1e-9
    return low, high, colours if MEASURES[measure].worst == "high" else colours[::-1]


def _digits(found: Measure) -> str:
    return ",.0f" if found.digits == ".0f" else found.digits
