"""Figures of rules tried on the model itself: what they cost against what they save, per domain, layer and token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import polars as pl

from app.figures.interval import band, whiskers
from app.figures.layers import curve, over_layers
from app.figures.style import Theme, colorbar, colours_of, layout, message, palette, rows_height, safe, scale

WORDS = {
    "top_k": "k experts per token", "top_p": "top-p", "ratio": "ratio to the largest weight",
    "threshold": "least gate weight", "null_experts": "null experts", "plan": "route step of a plan",
    "mask_top": "best experts masked", "shared": "shared experts off",
}  # fmt: skip


def costs(frame: pl.DataFrame, *, where: str = "all text", theme: Theme = "light") -> go.Figure:
    """Change of the loss against the experts' FLOPs, one curve per rule. frame: ``app.frames.sweep.rules``."""
    title = f"What a rule costs against what it saves, {where}"
    shown = frame.filter(pl.col("change").is_not_null()).sort("flops_share")
    if shown.is_empty():
        return message("No rule was tried.", title=title, theme=theme)
    names = shown["rule"].unique(maintain_order=True).to_list()
    colours = colours_of([name for name in WORDS if name in names], theme)
    figure = go.Figure()
    for name, colour in colours.items():
        part = shown.filter(pl.col("rule") == name)
        figure.add_scatter(
            x=part["flops_share"], y=part["change"], name=WORDS[name], mode="lines+markers",
            line={"color": colour, "width": 1.5}, marker={"size": 8},
            error_y=whiskers(part["change"], part["change_low"], part["change_high"], colour=colour),
            customdata=_hover(part), hovertemplate=_HOVER,
        )  # fmt: skip
    muted = palette(theme).muted
    figure.add_scatter(
        x=[1.0], y=[0.0], name="the router's own choice", mode="markers", hoverinfo="name",
        marker={"symbol": "diamond", "size": 10, "color": muted},
    )  # fmt: skip
    figure.add_hline(y=0.0, line={"color": muted, "dash": "dot", "width": 1.2})
    x = "routed experts' FLOPs, share of the router's own"
    layout(figure, title=title, x=x, y="change of the loss, nats per token", theme=theme, height=420)
    figure.update_xaxes(tickformat=".0%", rangemode="tozero")
    return figure


