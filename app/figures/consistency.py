"""Figures of local routing consistency: SRP beside its controls and what was published, and repetition of experts."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl

from app.figures.experts import expert_points
from app.figures.heatmap import expert_map, matrix
from app.figures.interval import whiskers
from app.figures.layers import curve, over_layers
from app.figures.style import (
    Theme,
    colorbar,
    fade,
    layout,
    log_ticks,
    message,
    palette,
    pickable,
    rows_height,
    safe,
    scale,
)

CONTROL_WORDS = {
    "observed": "this run",
    "shuffled_in_sequence": "shuffled in sequences",
    "shuffled": "shuffled over all",
    "uniform": "random experts",
}
DASHES = {"observed": "solid", "shuffled_in_sequence": "dash", "shuffled": "dot", "uniform": "dashdot"}
BESIDE_HEIGHT = 560
"""Height of figures that stand beside the bars of the published models, pixels."""


def srp_curve(frame: pl.DataFrame, published: pl.DataFrame | None = None, *, theme: Theme = "light") -> go.Figure:
    """The model's SRP against segment length with 95 % intervals, its controls and its lower bound.

    frame: rows of one domain (or of all text) of ``app.frames.consistency.srp_model``; published: rows of
    ``app.frames.consistency.published_srp``, drawn thin behind.
    """
    title = "SRP against segment length"
    if frame.is_empty():
        return message("SRP is computed when the run is finished.", title=title, theme=theme)
    colours = palette(theme)
    figure = go.Figure()
    _published_lines(figure, published, theme)
    observed = frame.filter(pl.col("control") == "observed")
    figure.add_scatter(
        x=observed["segment_length"],
        y=observed["lower_bound"],
        mode="lines",
        name="always keep (bound)",
        line={"color": colours.alarm, "width": 1.4, "dash": "dot"},
        hovertemplate="%{x} tokens<br>lower bound %{y:.1%}<extra></extra>",
    )
    for control, colour in zip(CONTROL_WORDS, (colours.accent, *colours.categorical[1:4]), strict=True):
        part = frame.filter(pl.col("control") == control).sort("segment_length")
        if part.is_empty():
            continue
        hover = (
            f"{CONTROL_WORDS[control]}, %{{x}} tokens<br>SRP %{{y:.2%}} (%{{customdata[0]:.2%}} to "
            f"%{{customdata[1]:.2%}})"
        )
        hover += "<br>router size %{customdata[2]:.2f}<br>%{customdata[3]:,.0f} sequences<extra></extra>"
        figure.add_scatter(
            x=part["segment_length"],
            y=part["value"],
            name=CONTROL_WORDS[control],
            mode="lines+markers",
            hovertemplate=hover,
            customdata=part.select("low", "high", "router_size", "sequences").to_numpy(),
            error_y=whiskers(part["value"], part["low"], part["high"]),
            line={"color": colour, "dash": DASHES[control], "width": 2.6 if control == "observed" else 1.6},
            marker={"size": 7},
        )
    x = "segment length (tokens, log scale)"
    layout(figure, title=title, x=x, y="SRP", theme=theme, height=440, wide=False)
    _segment_axis(figure, observed)
    figure.update_yaxes(tickformat=".0%", range=[0, 1])
    return figure


def router_size_curve(
    frame: pl.DataFrame, published: pl.DataFrame | None = None, *, theme: Theme = "light"
) -> go.Figure:
    """Size of the segment router that reaches the SRP, relative to the original selection. Frames as ``srp_curve``."""
    title = "Router size that reaches the SRP"
    if frame.is_empty():
        return message("SRP is computed when the run is finished.", title=title, theme=theme)
    colours = palette(theme)
    figure = go.Figure()
    _published_lines(figure, published, theme, column="router_size")
    for control, colour in zip(CONTROL_WORDS, (colours.accent, *colours.categorical[1:4]), strict=True):
        part = frame.filter(pl.col("control") == control).sort("segment_length")
        if part.is_empty():
            continue
        figure.add_scatter(
            x=part["segment_length"],
            y=part["router_size"],
            name=CONTROL_WORDS[control],
            mode="lines+markers",
            line={"color": colour, "dash": DASHES[control], "width": 2.6 if control == "observed" else 1.6},
            hovertemplate=f"{CONTROL_WORDS[control]}, %{{x}} tokens<br>%{{y:.2f}} × the original "
            "selection<extra></extra>",
        )
    figure.add_hline(y=1, line={"color": colours.muted, "width": 1, "dash": "dot"})
    layout(
        figure,
        title=title,
        x="segment length (tokens, log scale)",
        y="router size (times the original)",
        theme=theme,
        height=440,
        wide=False,
    )
    _segment_axis(figure, frame)
    figure.update_yaxes(rangemode="tozero")
    return figure


def srp_layer_curves(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """SRP of every layer, one curve per segment length. frame: ``app.frames.consistency.srp_layers``."""
    title = "SRP of every layer"
    if frame.is_empty():
        return message("SRP is computed when the run is finished.", title=title, theme=theme)
    lengths = sorted(frame["segment_length"].unique().to_list())
    figure = go.Figure()
    for length, colour in zip(lengths, shades(len(lengths), theme), strict=True):
        part = frame.filter(pl.col("segment_length") == length)
        hover = f"layer %{{x}}, {length:g} tokens<br>SRP %{{y:.1%}}<br>router size %{{customdata:.2f}}"
        curve(
            figure, part, "value", name=f"{length:g} tokens", colour=colour, hover=hover, customdata=part["router_size"]
        )  # fmt: skip
    layout(figure, title=title, x="layer", y="SRP", theme=theme, height=440, wide=False)
    return over_layers(figure, percent=True)


def srp_map(frame: pl.DataFrame, *, length: float, theme: Theme = "light") -> go.Figure:
    """SRP of every expert, layers down and experts across.

    frame: rows of one segment length of ``app.frames.consistency.srp_experts``.
    """
    title = f"SRP of every expert, segments of {length:g} tokens"
    if frame.is_empty():
        return message("SRP is computed when the run is finished.", title=title, theme=theme)
    cells, labels, width = matrix(frame.with_columns(pl.col("value") * 100), "value")
    heat = go.Heatmap(
        z=cells, y=labels, hoverongaps=False, zmin=0, zmax=100, colorscale=scale(palette(theme).sequential),
        colorbar=colorbar("SRP", ticksuffix=" %"),
        hovertemplate="layer %{y}, expert %{x}<br>SRP %{z:.1f} %<extra></extra>",
    )  # fmt: skip
    return expert_map(go.Figure(heat), title=title, labels=labels, width=width, theme=theme)


def srp_expert_scatter(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """SRP of every expert against how often it is used; the curve is what always keeping it would give.

    frame: rows of one segment length of ``app.frames.consistency.srp_experts``.
    """
    title = "SRP of every expert against how often it is used"
    shown = frame.filter(pl.col("frequency") > 0)
    if shown.is_empty():
        return message("SRP is computed when the run is finished.", title=title, theme=theme)
    colours = palette(theme)
    hover = "used by %{x:.2%} of tokens<br>SRP %{y:.1%}"
    figure = expert_points(shown, x="frequency", y="value", hover=hover, theme=theme)
    least, most = (float(shown["frequency"].min()), float(shown["frequency"].max()))  # type: ignore[arg-type]
    rates = np.geomspace(least, most, 100)
    figure.add_scatter(
        x=rates,
        y=2 * rates / (1 + rates),
        mode="lines",
        name="lower bound 2r / (1 + r)",
        line={"color": colours.alarm, "width": 1.5, "dash": "dot"},
        hoverinfo="skip",
    )
    uniform = float(shown["uniform"][0])
    figure.add_scatter(
        x=[uniform, uniform],
        y=[0, 1],
        mode="lines",
        name="balanced: k / E",
        line={"color": colours.muted, "width": 1.2, "dash": "dash"},
        hovertemplate="a balanced router uses every expert for %{x:.2%} of tokens<extra></extra>",
    )
    layout(
        figure,
        title=title,
        x="tokens that use the expert (share, log scale)",
        y="SRP",
        theme=theme,
        height=440,
        wide=False,
    )
    ticks = log_ticks(shown["frequency"].to_list())
    percent = [f"{100 * tick:g} %" for tick in ticks["tickvals"]]
    figure.update_xaxes(**{**ticks, "ticktext": percent}, showgrid=False)
    figure.update_yaxes(tickformat=".0%", range=[0, 1.02])
    return figure


def _published_lines(figure: go.Figure, published: pl.DataFrame | None, theme: Theme, column: str = "value") -> None:
    """The published models as thin lines of one trace, broken between models."""
    if published is None:
        return
    x: list[float | None] = []
    y: list[float | None] = []
    names: list[str] = []
    for (model,), part in published.group_by(["model"], maintain_order=True):
        x += [*part["segment_length"], None]
        y += [*part[column], None]
        names += [safe(model)] * (len(part) + 1)
    figure.add_scatter(
        x=x,
        y=y,
        customdata=names,
        mode="lines",
        name="20 published models",
        line={"color": fade(palette(theme).muted, 0.35), "width": 1},
        hovertemplate=f"%{{customdata}}, %{{x}} tokens"
        f"<br>%{{y:{'.1%' if column == 'value' else '.2f'}}}<extra>published</extra>",
    )


def _segment_axis(figure: go.Figure, frame: pl.DataFrame) -> None:
    lengths = sorted(frame["segment_length"].unique().to_list())
    figure.update_xaxes(type="log", tickvals=lengths, ticktext=[f"{length:g}" for length in lengths], showgrid=False)


def shades(count: int, theme: Theme) -> list[str]:
    """So many shades of the sequential scale, from light to strong, all readable on the background."""
    usable = palette(theme).sequential[3:]
    return [usable[round(index * (len(usable) - 1) / max(count - 1, 1))] for index in range(count)]


def repetition_curves(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """How often neighbours repeat experts, per layer, with controls. frame: ``app.frames.consistency.repetition``."""
    title = "Repetition of experts from one token to the next"
    frame = frame.filter(pl.col("lag") == 1)
    if frame.is_empty():
        return message("Repetition is computed when the run is finished.", title=title, theme=theme)
    colours = palette(theme)
    words = {"mean_overlap": "experts in common", "first_choice_repeat": "same first choice"}
    figure = go.Figure()
    for (metric, name), colour in zip(words.items(), colours.categorical, strict=False):
        for control in ("observed", "shuffled_in_sequence", "shuffled", "uniform"):
            part = frame.filter((pl.col("metric") == metric) & (pl.col("control") == control))
            if part.is_empty():
                continue
            seen = control == "observed"
            full = name if seen else f"{name}, {CONTROL_WORDS[control]}"
            # Colours tell the measures apart and dashes the controls, so that one entry per control is enough.
            curve(
                figure, part, "value", name=name if seen else CONTROL_WORDS[control], dash=DASHES[control],
                colour=colour if seen else fade(colour, 0.55), width=2.2 if seen else 1.3, markers=seen,
                hover=f"layer %{{x}}<br>{full}: %{{y:.1%}}", legendgroup=name if seen else control,
                showlegend=seen or metric == "mean_overlap",
            )  # fmt: skip
    layout(figure, title=title, x="layer", y="share", theme=theme, height=400, wide=False)
    return over_layers(figure, percent=True)


def overlap_map(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """Experts in common of two tokens, layers down and the tokens' distance across. frame: as above."""
    title = "Experts in common, by distance"
    overlap = frame.filter(pl.col("metric") == "mean_overlap")
    seen = overlap.filter(pl.col("control") == "observed")
    if seen.is_empty():
        return message("Repetition is computed when the run is finished.", title=title, theme=theme)
    chance = overlap.filter(pl.col("control") == "shuffled").select("label", "lag", pl.col("value").alias("chance"))
    seen = seen.join(chance, on=["label", "lag"], how="left", maintain_order="left")
    labels = seen["label"].unique(maintain_order=True).to_list()
    lags = sorted(seen["lag"].unique().to_list())
    shape = (len(labels), len(lags))
    cells, popular = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
    for label, lag, value, alone in seen.select("label", "lag", "value", "chance").iter_rows():
        at = labels.index(label), lags.index(lag)
        cells[at], popular[at] = 100 * value, 100 * (np.nan if alone is None else alone)
    heat = go.Heatmap(
        z=cells, x=[f"{lag:g}" for lag in lags], y=labels, customdata=popular, hoverongaps=False, zmin=0,
        colorscale=scale(palette(theme).sequential), colorbar=colorbar("experts in common", ticksuffix=" %"),
        hovertemplate="layer %{y}, %{x} tokens apart<br>%{z:.1f} % of the experts in common"
        "<br>shuffled over all: %{customdata:.1f} %<extra></extra>",
    )  # fmt: skip
    figure = layout(
        go.Figure(heat), title=title, x="distance (tokens)", y="layer", theme=theme,
        height=rows_height(len(labels)), legend=False,
    )  # fmt: skip
    axis: dict[str, Any] = {"type": "category", "showgrid": False, "ticks": "", "nticks": 24}
    figure.update_xaxes(**axis)
    figure.update_yaxes(autorange="reversed", categoryorder="array", categoryarray=labels, **axis)
    return pickable(figure, layer="y")
