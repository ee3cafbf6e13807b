"""Curves over layers: balance, confidence, coverage, specialization; and bars per domain."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

from app.figures.style import Theme, colours_of, fade, layout, log_ticks, message, palette, safe

BALANCE_WORDS = {
    "normalised_entropy": ("normalised entropy", "0 to 1, 1 = even"),
    "gini": ("Gini", "0 = even"),
    "cv": ("coefficient of variation", "0 = even"),
    "max_violation": ("MaxVio", "busiest expert over the mean, minus 1"),
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
    x = shown["label"].to_list()
    for index, (metric, (name, _)) in enumerate(BALANCE_WORDS.items()):
        place = {"row": index // 2 + 1, "col": index % 2 + 1}
        hover = f"layer %{{x}}<br>{name} %{{y:.3f}}<br>%{{customdata:,.0f}} tokens<extra></extra>"
        figure.add_scatter(
            x=x,
            y=shown[metric],
            customdata=shown["tokens"],
            mode="lines+markers",
            showlegend=False,
            hovertemplate=hover,
            line={"color": colours.accent, "width": 2},
            marker={"size": 6},
            **place,
        )
        if metric == "cv":
            figure.add_scatter(
                x=x,
                y=shown["noise_cv"],
                mode="lines",
                name="a balanced router, by chance",
                showlegend=False,
                line={"color": colours.muted, "dash": "dot", "width": 1.5},
                hovertemplate="layer %{x}<br>by chance alone %{y:.3f}<extra></extra>",
                **place,
            )
    layout(
        figure,
        title=title,
        x="layer",
        y="",
        theme=theme,
        height=500,
        legend=False,
        margin={"l": 8, "r": 12, "t": 84, "b": 8},
    )
    figure.update_annotations(font={"size": 12}, xanchor="left")
    for index, annotation in enumerate(figure.layout.annotations):
        annotation.x = figure.layout["xaxis" if index % 2 == 0 else "xaxis2"].domain[0]
    figure.update_xaxes(type="category", showgrid=False, nticks=24)
    figure.update_yaxes(rangemode="tozero")
    return figure


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
    x = shown["label"].to_list()
    figure = go.Figure()
    for column, fill in (("p90", None), ("p10", "tonexty")):
        figure.add_scatter(
            x=x,
            y=shown[column],
            mode="lines",
            line={"width": 0},
            fill=fill,
            fillcolor=fade(colours.accent, 0.18),
            showlegend=column == "p10",
            name="10th to 90th percentile",
            hoverinfo="skip",
        )
    extra = shown.select("p10", "p90", "mean", "tokens").to_numpy()
    hover = "layer %{x}<br>median %{y:.3f}<br>10th to 90th percentile %{customdata[0]:.3f} to %{customdata[1]:.3f}"
    hover += "<br>mean %{customdata[2]:.3f}<br>%{customdata[3]:,.0f} tokens<extra></extra>"
    figure.add_scatter(
        x=x,
        y=shown["p50"],
        customdata=extra,
        mode="lines+markers",
        name="median",
        hovertemplate=hover,
        line={"color": colours.accent, "width": 2},
        marker={"size": 6},
    )
    figure.add_scatter(
        x=x,
        y=shown["mean"],
        mode="lines",
        name="mean",
        line={"color": colours.muted, "dash": "dot", "width": 1.5},
        hovertemplate="layer %{x}<br>mean %{y:.3f}<extra></extra>",
    )
    layout(figure, title=title, x="layer", y=f"{name.split(':')[0].lower()} ({unit})", theme=theme, height=340)
    figure.update_xaxes(type="category", showgrid=False, nticks=24)
    figure.update_yaxes(rangemode="tozero")
    return figure


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
    y = {name: [max(value or 0, 0.5) for value in frame[name]] for name in ("fewest", "p10", "median", "p90", "most")}
    figure = go.Figure()
    for upper, lower, alpha, words in (
        ("most", "fewest", 0.10, "fewest to most"),
        ("p90", "p10", 0.22, "middle 80 % of experts"),
    ):
        figure.add_scatter(x=x, y=y[upper], mode="lines", line={"width": 0}, showlegend=False, hoverinfo="skip")
        figure.add_scatter(
            x=x,
            y=y[lower],
            mode="lines",
            line={"width": 0},
            fill="tonexty",
            name=words,
            hoverinfo="skip",
            fillcolor=fade(colours.accent, alpha),
        )
    extra = frame.select("fewest", "most", "starved", "num_experts").to_numpy()
    hover = "layer %{x}<br>median expert: %{y:,.0f} tokens<br>fewest %{customdata[0]:,.0f}, most %{customdata[1]:,.0f}"
    hover += "<br>%{customdata[2]:.0f} of %{customdata[3]:.0f} experts starve<extra></extra>"
    figure.add_scatter(
        x=x,
        y=y["median"],
        customdata=extra,
        mode="lines+markers",
        name="median expert",
        hovertemplate=hover,
        line={"color": colours.accent, "width": 2},
        marker={"size": 6},
    )
    figure.add_scatter(
        x=x,
        y=frame["threshold"],
        mode="lines",
        name="starved below",
        line={"color": colours.alarm, "dash": "dash", "width": 1.5},
        hovertemplate="layer %{x}<br>starved below %{y:,.0f} tokens<extra></extra>",
    )
    layout(figure, title=title, x="layer", y="tokens per expert (log scale)", theme=theme, height=360, wide=False)
    figure.update_yaxes(**log_ticks([*y["fewest"], *y["most"], *frame["threshold"]]))
    figure.update_xaxes(type="category", showgrid=False, nticks=24)
    return figure


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
    """How far each domain's load lies from the mean of the domains, over the layers.

    frame: ``app.frames.domains.specialization``.
    """
    title = "How far each domain's load lies from the mean of the domains"
    if frame.is_empty() or len(domains) < 2:
        return message("One domain only: nothing to compare.", title=title, theme=theme)
    figure = go.Figure()
    for domain, colour in colours_of(list(domains), theme).items():
        part = frame.filter(pl.col("domain") == domain)
        name = safe(domain, 24)
        hover = (
            f"{name}, layer %{{x}}<br>%{{y:.1%}} of the selections would have to move<br>%{{customdata:,}} "
            "selections<extra></extra>"
        )
        figure.add_scatter(
            x=part["label"],
            y=part["moved"],
            customdata=part["selections"],
            name=name,
            mode="lines+markers",
            line={"color": colour, "width": 2},
            marker={"size": 5},
            hovertemplate=hover,
        )
    layout(figure, title=title, x="layer", y="selections that differ (share)", theme=theme, height=380)
    figure.update_xaxes(type="category", showgrid=False, nticks=24)
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return figure
