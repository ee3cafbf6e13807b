"""Figures of other routing: what it costs and keeps over its values, layer by layer, and how load moves."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl

from app.figures.heatmap import MAX_DETAIL_CELLS, expert_map, matrix
from app.figures.layers import curve, over_layers
from app.figures.style import (
    Theme,
    colorbar,
    layout,
    message,
    palette,
    pickable,
    rows_height,
    safe,
    scale,
)

NOTHING = "No token to try it on."


def kept_against_active(
    frame: pl.DataFrame, fixed: pl.DataFrame | None, *, title: str, name: str, value: float, theme: Theme = "light"
) -> go.Figure:
    """Kept mass against mean active experts, each point a value of the method; beside it a fixed number of experts.

    frame: ``app.frames.what_if.curve``; fixed: ``app.frames.what_if.fixed``, None where there is none; value: marked.
    """
    shown = frame.drop_nulls(["mean_active", "kept_mass"]).sort("mean_active")
    if shown.is_empty():
        return message(NOTHING, title=title, theme=theme)
    colours = palette(theme)
    figure = go.Figure()
    if fixed is not None and len(fixed):
        figure.add_scatter(
            x=fixed["mean_active"], y=fixed["kept_mass"], name="a fixed number", mode="lines+markers",
            line={"color": colours.categorical[1], "dash": "dot", "width": 1.5}, marker={"size": 7, "symbol": "square"},
            hovertemplate="%{x:.2f} experts for every token<br>%{y:.1%} kept<extra></extra>",
        )  # fmt: skip
    hover = f"{safe(name)} %{{customdata[0]:.3g}}<br>%{{x:.2f}} experts on average, 95 % of tokens at most "
    hover += "%{customdata[1]:.0f}<br>%{y:.1%} kept<br>%{customdata[2]:.0%} of the experts' operations<extra></extra>"
    figure.add_scatter(
        x=shown["mean_active"], y=shown["kept_mass"], name=safe(name), mode="lines+markers",
        line={"color": colours.accent, "width": 2}, marker={"size": 6},
        customdata=shown.select("value", "p95", "flops_share").to_numpy(), hovertemplate=hover,
    )  # fmt: skip
    _mark(figure, shown, value, "mean_active", "kept_mass", theme)
    layout(figure, title=title, x="mean active experts per token", y="kept mass", theme=theme, height=380, wide=False)
    figure.update_yaxes(tickformat=".0%")
    return figure.update_xaxes(rangemode="tozero")


def active_over_values(frame: pl.DataFrame, *, name: str, axis: str, value: float, theme: Theme = "light") -> go.Figure:
    """Mean active experts and those that 95 % of the tokens do not exceed, over the values of a method."""
    title = "Active experts by value"
    shown = frame.drop_nulls("mean_active").sort("value")
    if shown.is_empty():
        return message(NOTHING, title=title, theme=theme)
    colours = palette(theme)
    figure = go.Figure()
    looks: tuple[tuple[str, str, str, str], ...] = (
        ("p95", "95 % of tokens at most", colours.categorical[1], "dash"),
        ("mean_active", "mean", colours.accent, "solid"), ("before_active", "as the model is", colours.muted, "dot"),
    )  # fmt: skip
    for column, words, colour, dash in looks:
        figure.add_scatter(
            x=shown["value"], y=shown[column], name=words, mode="lines",
            line={"color": colour, "dash": dash, "width": 2},
            hovertemplate=f"{safe(name)} %{{x:.3g}}: %{{y:.2f}} experts<br>{words}<extra></extra>",
        )  # fmt: skip
    _mark(figure, shown, value, "value", "mean_active", theme)
    layout(figure, title=title, x=safe(axis), y="experts per token", theme=theme, height=380, wide=False)
    return figure.update_yaxes(rangemode="tozero")


def layers_by_value(frame: pl.DataFrame, *, axis: str, theme: Theme = "light") -> go.Figure:
    """Layer x value: mean active experts. frame: one row per label and value, with mean_active and kept_mass."""
    title = "Active experts, layer by layer"
    if frame.drop_nulls("mean_active").is_empty():
        return message(NOTHING, title=title, theme=theme)
    labels = frame["label"].unique(maintain_order=True).to_list()
    values = frame["value"].unique(maintain_order=True).sort().to_list()
    wide = frame.sort("value").pivot(
        on="value", index="label", values=["mean_active", "kept_mass"], maintain_order=True
    )
    ordered = pl.DataFrame({"label": labels}).join(wide, on="label", how="left", maintain_order="left")
    active, mass = (
        ordered.select(pl.selectors.starts_with(start)).to_numpy() for start in ("mean_active", "kept_mass")
    )
    heat = go.Heatmap(
        z=active, x=[f"{value:g}" for value in values], y=labels, zmin=0.0, colorscale=scale(palette(theme).sequential),
        colorbar=colorbar("experts per token"), customdata=mass, hoverongaps=False,
        hovertemplate="layer %{y}, value %{x}<br>%{z:.2f} experts<br>%{customdata:.1%} kept<extra></extra>",
    )  # fmt: skip
    figure = go.Figure(heat)
    height = rows_height(len(labels))
    layout(figure, title=title, x=safe(axis), y="layer", theme=theme, height=height, legend=False)
    figure.update_xaxes(type="category", nticks=24, showgrid=False)
    figure.update_yaxes(
        type="category", range=[len(labels) - 0.5, -0.5], showgrid=False, categoryorder="array", categoryarray=labels,
        nticks=24,
    )  # fmt: skip
    return pickable(figure, layer="y")


def layer_active(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """Active experts per layer at one value: mean, 95th percentile, and as the model is."""
    title = "Active experts per layer"
    shown = frame.drop_nulls("mean_active")
    if shown.is_empty():
        return message(NOTHING, title=title, theme=theme)
    colours = palette(theme)
    figure = go.Figure()
    curve(
        figure, shown, "p95", name="95 % of tokens at most", colour=colours.categorical[1], dash="dash", markers=False,
        width=1.5, hover="layer %{x}<br>95 % of tokens use at most %{y:.0f}",
    )  # fmt: skip
    curve(
        figure, shown, "before_active", name="as the model is", colour=colours.muted, dash="dot", markers=False,
        width=1.5, hover="layer %{x}<br>as the model is %{y:.2f}",
    )  # fmt: skip
    extra = shown.select("kept_mass", "tokens").to_numpy()
    hover = "layer %{x}<br>%{y:.2f} experts on average<br>%{customdata[0]:.1%} kept<br>%{customdata[1]:,.0f} tokens"
    curve(figure, shown, "mean_active", name="mean", colour=colours.accent, hover=hover, customdata=extra)
    layout(figure, title=title, x="layer", y="experts per token", theme=theme, height=360, wide=False)
    return over_layers(figure)


def layer_mass(frame: pl.DataFrame, *, mass_of: str, theme: Theme = "light") -> go.Figure:
    """Kept mass and changed tokens per layer at one value."""
    title = "Kept mass and changed tokens per layer"
    shown = frame.drop_nulls("kept_mass")
    if shown.is_empty():
        return message(NOTHING, title=title, theme=theme)
    colours = palette(theme)
    figure = go.Figure()
    curve(
        figure, shown, "changed_tokens", name="tokens with other experts", colour=colours.categorical[1], dash="dash",
        hover="layer %{x}<br>%{y:.1%} of the tokens get other experts",
    )  # fmt: skip
    hover = f"layer %{{x}}<br>%{{y:.1%}} of {safe(mass_of)} kept"
    curve(figure, shown, "kept_mass", name="kept mass", colour=colours.accent, hover=hover)
    layout(figure, title=title, x="layer", y="share", theme=theme, height=360, wide=False)
    return over_layers(figure, percent=True)


def layer_balance(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """Coefficient of variation of the load per layer, before and after."""
    title = "Balance of the load per layer"
    shown = frame.drop_nulls("load_cv")
    if shown.is_empty():
        return message(NOTHING, title=title, theme=theme)
    colours = palette(theme)
    figure = go.Figure()
    curve(
        figure, shown, "before_cv", name="before", colour=colours.muted, dash="dot",
        hover="layer %{x}<br>before %{y:.3f}",
    )  # fmt: skip
    extra = shown.select("before_peak", "load_peak").to_numpy()
    hover = "layer %{x}<br>after %{y:.3f}<br>busiest expert %{customdata[1]:.2f} × the mean"
    hover += ", %{customdata[0]:.2f} before"
    curve(figure, shown, "load_cv", name="after", colour=colours.accent, hover=hover, customdata=extra)
    layout(
        figure, title=title, x="layer", y="coefficient of variation (0 = even)", theme=theme, height=360, wide=False
    )  # fmt: skip
    return over_layers(figure)


def change_map(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """Layer x expert: how many more tokens of a hundred use each expert. frame: ``app.frames.what_if.loads``."""
    title = "How the load of each expert changes"
    if frame.is_empty() or not frame["before"].sum():
        return message(NOTHING, title=title, theme=theme)
    points, labels, width = matrix(frame.with_columns((pl.col("change") * 100).alias("points")), "points")
    before, _, _ = matrix(frame, "before_share")
    after, _, _ = matrix(frame, "after_share")
    bound = max(float(np.nanmax(np.abs(points))), 0.1)
    hover = "layer %{y}, expert %{x}<br>%{customdata[0]:.1%} of tokens before"
    hover += "<br>%{customdata[1]:.1%} after<extra></extra>"
    heat = go.Heatmap(
        z=points, y=labels, zmid=0.0, zmin=-bound, zmax=bound, colorscale=scale(palette(theme).diverging),
        colorbar=colorbar("tokens of a hundred"), hoverongaps=False,
        hovertemplate="layer %{y}, expert %{x}<br>%{z:+.2f} tokens of a hundred<extra></extra>",
    )  # fmt: skip
    if points.size <= MAX_DETAIL_CELLS:
        heat.update(customdata=np.stack([before, after], axis=-1).astype(np.float32), hovertemplate=hover)
    return expert_map(go.Figure(heat), title=title, labels=labels, width=width, theme=theme)


def expert_loads(frame: pl.DataFrame, *, layer: str, theme: Theme = "light") -> go.Figure:
    """Load of one layer's experts before and after, as bars. frame: ``app.frames.what_if.loads`` of one layer."""
    title = f"Load of the experts of layer {safe(layer)}"
    if frame.is_empty() or not frame["before"].sum():
        return message(NOTHING, title=title, theme=theme)
    colours = palette(theme)
    figure = go.Figure()
    bars = (("before_share", "as the router chooses", colours.muted), ("after_share", "with the bias", colours.accent))
    moved = not frame["before"].equals(frame["after"])
    for column, words, colour in bars if moved else bars[:1]:
        figure.add_bar(
            x=frame["expert"], y=frame[column], name=words, marker={"color": colour},
            hovertemplate=f"expert %{{x}}: %{{y:.1%}} of tokens {words}<extra></extra>",
        )  # fmt: skip
    layout(
        figure, title=title, x="expert", y="share of the tokens", theme=theme, height=340, bargap=0.25, wide=False
    )  # fmt: skip
    figure.update_yaxes(tickformat=".0%")
    figure.update_xaxes(showgrid=False, nticks=24)
    return pickable(figure, expert="x", layer=f"={layer}")


