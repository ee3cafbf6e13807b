"""Figures of a sweep's studies: self-contrast, rerouting fitted on the text so far, and items solved over several k."""

from __future__ import annotations

import plotly.graph_objects as go
import polars as pl

from app.figures.interval import whiskers
from app.figures.style import Theme, colours_of, layout, message, palette, rows_height, safe

VECTORS = {"fitted": "fitted on the text so far", "other": "fitted on another sequence", "random": "random, as long"}


def contrast_kl(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """KL of strong from weak routing, per domain and rank. frame: ``app.frames.sweep_studies.contrast``."""
    title = "How far the weak routing is from the model's own"
    if frame.is_empty():
        return message("No contrast was measured.", title=title, theme=theme)
    shown = frame.unique(["rank", "domain"], keep="first", maintain_order=True)
    ranks = [f"rank {rank}" for rank in sorted(shown["rank"].unique())]
    figure = go.Figure()
    for name, colour in colours_of(ranks, theme).items():
        part = shown.filter(pl.col("rank") == int(name.split()[1]))
        figure.add_bar(
            x=["all text" if domain == "all" else safe(domain, 24) for domain in part["domain"]], y=part["kl"],
            name=name, marker={"color": colour}, error_y=whiskers(
                part["kl"], part["kl_low"], part["kl_high"], colour=palette(theme).text
            ),
            customdata=part["agreement"],
            hovertemplate="%{x}<br>KL %{y:.3f} nats per token<br>likeliest token the same for %{customdata:.1%}"
            f"<extra>{name} alone</extra>",
        )  # fmt: skip
    layout(figure, title=title, x="", y="KL(strong || weak), nats per token", theme=theme, height=360, barmode="group")
    return figure


def contrast_accuracy(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """Accuracy of the contrasted next token less the model's own, over the strength, one curve per rank.

    frame: ``app.frames.sweep_studies.contrast`` of one domain.
    """
    title = "The contrasted next token against the model's own"
    if frame.is_empty():
        return message("No contrast was measured.", title=title, theme=theme)
    figure = go.Figure()
    ranks = [f"rank {rank}" for rank in sorted(frame["rank"].unique())]
    for name, colour in colours_of(ranks, theme).items():
        part = frame.filter(pl.col("rank") == int(name.split()[1])).sort("beta")
        figure.add_scatter(
            x=part["beta"], y=part["difference"], name=name, mode="lines+markers", marker={"size": 8},
            line={"color": colour, "width": 1.5}, customdata=part.select("accuracy", "base_accuracy", "change"),
            error_y=whiskers(part["difference"], part["difference_low"], part["difference_high"], colour=colour),
            hovertemplate="beta %{x:g}: %{customdata[0]:.1%} right, %{customdata[1]:.1%} without contrast<br>loss among"
            f" the candidates %{{customdata[2]:+.3f}} nats<extra>{name}</extra>",
        )  # fmt: skip
    figure.add_hline(y=0.0, line={"color": palette(theme).muted, "dash": "dot", "width": 1.4})
    y = "change of the accuracy of the next token"
    layout(figure, title=title, x="strength of the contrast, beta", y=y, theme=theme, height=360)
    figure.update_yaxes(tickformat="+.1%")
    figure.update_xaxes(tickvals=frame["beta"].unique().sort().to_list())
    return figure


def rerouting(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """Change of the loss of what follows, fitted vectors beside both controls. frame: ``sweep_studies.rerouting``."""
    title = "Loss of what follows, with vectors on the router's logits"
    shown = frame.filter(pl.col("vectors") != "none")
    if shown.is_empty():
        return message("No rerouting was fitted.", title=title, theme=theme)
    figure = go.Figure()
    for name, colour in colours_of(list(VECTORS), theme).items():
        part = shown.filter(pl.col("vectors") == name)
        figure.add_scatter(
            x=part["change"], y=["all text" if domain == "all" else safe(domain, 24) for domain in part["domain"]],
            name=VECTORS[name], mode="markers", orientation="h", marker={"size": 9, "color": colour},
            error_x=whiskers(part["change"], part["change_low"], part["change_high"], colour=colour),
            customdata=part.select("loss", "tokens").to_numpy(),
            hovertemplate="%{y}<br>%{x:+.4f} nats per token, loss %{customdata[0]:.3f}, %{customdata[1]:,.0f} tokens"
            f"<extra>{VECTORS[name]}</extra>",
        )  # fmt: skip
    figure.add_vline(x=0.0, line={"color": palette(theme).muted, "dash": "dot", "width": 1.4})
    height = rows_height(shown["domain"].n_unique(), each=40)
    layout(figure, title=title, x="change against no vectors, nats per token", y="", theme=theme, height=height,
           scattermode="group", scattergap=0.6)  # fmt: skip
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return figure


def search(frame: pl.DataFrame, *, where: str = "all items", theme: Theme = "light") -> go.Figure:
    """Share of items solved by each number of experts, by any, and by samples. frame: ``sweep_studies.search``."""
    title = f"Items solved, {where}"
    shown = frame.filter(pl.col("branches") != "k less samples")
    if shown.is_empty():
        return message("No item was tried.", title=title, theme=theme)
    colours = palette(theme)
    wheel = [colours.muted if k is not None else colours.accent if name.startswith("any of these") else
             colours.categorical[1] for k, name in shown.select("k", "branches").iter_rows()]  # fmt: skip
    figure = go.Figure(
        go.Bar(
            x=shown["solved"], y=shown["branches"], orientation="h", marker={"color": wheel},
            error_x=whiskers(shown["solved"], shown["solved_low"], shown["solved_high"], colour=colours.text),
            hovertemplate="%{y}<br>%{x:.1%} of the items<extra></extra>",
        )
    )  # fmt: skip
    height = rows_height(len(shown), each=34)
    layout(figure, title=title, x="share of the items solved", y="", theme=theme, height=height, legend=False)
    figure.update_xaxes(tickformat=".0%", rangemode="tozero")
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return figure
