"""Figures of local routing consistency: SRP beside its controls and what was published, and repetition of experts."""

from __future__ import annotations

import plotly.graph_objects as go
import polars as pl

from app.figures.style import Theme, fade, layout, log_ticks, message, palette, safe, scale

CONTROL_WORDS = {
    "observed": "this run",
    "shuffled_in_sequence": "shuffled inside sequences",
    "shuffled": "shuffled over all: popularity alone",
    "uniform": "uniformly random experts",
}
DASHES = {"observed": "solid", "shuffled_in_sequence": "dash", "shuffled": "dot", "uniform": "dashdot"}
BESIDE_HEIGHT = 560
"""Height of figures that stand beside the bars of the published models, pixels."""


def srp_curve(frame: pl.DataFrame, published: pl.DataFrame | None = None, *, theme: Theme = "light") -> go.Figure:
    """The model's SRP against segment length with 95 % intervals, its controls and its lower bound.

    frame: rows of one domain (or of all text) of ``app.frames.consistency.srp_model``; published: rows of
    ``app.frames.consistency.published_srp``, drawn thin behind.
    """
    title = "Segment routing best performance (SRP) against segment length"
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
        name="lower bound (always keep)",
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
            error_y={
                "type": "data",
                "symmetric": False,
                "array": (part["high"] - part["value"]).fill_null(0.0),
                "arrayminus": (part["value"] - part["low"]).fill_null(0.0),
                "thickness": 1.5,
                "width": 5,
            },
            line={"color": colour, "dash": DASHES[control], "width": 2.6 if control == "observed" else 1.6},
            marker={"size": 7},
        )
    layout(figure, title=title, x="segment length (tokens, log scale)", y="SRP (0 to 1)", theme=theme, height=440)
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
        height=420,
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
        figure.add_scatter(
            x=part["label"],
            y=part["value"],
            name=f"{length:g} tokens",
            mode="lines+markers",
            customdata=part["router_size"],
            line={"color": colour, "width": 2},
            marker={"size": 5},
            hovertemplate=f"layer %{{x}}, {length:g} tokens<br>SRP %{{y:.1%}}<br>router size "
            f"%{{customdata:.2f}}<extra></extra>",
        )
    layout(figure, title=title, x="layer", y="SRP (0 to 1)", theme=theme, height=420, wide=False)
    figure.update_xaxes(type="category", showgrid=False, nticks=24)
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return figure


def srp_expert_scatter(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """SRP of every expert against how often it is used; the curve is what always keeping it would give.

    frame: rows of one segment length of ``app.frames.consistency.srp_experts``.
    """
    title = "SRP of every expert against how often it is used"
    shown = frame.filter(pl.col("frequency") > 0)
    if shown.is_empty():
        return message("SRP is computed when the run is finished.", title=title, theme=theme)
    colours = palette(theme)
    hover = (
        "layer %{customdata[0]}, expert %{customdata[1]}<br>used by %{x:.2%} of tokens<br>SRP %{y:.1%}<extra></extra>"
    )
    points = go.Scattergl if len(shown) > 2000 else go.Scatter
    layers = shown["layer"].to_numpy()
    figure = go.Figure(
        points(
            x=shown["frequency"],
            y=shown["value"],
            mode="markers",
            name="expert",
            showlegend=False,
            hovertemplate=hover,
            customdata=list(zip(shown["label"], shown["expert"], strict=True)),
            marker={
                "size": 6,
                "opacity": 0.75,
                "color": layers,
                "colorscale": scale(colours.sequential[2:]),
                "showscale": True,
                "cmin": int(layers.min()),
                "cmax": max(int(layers.max()), int(layers.min()) + 1),
                "colorbar": {"title": {"text": "layer", "side": "right"}, "thickness": 12, "outlinewidth": 0},
            },
        )
    )
    bound = shown.sort("frequency")
    figure.add_scatter(
        x=bound["frequency"],
        y=bound["lower_bound"],
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
        y="SRP (0 to 1)",
        theme=theme,
        height=BESIDE_HEIGHT,
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
            full = name if control == "observed" else f"{name}, {CONTROL_WORDS[control]}"
            figure.add_scatter(
                x=part["label"],
                y=part["value"],
                name=full,
                mode="lines+markers" if control == "observed" else "lines",
                line={
                    "color": colour if control == "observed" else fade(colour, 0.55),
                    "dash": DASHES[control],
                    "width": 2.2 if control == "observed" else 1.3,
                },
                marker={"size": 5},
                hovertemplate=f"layer %{{x}}<br>{full}: %{{y:.1%}}<extra></extra>",
            )
    layout(figure, title=title, x="layer", y="share (0 to 1)", theme=theme, height=400)
    figure.update_xaxes(type="category", showgrid=False, nticks=24)
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return figure