def domain_changes(frame: pl.DataFrame, *, layer: str, theme: Theme = "light") -> go.Figure:
    """Tokens of each domain that get other experts, and the evenness of its load before and after."""
    title = f"By domain, layer {safe(layer)}"
    shown = frame.drop_nulls("changed_tokens")
    if shown.is_empty():
        return message(NOTHING, title=title, theme=theme)
    shown = shown.reverse()
    extra: Any = shown.select("before_cv", "load_cv", "tokens").to_numpy()
    hover = "%{y}: %{x:.1%} of the tokens get other experts<br>coefficient of variation %{customdata[0]:.2f} now, "
    hover += "%{customdata[1]:.2f} then<br>%{customdata[2]:,.0f} tokens<extra></extra>"
    bars = go.Bar(
        x=shown["changed_tokens"], y=[safe(name, 24) for name in shown["domain"]], orientation="h", customdata=extra,
        hovertemplate=hover, marker={"color": palette(theme).accent}, width=min(0.62, len(shown) / 11),
    )  # fmt: skip
    figure = go.Figure(bars)
    layout(figure, title=title, x="tokens that get other experts", y="", theme=theme, height=340, legend=False)
    figure.update_yaxes(type="category", showgrid=False)
    return figure.update_xaxes(tickformat=".0%", rangemode="tozero")


