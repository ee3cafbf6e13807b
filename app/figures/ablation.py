"""Figures of an ablation: perplexity beside the controls, attention sinks and the residual stream before and after."""

from __future__ import annotations

import plotly.graph_objects as go
import polars as pl

from app.figures.interval import band, whiskers
from app.figures.style import Theme, layout, log_ticks, message, palette, pickable, safe

_NAMES = {"ablated": "switched off", "random": "random controls", "same layers": "same layers"}


def perplexity_ratios(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """Perplexity over that of the unchanged model, with intervals, for the chosen experts and for every control.

    frame: ``app.frames.ablation.passes``.
    """
    title = "Perplexity when experts are switched off"
    shown = frame.filter((pl.col("what") != "base") & pl.col("ratio").is_not_null())
    if shown.is_empty():
        return message("Nothing was measured.", title=title, theme=theme)
    colours = palette(theme)
    looks = {"ablated": colours.alarm, "random": colours.accent, "same layers": colours.categorical[1]}
    figure = go.Figure()
    for what, colour in looks.items():
        part = shown.filter(pl.col("what") == what)
        if part.is_empty():
            continue
        labels = ["chosen experts" if what == "ablated" else f"{what} {seed}" for seed in part["seed"]]
        figure.add_scatter(
            x=part["ratio"],
            y=labels,
            error_x=whiskers(part["ratio"], part["ratio_low"], part["ratio_high"], colour=colour),
            mode="markers",
            name=_NAMES[what],
            marker={"color": colour, "size": 9},
            customdata=list(zip(part["perplexity"], map(safe, part["switched_off"]), strict=True)),
            hovertemplate="%{y}: %{customdata[1]}<br>× %{x:,.4g}, perplexity %{customdata[0]:,.4g}<extra></extra>",
        )
    figure.add_vline(x=1.0, line={"color": colours.muted, "dash": "dot", "width": 1.4})
    height = 130 + 24 * len(shown)
    layout(
        figure, title=title, x="perplexity ÷ that of the unchanged model (log scale)", y="", theme=theme, height=height
    )
    figure.update_xaxes(**_ratio_ticks([*shown["ratio_low"], *shown["ratio"], *shown["ratio_high"], 1.0]))
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def sinks_before_and_after(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """Mean attention on position 0 after each layer, before and with the experts switched off.

    frame: ``app.frames.ablation.layers``.
    """
    title = "Attention sink, before and after"
    shown = frame.filter(pl.col("sink").is_not_null())
    if shown.is_empty():
        return message("No layer has softmax attention.", title=title, theme=theme)
    colours = palette(theme)
    figure = go.Figure()
    x = shown["layer"].cast(pl.String).to_list()
    hover = "layer %{x}<br>%{y:.1%} of the attention<br>decay %{customdata[0]:.1%}"
    hover += "<br>largest decay of any control %{customdata[1]:.1%}<extra></extra>"
    for column, name, colour, dash in (
        ("sink", "unchanged", colours.accent, "solid"),
        ("sink_ablated", "switched off", colours.alarm, "dash"),
    ):
        figure.add_scatter(
            x=x,
            y=shown[column],
            customdata=shown.select("sink_decay", "control_sink_decay").to_numpy(),
            name=name,
            mode="lines+markers",
            line={"color": colour, "width": 2, "dash": dash},
            marker={"size": 6},
            hovertemplate=hover,
        )
    layout(figure, title=title, x="decoder layer", y="share of the attention", theme=theme, height=360, wide=False)
    figure.update_yaxes(**_share_axis([*shown["sink"], *shown["sink_ablated"]]))
    figure.update_xaxes(type="category", showgrid=False, nticks=24)
    return pickable(figure, layer="x")


def residual_before_and_after(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """Largest |hidden state| after each layer, before and with the experts switched off, log scale.

    frame: ``app.frames.ablation.layers``.
    """
    title = "Massive activations, before and after"
    if frame.is_empty():
        return message("The residual stream was not seen.", title=title, theme=theme)
    colours = palette(theme)
    figure = go.Figure()
    for column, massive, name, colour, dash in (
        ("residual_max", "massive", "unchanged", colours.accent, "solid"),
        ("residual_max_ablated", "massive_ablated", "switched off", colours.alarm, "dash"),
    ):
        figure.add_scatter(
            x=frame["layer"].cast(pl.String).to_list(),
            y=frame[column],
            name=name,
            mode="lines+markers",
            line={"color": colour, "width": 2, "dash": dash},
            marker={"size": 6, "symbol": ["diamond" if one else "circle" for one in frame[massive]]},
            customdata=["massive" if one else "not massive" for one in frame[massive]],
            hovertemplate="after layer %{x}<br>largest |value| %{y:,.4g}, %{customdata}<extra></extra>",
        )
    layout(figure, title=title, x="decoder layer", y="|hidden state| (log scale)", theme=theme, height=360, wide=False)
    figure.update_yaxes(**log_ticks([*frame["residual_max"], *frame["residual_max_ablated"]]))
    figure.update_xaxes(type="category", showgrid=False, nticks=24)
    return pickable(figure, layer="x")


def sink_curve(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """Mean attention on position 0 in each layer, with the least and the most of any head.

    frame: ``app.frames.super_experts.attention_sinks``.
    """
    title = "Attention on the first position"
    if frame.is_empty():
        return message("Attention was not recorded.", title=title, theme=theme)
    colours = palette(theme)
    x = frame["layer"].cast(pl.String).to_list()
    figure = go.Figure()
    band(figure, x=x, low=frame["low"], high=frame["high"], colour=colours.accent, name="least to most of any head")
    figure.add_scatter(
        x=x, y=frame["mean"], name="mean over heads", mode="lines+markers", line={"color": colours.accent, "width": 2},
        marker={"size": 6}, customdata=frame.select("low", "high").to_numpy(),
        hovertemplate="layer %{x}<br>mean over heads %{y:.1%}<br>heads %{customdata[0]:.1%} to %{customdata[1]:.1%}"
        "<extra></extra>",
    )  # fmt: skip
    layout(figure, title=title, x="decoder layer", y="share of the attention", theme=theme, height=400, wide=False)
    figure.update_yaxes(**_share_axis(frame["high"].to_list()))
    figure.update_xaxes(type="category", showgrid=False, nticks=24)
    return pickable(figure, layer="x")


def _share_axis(values: list[float]) -> dict[str, object]:
    """From 0 to a little above the largest share, at least a tenth: small sinks must not look like large ones."""
    return {"range": [0, min(1.02, max(0.1, 1.15 * max(values)))], "tickformat": ".0%"}


def _ratio_ticks(values: list[float | None]) -> dict[str, object]:
    """Ticks of ratios around 1: in per cent of change where all are close to 1, else powers of ten."""
    present = [value for value in values if value is not None and value > 0]
    if max(present) / min(present) < 1.5:
        return {"type": "log", "tickformat": ".3~f", "dtick": None, "nticks": 6}
    return log_ticks(present)
