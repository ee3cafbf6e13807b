"""Figures of expert caches: hit rates against cache size and per layer, and a run among the published models."""

from __future__ import annotations

import plotly.graph_objects as go
import polars as pl

from app.figures.consistency import BESIDE_HEIGHT, CONTROL_WORDS, DASHES, shades
from app.figures.interval import band, whiskers
from app.figures.layers import curve, over_layers
from app.figures.style import Theme, colours_of, fade, layout, message, palette, safe

POLICY_WORDS = {"sch": "SCH", "lru": "LRU", "lfu": "LFU", "belady": "Belady"}


def hit_rate_curves(
    frame: pl.DataFrame, *, segment_length: int | None, scope_words: str, theme: Theme = "light"
) -> go.Figure:
    """Hit rate against cache size rho: SCH at one segment length, LRU, LFU and Belady, with the controls of LRU dashed.

    frame: rows of one scope of ``app.frames.consistency.hit_rates``.
    """
    title = f"Hit rate by cache size, {scope_words}"
    if frame.is_empty():
        return message("Hit rates are computed when the run is finished.", title=title, theme=theme)
    figure = go.Figure()
    for policy, colour in colours_of(list(POLICY_WORDS), theme).items():
        part = frame.filter((pl.col("policy") == policy) & (pl.col("control") == "observed"))
        if policy == "sch":
            part = part.filter(pl.col("segment_length") == segment_length)
        if part.is_empty():
            continue
        name = POLICY_WORDS[policy] + (f" ({segment_length} tokens)" if policy == "sch" else "")
        band(figure, x=part["ratio"], low=part["low"], high=part["high"], colour=colour)
        hover = f"{name}<br>%{{customdata:,}} slots, ρ = %{{x:.2f}}<br>hit rate %{{y:.1%}}<extra></extra>"
        figure.add_scatter(
            x=part["ratio"],
            y=part["value"],
            customdata=part["slots"],
            name=name,
            mode="lines",
            hovertemplate=hover,
            line={"color": colour, "width": 2.2},
        )
    for control in ("shuffled_in_sequence", "shuffled", "uniform"):
        part = frame.filter((pl.col("policy") == "lru") & (pl.col("control") == control))
        if len(part):
            name = CONTROL_WORDS[control]
            figure.add_scatter(
                x=part["ratio"],
                y=part["value"],
                name=name,
                mode="lines",
                line={"color": palette(theme).muted, "dash": DASHES[control], "width": 1.3},
                hovertemplate=f"LRU, {name}<br>ρ = %{{x:.2f}}<br>hit rate %{{y:.1%}}<extra></extra>",
            )
    layout(
        figure,
        title=title,
        x="cache size ρ (slots over experts used per token)",
        y="hit rate",
        theme=theme,
        height=460,
        wide=False,
    )
    figure.add_vline(x=1, line={"color": palette(theme).muted, "width": 1, "dash": "dot"})
    figure.update_yaxes(tickformat=".0%", range=[0, 1.02])
    figure.update_xaxes(range=[0, min(float(frame["ratio"].max()), 8.0)])  # type: ignore[arg-type]
    return figure


def hit_rate_layers(frame: pl.DataFrame, *, policy: str, theme: Theme = "light") -> go.Figure:
    """Hit rate of every layer's own cache at rho 1, 2 and 3. frame: observed rows of one policy, scopes = labels."""
    title = f"Hit rate of every layer's own cache, {POLICY_WORDS.get(policy, policy)}"
    if frame.is_empty():
        return message("Hit rates are computed when the run is finished.", title=title, theme=theme)
    figure = go.Figure()
    for ratio, colour in zip((1.0, 2.0, 3.0), shades(3, theme), strict=True):
        part = frame.filter((pl.col("ratio") - ratio).abs() < 1e-6)
        hover = f"layer %{{x}}, ρ = {ratio:g} (%{{customdata}} slots)<br>hit rate %{{y:.1%}}"
        curve(
            figure, part.rename({"scope": "label"}), "value", name=f"ρ = {ratio:g}", colour=colour, hover=hover,
            customdata=part["slots"],
        )  # fmt: skip
    layout(figure, title=title, x="layer", y="hit rate", theme=theme, height=400)
    return over_layers(figure, percent=True).update_yaxes(range=[0, 1.02])


def beside_published(frame: pl.DataFrame, *, this: str, title: str, x: str, theme: Theme = "light") -> go.Figure:
    """One figure of this run among the published models, the largest on top.

    frame: model, value, low, high (null where there is no interval), ours (bool).
    """
    shown = frame.sort("value")
    if shown.is_empty():
        return message("Nothing to compare yet.", title=title, theme=theme)
    colours = palette(theme)
    names = [safe(this if ours else model, 34) for model, ours in shown.select("model", "ours").iter_rows()]
    bold = [f"<b>{name}</b>" if ours else name for name, ours in zip(names, shown["ours"], strict=True)]
    figure = go.Figure()
    for ours, colour in ((False, fade(colours.muted, 0.45)), (True, colours.accent)):
        part = shown.filter(pl.col("ours") == ours)
        error = whiskers(part["value"], part["low"], part["high"], colour=colours.text)
        figure.add_bar(
            x=part["value"],
            y=[name for name, own in zip(bold, shown["ours"], strict=True) if own == ours],
            orientation="h",
            marker={"color": colour},
            hovertemplate="%{y}<br>%{x:.1%}<extra></extra>",
            error_x=error if ours else None,
        )
    layout(
        figure,
        title=title,
        x=x,
        y="",
        theme=theme,
        height=max(BESIDE_HEIGHT, 90 + 21 * len(shown)),
        legend=False,
        bargap=0.28,
        barmode="overlay",
    )
    figure.update_xaxes(tickformat=".0%", range=[0, 1])
    figure.update_yaxes(
        type="category", showgrid=False, tickfont={"size": 11}, categoryorder="array", categoryarray=bold
    )
    return figure