def shares_over_values(
    frame: pl.DataFrame, columns: dict[str, str], *, title: str, axis: str, value: float | None = None,
    percent: bool = True, unit: str = "", theme: Theme = "light",
) -> go.Figure:  # fmt: skip
    """Some figures of a method over its values, a line each. columns: name in the frame -> words; what ends in
    ``_before`` is how the model is, a grey dotted line. value: marked."""
    there = [name for name in columns if name in frame.columns and frame[name].drop_nulls().len()]
    if not there:
        return message(NOTHING, title=title, theme=theme)
    shown = frame.sort("value")
    figure = go.Figure()
    colours = iter(palette(theme).categorical)
    number = "%{y:.1%}" if percent else f"%{{y:.3g}} {unit}"
    for name in there:
        line: dict[str, Any] = {"color": palette(theme).muted, "width": 1.5, "dash": "dot"}
        if not name.endswith("_before"):
            line = {"color": next(colours), "width": 2}
        figure.add_scatter(
            x=shown["value"], y=shown[name], name=columns[name], mode="lines+markers", marker={"size": 5},
            line=line, hovertemplate=f"%{{x:.3g}}: {number}<br>{columns[name]}<extra></extra>",
        )  # fmt: skip
    if value is not None:
        figure.add_vline(x=value, line={"color": palette(theme).muted, "width": 1, "dash": "dot"})
    layout(figure, title=title, x=safe(axis), y="share" if percent else unit, theme=theme, height=380, wide=False)
    return figure.update_yaxes(rangemode="tozero", tickformat=".0%" if percent else None)


def _mark(figure: go.Figure, frame: pl.DataFrame, value: float, x: str, y: str, theme: Theme) -> None:
    """A ring around the value that is chosen."""
    near = frame.with_columns((pl.col("value") - value).abs().alias("away")).sort("away").row(0, named=True)
    figure.add_scatter(
        x=[near[x]], y=[near[y]], mode="markers", showlegend=False, hoverinfo="skip",
        marker={"size": 14, "symbol": "circle-open", "line": {"width": 2}, "color": palette(theme).text},
    )  # fmt: skip
