"""Two runs compared: agreement over the layers with its baselines, margins of the tokens that flip, load moved."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import polars as pl

from app.figures.heatmap import MAX_DETAIL_CELLS, expert_map, matrix
from app.figures.style import Theme, colorbar, fade, layout, message, palette, scale

MEASURES = {"overlap": "experts in common", "exact": "same set", "first_choice": "same first choice"}
_BASELINES = {
    "popularity": "experts in common, tokens shuffled", "chance": "experts in common, random",
}  # fmt: skip
ZOOMED = 0.9
"""Where all runs of a figure agree more than this, its axis begins near them and leaves the baselines below."""

MARGINS = {
    "boundary_margin": ("Last expert taken over the next", "logits"),
    "left_weight": ("Gate weight that left", "share of the token's gate weight"),
    "weight_gap": ("Gate weight that left against what came", "difference of the shares"),
}
"""Titles and units by the name of the margin in ``app.frames.comparison.margins``."""


def agreement_curves(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """Agreement of two runs per layer with its intervals, beside shuffled tokens and random selections.

    frame: ``app.frames.comparison.layers``.
    """
    colours = palette(theme)
    x = frame["label"].to_list()
    figure = go.Figure()
    for (name, words), colour in zip(MEASURES.items(), colours.categorical, strict=False):
        _band(figure, x, frame[f"{name}_low"], frame[f"{name}_high"], fade(colour, 0.18))
        ends = frame.select(f"{name}_low", f"{name}_high", "tokens").fill_null(float("nan")).to_numpy()
        hover = f"layer %{{x}}<br>{words} %{{y:.2%}}<br>95 % %{{customdata[0]:.2%}} to %{{customdata[1]:.2%}}"
        hover += "<br>%{customdata[2]:,.0f} tokens<extra></extra>"
        figure.add_scatter(
            x=x, y=frame[name], customdata=ends, mode="lines+markers", name=words, hovertemplate=hover,
            line={"color": colour, "width": 2}, marker={"size": 6},
        )  # fmt: skip
    for (name, words), dash in zip(_BASELINES.items(), ("dash", "dot"), strict=True):
        figure.add_scatter(
            x=x, y=frame[name], mode="lines", name=words, line={"color": colours.muted, "dash": dash, "width": 1.5},
            hovertemplate=f"layer %{{x}}<br>{words} %{{y:.2%}}<extra></extra>",
        )  # fmt: skip
    least = float(np.nanmin(frame.select(*MEASURES, *(f"{name}_low" for name in MEASURES)).to_numpy().astype(float)))
    layout(figure, title="Agreement of the selections", x="layer", y="share of tokens", theme=theme, height=420)
    figure.update_xaxes(type="category", showgrid=False, nticks=24)
    figure.update_yaxes(tickformat=".1~%" if least > ZOOMED else ".0%", rangemode="tozero")
    if least > ZOOMED:
        figure.update_yaxes(range=[least - 0.1 * (1 - least) - 1e-4, 1 + 0.1 * (1 - least) + 1e-4])
    return figure


def load_curve(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """Share of the selections that moves to other experts, per layer, below what flips alone would allow.

    frame: ``app.frames.comparison.layers``.
    """
    colours = palette(theme)
    x = frame["label"].to_list()
    figure = go.Figure()
    _band(figure, x, frame["total_variation_low"], frame["total_variation_high"], fade(colours.accent, 0.18))
    for y, words, line in (
        (frame["total_variation"], "load moved", {"color": colours.accent, "width": 2}),
        (1 - frame["overlap"], "selections changed", {"color": colours.muted, "dash": "dot", "width": 1.5}),
    ):
        hover = f"layer %{{x}}<br>{words} %{{y:.3%}}<extra></extra>"
        figure.add_scatter(x=x, y=y, mode="lines+markers", name=words, hovertemplate=hover, line=line)
    layout(figure, title="Load that moves", x="layer", y="share of selections", theme=theme, height=380, wide=False)
    figure.update_xaxes(type="category", showgrid=False, nticks=24)
    figure.update_yaxes(tickformat=".1~%", rangemode="tozero")
    return figure


def margin_bars(frame: pl.DataFrame, *, margin: str, where: str = "all layers", theme: Theme = "light") -> go.Figure:
    """How close the tokens were that flipped, beside those that did not where both are known.

    frame: ``app.frames.comparison.margins`` of one margin and one layer, or of "all".
    """
    words, unit = MARGINS[margin]
    title = f"{words}, {where}"
    filled = np.flatnonzero((frame["flipped"] + frame["unchanged"].fill_null(0)).to_numpy())
    if not frame["flipped"].sum():
        return message("No token flips here.", title=title, theme=theme, height=380)
    shown = frame[int(filled[0]) : int(filled[-1]) + 1]
    colours = palette(theme)
    x = [_range(low, high) for low, high in shown.select("low", "high").iter_rows()]
    figure = go.Figure()
    for name, label, colour in (
        ("flipped", "tokens that flip", colours.alarm),
        ("unchanged", "tokens that do not", colours.accent),
    ):
        counts = shown[name].drop_nulls()
        if counts.is_empty():
            continue
        extra = shown.select(name, "flip_share").fill_null(float("nan")).to_numpy()
        hover = f"{unit} %{{x}}<br>%{{y:.2%}} of the {label}: %{{customdata[0]:,.0f}}"
        hover += "<br>%{customdata[1]:.2%} of all here flip" if shown["flip_share"].drop_nulls().len() else ""
        figure.add_bar(
            x=x, y=counts / max(int(counts.sum()), 1), customdata=extra, name=label, marker={"color": colour},
            hovertemplate=hover + "<extra></extra>",
        )  # fmt: skip
    layout(figure, title=title, x=f"{unit}, from", y="share of these tokens", theme=theme, height=380, wide=False)
    every = 1 if len(x) <= 10 else 2
    edges = [f"{low:.2g}" for low in shown["low"]]
    figure.update_xaxes(type="category", showgrid=False, tickvals=x[::every], ticktext=edges[::every], tickangle=0)
    figure.update_yaxes(tickformat=".0%")
    return figure


def load_difference_map(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """Load of every expert in the second run minus the first, in percentage points.

    frame: ``app.frames.comparison.load``.
    """
    points, labels, width = matrix(frame.with_columns(points=pl.col("difference") * 100), "points")
    bound = max(float(np.nanmax(np.abs(points))), 1e-6)
    heat = go.Heatmap(
        z=points, y=labels, zmid=0.0, zmin=-bound, zmax=bound, colorscale=scale(palette(theme).diverging),
        colorbar=colorbar("percentage points"), hoverongaps=False,
        hovertemplate="layer %{y}, expert %{x}<br>difference %{z:+.3f} points<extra></extra>",
    )  # fmt: skip
    if points.size <= MAX_DETAIL_CELLS:
        shares = [matrix(frame, name)[0] for name in ("share", "other_share")]
        hover = "layer %{y}, expert %{x}<br>%{customdata[0]:.2%} of the layer's selections in the first run"
        hover += "<br>%{customdata[1]:.2%} in the second<br>difference %{z:+.3f} points<extra></extra>"
        heat.update(customdata=np.stack(shares, axis=-1), hovertemplate=hover)
    title = "Load of each expert, second run minus first"
    return expert_map(go.Figure(heat), title=title, labels=labels, width=width, theme=theme)


def _band(figure: go.Figure, x: list[str], low: pl.Series, high: pl.Series, colour: str) -> None:
    """A filled interval without an entry in the legend; nothing where it is not known."""
    if low.drop_nulls().is_empty():
        return
    common = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    figure.add_scatter(x=x, y=high, **common)
    figure.add_scatter(x=x, y=low, fill="tonexty", fillcolor=colour, **common)


def _range(low: float, high: float | None) -> str:
    if high is None:
        return f"≥ {low:.2g}"
    return f"< {high:.2g}" if low == 0.0 else f"{low:.2g} – {high:.2g}"