def by_domain(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """Change of the loss, rules x domains. frame: ``app.frames.sweep.rules`` without the model as it is."""
    title = "Change of the loss per domain"
    shown = frame.filter(pl.col("change").is_not_null())
    if shown.is_empty():
        return message("No rule was tried.", title=title, theme=theme)
    rows, columns = (shown[name].unique(maintain_order=True).to_list() for name in ("trial", "domain"))
    values = {(row["trial"], row["domain"]): row for row in shown.iter_rows(named=True)}
    cells = [[(values.get((trial, domain)) or {}).get("change") for domain in columns] for trial in rows]
    texts = [[_interval(values.get((trial, domain))) for domain in columns] for trial in rows]
    known = [abs(value) for row in cells for value in row if value is not None]
    # A single rule that breaks the model must not hide the differences of all others.
    bound = max(1e-6, sorted(known)[int(0.8 * (len(known) - 1))] * 1.25)
    figure = go.Figure(
        go.Heatmap(
            z=cells, x=[safe(name, 24) for name in columns], y=[safe(name) for name in rows], customdata=texts,
            zmin=-bound, zmid=0.0, zmax=bound, colorscale=scale(palette(theme).diverging[::-1]),
            colorbar=colorbar("nats per token"), hoverongaps=False,
            hovertemplate="%{y}, %{x}<br>%{z:+.4f} nats per token%{customdata}<extra></extra>",
        )
    )  # fmt: skip
    layout(figure, title=title, x="domain", y="", theme=theme, height=rows_height(len(rows), each=22), legend=False)
    figure.update_xaxes(type="category")
    return figure.update_yaxes(type="category", autorange="reversed")


def active(frame: pl.DataFrame, *, trial: str, theme: Theme = "light") -> go.Figure:
    """Experts per token over the layers, a curve per domain. frame: ``app.frames.sweep.active`` of one trial."""
    title = f"Experts per token under {safe(trial)}"
    if frame.is_empty():
        return message("No rule was tried.", title=title, theme=theme)
    figure = go.Figure()
    domains = [name for name in frame["domain"].unique(maintain_order=True).to_list() if name != "all"]
    for name, colour in colours_of(domains, theme).items():
        part = frame.filter(pl.col("domain") == name)
        curve(
            figure, part, "mean", name=safe(name, 24), colour=colour, width=1.5,
            hover=f"{safe(name, 24)}, layer %{{x}}<br>mean %{{y:.2f}}, 95 % of tokens at most %{{customdata:.0f}}",
            customdata=part["p95"],
        )  # fmt: skip
    part, ink = frame.filter(pl.col("domain") == "all"), palette(theme)
    curve(figure, part, "mean", name="all text", colour=ink.text, width=2.5, hover="layer %{x}<br>mean %{y:.2f}")
    curve(
        figure, part, "p95", name="95th percentile", colour=ink.muted, dash="dot", width=1.5, markers=False,
        hover="layer %{x}<br>95 %% of tokens use at most %{y:.0f}".replace("%%", "%"),
    )  # fmt: skip
    layout(figure, title=title, x="layer", y="experts per token", theme=theme, height=380)
    return over_layers(figure)


def difficulty(frame: pl.DataFrame, *, trial: str, theme: Theme = "light") -> go.Figure:
    """Experts per token against the loss of the token, bins of equally many. frame: ``app.frames.sweep.bins``."""
    title = f"Do harder tokens use more experts? {safe(trial)}"
    if frame.is_empty():
        return message("No rule under which tokens differ in their number of experts was tried.", title=title,
                       theme=theme)  # fmt: skip
    colours = palette(theme)
    figure = go.Figure()
    for index, label in enumerate(name for name in frame["label"].unique(maintain_order=True) if name != "all"):
        part = frame.filter(pl.col("label") == label)
        figure.add_scatter(
            x=part["bin"] + 1, y=part["active"], mode="lines", name="one layer", legendgroup="layer",
            customdata=part["loss"], opacity=0.45,
            showlegend=index == 0, line={"color": colours.muted, "width": 1.2},
            hovertemplate=f"layer {safe(label)}<br>loss %{{customdata:.2f}} nats: %{{y:.2f}} experts<extra></extra>",
        )  # fmt: skip
    mean = frame.filter(pl.col("label") == "all")
    band(figure, x=mean["bin"] + 1, low=mean["active_low"], high=mean["active_high"], colour=colours.accent)
    figure.add_scatter(
        x=mean["bin"] + 1, y=mean["active"], mode="lines+markers", name="mean over the layers", marker={"size": 6},
        line={"color": colours.accent, "width": 2.5}, customdata=mean.select("from", "to", "tokens").to_numpy(),
        hovertemplate="loss %{customdata[0]:.2f} to %{customdata[1]:.2f} nats, %{customdata[2]:,.0f} tokens<br>"
        "%{y:.3f} experts<extra></extra>",
    )  # fmt: skip
    x = "loss of the next token, nats (mean of each bin)"
    layout(figure, title=title, x=x, y="experts per token", theme=theme, height=400, wide=False)
    return figure.update_xaxes(tickvals=mean["bin"] + 1, ticktext=[f"{loss:.2g}" for loss in mean["loss"]])


def correlations(frame: pl.DataFrame, *, trial: str, theme: Theme = "light") -> go.Figure:
    """Correlation of token loss and experts, by layer and by domain. frame: ``app.frames.sweep.difficulty``."""
    title = f"Loss of a token and its experts, {safe(trial)}"
    shown = frame.filter(pl.col("correlation").is_not_null())
    if shown.is_empty():
        return message("The number of experts does not vary.", title=title, theme=theme)
    names = {"all": "all text, mean over the layers", "domain": "within a domain", "layer": "one layer, all text"}
    colours = dict(zip(names, palette(theme).categorical, strict=False))
    figure = go.Figure()
    for kind, words in names.items():
        part = shown.filter(pl.col("of") == kind)
        labels = ["all text" if kind == "all" else f"layer {label}" if kind == "layer" else safe(label, 24)
                  for label in part["label"]]  # fmt: skip
        if labels:
            figure.add_scatter(
                x=part["correlation"], y=labels, name=words, mode="markers",
                marker={"size": 9, "color": colours[kind]},
                error_x=whiskers(part["correlation"], part["correlation_low"], part["correlation_high"],
                                 colour=colours[kind]),
                hovertemplate="%{y}<br>correlation %{x:.3f}<extra></extra>",
            )  # fmt: skip
    figure.add_vline(x=0.0, line={"color": palette(theme).muted, "dash": "dot", "width": 1.4})
    layout(figure, title=title, x="Spearman's correlation of loss and experts per token", y="", theme=theme,
           height=max(400, rows_height(len(shown), each=24) + 60), wide=False)  # fmt: skip
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return figure


def loss_over_k(frame: pl.DataFrame, *, own: float, theme: Theme = "light") -> go.Figure:
    """Loss over the number of experts per token. frame: ``app.frames.sweep.rules``; own: of the router."""
    title = "Loss over the number of experts per token"
    shown = frame.sort("number")
    if shown.is_empty():
        return message("No number of experts was tried.", title=title, theme=theme)
    figure = go.Figure()
    domains = [name for name in shown["domain"].unique(maintain_order=True).to_list() if name != "all"]
    for name, colour in colours_of(domains, theme).items():
        _k_curve(figure, shown.filter(pl.col("domain") == name), safe(name, 24), colour, 1.5)
    _k_curve(figure, shown.filter(pl.col("domain") == "all"), "all text", palette(theme).text, 2.5, banded=True)
    figure.add_vline(x=own, line={"color": palette(theme).muted, "dash": "dot", "width": 1.4},
                     annotation={"text": "the model's own", "font": {"size": 12}, "yanchor": "top"})  # fmt: skip
    layout(figure, title=title, x="experts per token", y="change of the loss, nats per token", theme=theme, height=400)
    figure.update_xaxes(tickvals=shown["number"].unique().sort().to_list())
    return figure


def redundancy(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """Change of the loss against the share of experts that are masked. frame: ``app.frames.sweep.rules``."""
    title = "Loss without the best experts of each token"
    shown = frame.filter(pl.col("rule") == "mask_top").sort("number")
    others = frame.filter((pl.col("rule") == "shared") & (pl.col("domain") == "all"))
    if shown.is_empty() and others.is_empty():
        return message("No expert was masked.", title=title, theme=theme)
    figure = go.Figure()
    domains = [name for name in shown["domain"].unique(maintain_order=True).to_list() if name != "all"]
    for name, colour in colours_of(domains, theme).items():
        _k_curve(figure, shown.filter(pl.col("domain") == name), safe(name, 24), colour, 1.5)
    _k_curve(figure, shown.filter(pl.col("domain") == "all"), "all text", palette(theme).text, 2.5, banded=True)
    for row, dash in zip(others.iter_rows(named=True), ("dash", "dashdot"), strict=False):
        words = "shared experts off" + (", one routed more" if row["value"] == "replaced" else "")
        figure.add_hline(y=row["change"], line={"color": palette(theme).alarm, "dash": dash, "width": 1.4},
                         annotation={"text": words, "font": {"size": 12}})  # fmt: skip
    x = "best experts of each token that are masked, share of all"
    layout(figure, title=title, x=x, y="change of the loss, nats per token", theme=theme, height=400)
    figure.update_xaxes(tickformat=".3~p", rangemode="tozero")
    return figure


def _k_curve(
    figure: go.Figure, part: pl.DataFrame, name: str, colour: str, width: float, *, banded: bool = False
) -> None:
    """One curve; its interval as a band, or only on hovering: bands of many domains hide each other."""
    if part.is_empty():
        return
    if banded:
        band(figure, x=part["number"], low=part["change_low"], high=part["change_high"], colour=colour)
    figure.add_scatter(
        x=part["number"], y=part["change"], name=name, mode="lines+markers", line={"color": colour, "width": width},
        marker={"size": 6}, customdata=_hover(part), hovertemplate=f"{name}<br>{_HOVER}",
    )  # fmt: skip


_HOVER = (
    "%{customdata[0]}<br>%{y:+.4f} nats per token%{customdata[1]}<br>%{customdata[2]:.2f} experts per token,"
    " %{customdata[3]:.0%} of the experts' FLOPs<br>likeliest token the same for %{customdata[4]:.1%}<extra></extra>"
)


def _hover(part: pl.DataFrame) -> Sequence[Sequence[Any]]:
    return [
        [safe(row["trial"]), _interval(row), row["active"], row["flops_share"], row["agreement"]]
        for row in part.iter_rows(named=True)
    ]


def _interval(row: dict[str, Any] | None) -> str:
    if row is None or row["change_low"] is None:
        return ""
    return f" ({row['change_low']:+.4f} to {row['change_high']:+.4f})"
