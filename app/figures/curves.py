"""Curves over layers: balance, confidence, coverage, specialization; and bars per domain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

from app.figures.interval import band
from app.figures.layers import curve, over_layers
from app.figures.style import Theme, colours_of, layout, log_ticks, message, palette, safe

BALANCE_WORDS = {
    "normalised_entropy": ("normalised entropy", "1 = even"),
    "gini": ("Gini", "0 = even"),
    "cv": ("coefficient of variation", "0 = even"),
    "max_violation": ("MaxVio", "0 = even"),
}
CONFIDENCE_WORDS = {
    "entropy": ("Entropy of the router", "nats"),
    "top_probability": ("Largest router probability", "0 to 1"),
    "selected_probability": ("Router probability on the selection", "0 to 1"),
    "first_margin": ("First margin: best minus second logit", "logits"),
    "boundary_margin": ("Boundary margin: last expert taken minus next", "logits"),
}


def balance_curves(frame: pl.DataFrame, *, where: str = "all text", theme: Theme = "light") -> go.Figure:
    """Four measures of evenness over the layers, one panel each. frame: ``app.frames.load.balance``."""
    title = f"Balance of the load per layer, {where}"
    shown = frame.drop_nulls("max_violation")
    if shown.is_empty():
        return message("No load recorded for this choice.", title=title, theme=theme)
    colours = palette(theme)
    names = [f"{name[0].upper()}{name[1:]} ({unit})" for name, unit in BALANCE_WORDS.values()]
    figure = make_subplots(rows=2, cols=2, subplot_titles=names, vertical_spacing=0.24, horizontal_spacing=0.09)
    for index, (metric, (name, _)) in enumerate(BALANCE_WORDS.items()):
        place: dict[str, Any] = {"row": index // 2 + 1, "col": index % 2 + 1, "showlegend": False}
        hover = f"layer %{{x}}<br>{name} %{{y:.3f}}<br>%{{customdata:,.0f}} tokens"
        curve(
            figure, shown, metric, name=name, colour=colours.accent, hover=hover, customdata=shown["tokens"], **place
        )  # fmt: skip
        if metric == "cv":
            curve(
                figure, shown, "noise_cv", name="a balanced router, by chance", colour=colours.muted, dash="dot",
                width=1.5, markers=False, hover="layer %{x}<br>by chance alone %{y:.3f}", **place,
            )  # fmt: skip
    margin = {"l": 8, "r": 12, "t": 84, "b": 8}
    layout(figure, title=title, x="layer", y="", theme=theme, height=460, legend=False, margin=margin)
    figure.update_annotations(font={"size": 12}, xanchor="left")
    for index, annotation in enumerate(figure.layout.annotations):
        annotation.x = figure.layout["xaxis" if index % 2 == 0 else "xaxis2"].domain[0]
    return over_layers(figure)


def confidence_band(
    frame: pl.DataFrame, *, quantity: str, where: str = "all text", theme: Theme = "light"
) -> go.Figure:
    """Median with the 10th to 90th percentile over tokens, and the mean, per layer.

    frame: ``app.frames.confidence.confidence``; quantity: a key of ``CONFIDENCE_WORDS``.
    """
    name, unit = CONFIDENCE_WORDS[quantity]
    title = f"{name}, {where}"
    shown = frame.filter(pl.col("quantity") == quantity)
    if shown.is_empty():
        return message("The router's logits were not seen.", title=title, theme=theme)
    colours = palette(theme)
    figure = go.Figure()
    band(
        figure, x=shown["label"].to_list(), low=shown["p10"], high=shown["p90"], colour=colours.accent,
        name="10th to 90th percentile",
    )  # fmt: skip
    hover = "layer %{x}<br>median %{y:.3f}<br>10th to 90th percentile %{customdata[0]:.3f} to %{customdata[1]:.3f}"
    hover += "<br>mean %{customdata[2]:.3f}<br>%{customdata[3]:,.0f} tokens"
    extra = shown.select("p10", "p90", "mean", "tokens").to_numpy()
    curve(figure, shown, "p50", name="median", colour=colours.accent, hover=hover, customdata=extra)
    curve(
        figure, shown, "mean", name="mean", colour=colours.muted, dash="dot", width=1.5, markers=False,
        hover="layer %{x}<br>mean %{y:.3f}",
    )  # fmt: skip
    layout(figure, title=title, x="layer", y=f"{name.split(':')[0].lower()} ({unit})", theme=theme, height=340)
    return over_layers(figure)


def coverage_band(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """Tokens per expert over the layers: fewest to most, the middle 80 %, the median, and where starving begins.

    frame: ``app.frames.load.coverage``.
    """
    title = "Tokens per expert: does the text reach all of them?"
    if frame.is_empty() or not frame["most"].max():
        return message("No selections recorded.", title=title, theme=theme)
    colours = palette(theme)
    x = frame["label"].to_list()
    # A log axis has no 0: experts without tokens are drawn at one half.
    drawn = frame.with_columns(pl.col("fewest", "p10", "median", "p90", "most").fill_null(0).clip(lower_bound=0.5))
    figure = go.Figure()
    for upper, lower, words in (("most", "fewest", "fewest to most"), ("p90", "p10", "middle 80 % of experts")):
        band(figure, x=x, low=drawn[lower], high=drawn[upper], colour=colours.accent, name=words)
    extra = frame.select("fewest", "most", "starved", "num_experts").to_numpy()
    hover = "layer %{x}<br>median expert: %{y:,.0f} tokens<br>fewest %{customdata[0]:,.0f}, most %{customdata[1]:,.0f}"
    hover += "<br>%{customdata[2]:.0f} of %{customdata[3]:.0f} experts starve"
    curve(figure, drawn, "median", name="median expert", colour=colours.accent, hover=hover, customdata=extra)
    curve(
        figure, drawn, "threshold", name="starved below", colour=colours.alarm, dash="dash", width=1.5, markers=False,
        hover="layer %{x}<br>starved below %{y:,.0f} tokens",
    )  # fmt: skip
    layout(figure, title=title, x="layer", y="tokens per expert (log scale)", theme=theme, height=360, wide=False)
    over_layers(figure)
    return figure.update_yaxes(**log_ticks([*drawn["fewest"], *drawn["most"], *frame["threshold"]]))


def domain_bars(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """Tokens per domain. frame: ``app.frames.domains.domain_tokens``."""
    title = "Tokens per domain"
    if frame.is_empty():
        return message("No sequence recorded yet.", title=title, theme=theme)
    shown = frame.head(24).reverse()
    hover = "%{y}<br>%{x:,} tokens, %{customdata[0]:.1%} of all<br>%{customdata[1]:,} sequences<extra></extra>"
    figure = go.Figure(
        go.Bar(
            x=shown["tokens"],
            y=[safe(name, 24) for name in shown["domain"]],
            orientation="h",
            hovertemplate=hover,
            customdata=shown.select("share", "sequences").to_numpy(),
            marker={"color": palette(theme).accent},
            width=min(0.62, len(shown) / 11),
        )
    )
    layout(figure, title=title, x="tokens", y="", theme=theme, height=360, legend=False, bargap=0.35)
    figure.update_yaxes(type="category", showgrid=False)
    return figure


def specialization_curves(frame: pl.DataFrame, *, domains: Sequence[str], theme: Theme = "light") -> go.Figure:
    """How far each domain's load lies from the mean of the domains, over the layers, and what chance alone gives.

    frame: ``app.frames.domains.specialization``.
    """
    title = "Distance of each domain from their mean"
    if frame.is_empty() or len(domains) < 2:
        return message("One domain only: nothing to compare.", title=title, theme=theme)
    figure = go.Figure()
    for domain, colour in colours_of(list(domains), theme).items():
        part = frame.filter(pl.col("domain") == domain)
        name = safe(domain, 24)
        hover = (
            f"{name}, layer %{{x}}<br>%{{y:.1%}} of the selections would have to move<br>%{{customdata:,}} selections"
        )
        curve(figure, part, "moved", name=name, colour=colour, hover=hover, customdata=part["selections"])
    noise = frame.group_by("layer", "step", "label", maintain_order=True).agg(pl.col("noise").max())
    curve(
        figure, noise, "noise", name="by chance, at most", colour=palette(theme).muted, dash="dot", width=1.5,
        markers=False, hover="layer %{x}<br>by chance alone at most %{y:.1%}",
    )  # fmt: skip
    layout(figure, title=title, x="layer", y="selections that differ (share)", theme=theme, height=400, wide=False)
    return over_layers(figure, percent=True)
