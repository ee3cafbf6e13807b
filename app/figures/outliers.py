"""Figures of outliers: largest expert outputs, their ranks against the rules, and the residual stream."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import polars as pl

from app.figures.heatmap import MAX_DETAIL_CELLS, expert_map, matrix
from app.figures.style import Theme, colorbar, layout, log_ticks, message, palette, pickable, scale


def residual_curve(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """Largest |hidden state| after each decoder layer, beside the median and the largest at later positions, log scale.

    frame: ``app.frames.super_experts.residual``.
    """
    title = "Residual stream after each layer"
    if frame.is_empty():
        return message("The residual stream was not recorded.", title=title, theme=theme)
    colours = palette(theme)
    x = frame["layer"].cast(pl.String).to_list()
    extra = frame.select("position", "channel", "ratio").to_numpy()
    hover = (
        "after layer %{x}<br>largest |value| %{y:,.4g}<br>position %{customdata[0]:.0f}, channel %{customdata[1]:.0f}"
    )
    hover += "<br>%{customdata[2]:,.0f} × the median of that token<extra></extra>"
    figure = go.Figure(
        go.Scatter(
            x=x,
            y=frame["absolute_max"],
            customdata=extra,
            name="largest |value|",
            mode="lines+markers",
            line={"color": colours.accent, "width": 2},
            marker={"size": 6},
            hovertemplate=hover,
        )
    )
    for column, name, dash, colour in (
        ("later_max", "largest at later positions", "dash", colours.categorical[1]),
        ("median_there", "median of that token", "dot", colours.muted),
    ):
        figure.add_scatter(
            x=x,
            y=frame[column],
            name=name,
            mode="lines",
            line={"color": colour, "dash": dash, "width": 1.8},
            hovertemplate=f"after layer %{{x}}<br>{name} %{{y:,.4g}}<extra></extra>",
        )
    massive = frame.filter(pl.col("massive"))
    if len(massive):
        figure.add_scatter(
            x=massive["layer"].cast(pl.String),
            y=massive["absolute_max"],
            mode="markers",
            name="massive activation",
            marker={"symbol": "circle-open", "size": 13, "color": colours.alarm, "line": {"width": 2}},
            hoverinfo="skip",
        )
        forming = frame.filter(pl.col("forming"))
        figure.add_scatter(
            x=forming["layer"].cast(pl.String),
            y=forming["absolute_max"],
            mode="markers",
            name="forms here",
            marker={"symbol": "circle", "size": 9, "color": colours.alarm},
            hoverinfo="skip",
        )
    layout(figure, title=title, x="decoder layer", y="|hidden state| (log scale)", theme=theme, height=400, wide=False)
    figure.update_yaxes(**log_ticks([*frame["absolute_max"], *frame["median_there"], *frame["later_max"]]))
    figure.update_xaxes(type="category", showgrid=False, nticks=24)
    return pickable(figure, layer="x")


def ranked_outputs(
    frame: pl.DataFrame, thresholds: pl.DataFrame, *, tokens: str = "all", theme: Theme = "light"
) -> go.Figure:
    """Experts by their largest output, the largest first, against what each rule asks for.

    frame: ``app.frames.super_experts.output_maxima``; thresholds: ``app.frames.super_experts.thresholds``.
    """
    words = "all tokens" if tokens == "all" else "first routed token"
    title = f"Experts by their largest output, {words}"
    shown = frame.filter(pl.col("value") > 0).head(200)
    if shown.is_empty():
        return message("No expert outputs recorded.", title=title, theme=theme)
    colours = palette(theme)
    figure = go.Figure()
    for is_super, name, colour, size in (
        (False, "expert", colours.accent, 6),
        (True, "super expert (paper)", colours.alarm, 10),
    ):
        part = shown.filter(pl.col("paper") == is_super)
        hover = (
            f"rank %{{x}}<br>layer %{{customdata[0]}}, expert %{{customdata[1]}}<br>largest |output| "
            f"%{{y:,.4g}}<extra>{name}</extra>"
        )
        names = part["expert"].cast(pl.String) + part["kind"].replace_strict(
            {"shared": " (shared)"}, default="", return_dtype=pl.String
        )
        figure.add_scatter(
            x=part["rank"],
            y=part["value"],
            mode="markers",
            name=name,
            marker={"color": colour, "size": size},
            customdata=list(zip(part["label"], names, _routed(part), strict=True)),
            hovertemplate=hover,
        )
    rules = thresholds.filter(pl.col("tokens") == tokens)
    for rule, dash in (("paper", "dash"), ("code", "dot")):
        value = rules.filter(pl.col("rule") == rule)["value"]
        if len(value) and value[0] is not None and value[0] > 0:
            figure.add_scatter(
                x=[0.8, max(len(shown), 2)],
                y=[value[0]] * 2,
                mode="lines",
                name=f"{rule} rule asks for",
                line={"color": colours.muted, "dash": dash, "width": 1.6},
                hovertemplate=f"{rule} rule: above {value[0]:,.4g}<extra></extra>",
            )
    layout(
        figure, title=title, x="rank (log scale)", y="largest |output| (log scale)", theme=theme, height=400, wide=False
    )
    figure.update_xaxes(**log_ticks([1, len(shown)]), showgrid=False)
    figure.update_yaxes(**log_ticks([*shown["value"], *rules["value"]]))
    return pickable(figure, layer="customdata.0", expert="customdata.2")


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
        z=logs,
        x=columns[:width],
        y=labels,
        colorscale=scale(palette(theme).sequential),
        zmin=low,
        zmax=high,
        hoverongaps=False,
        colorbar=colorbar("largest |output|", tickvals=ticks, ticktext=[f"{10.0**tick:g}" for tick in ticks]),
    )
    if cells.size <= MAX_DETAIL_CELLS:
        heat.update(
            customdata=cells,
            hovertemplate="layer %{y}, expert %{x}<br>largest |output| %{customdata:,.3g}<extra></extra>",
        )
    else:
        heat.update(hovertemplate="layer %{y}, expert %{x}<br>largest |output| 10^%{z:.2f}<extra></extra>")
    figure = go.Figure(heat)
    marked = placed.filter(pl.col("paper"))
    if len(marked):
        figure.add_scatter(
            x=[columns[index] for index in marked["expert"]],
            y=marked["label"].to_list(),
            mode="markers",
            showlegend=False,
            marker={"symbol": "circle-open", "size": 15, "color": palette(theme).alarm, "line": {"width": 2.5}},
            customdata=marked["value"].to_numpy(),
            hovertemplate="super expert<br>layer %{y}, expert %{x}<br>largest |output| "
            "%{customdata:,.3g}<extra></extra>",
        )
    return expert_map(figure, title=title, labels=labels, width=width, theme=theme)


def _routed(frame: pl.DataFrame) -> list[str]:
    """The numbers of routed experts; empty for shared ones, which cannot be picked."""
    number = pl.when(pl.col("kind") == "routed").then(pl.col("expert").cast(pl.String)).otherwise(pl.lit(""))
    return frame.select(number.alias("expert"))["expert"].to_list()


def _with_columns(frame: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
    """The frame with shared experts moved behind the routed ones, and the name of every column of the map."""
    routed = frame.filter(pl.col("kind") == "routed")
    shared = frame.filter(pl.col("kind") == "shared")
    count = int(routed["expert"].max()) + 1 if len(routed) else 0  # type: ignore[arg-type]
    extra = int(shared["expert"].max()) + 1 if len(shared) else 0  # type: ignore[arg-type]
    moved = shared.with_columns((pl.col("expert") + count).cast(frame.schema["expert"]))
    names = [str(index) for index in range(count)] + [f"shared {index}" for index in range(extra)]
    return pl.concat([routed, moved]), names
