"""What architectures are looked at for: f against P, shared experts, chained steps, memory, neighbours, router rows."""

from __future__ import annotations

import plotly.graph_objects as go
import polars as pl

from app.figures.experts import expert_points
from app.figures.layers import curve, over_layers
from app.figures.style import Theme, colours_of, layout, message, palette, safe

_NOT_YET = "Computed when the run is finished."


def load_against_probability(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """Load of every expert against its mean router probability, both over their means. frame: ``frames.imbalance``."""
    title = "Load against router probability"
    if frame.is_empty():
        return message("The router's probabilities were not seen.", title=title, theme=theme)
    hover = "P %{x:.2f} times the mean<br>f %{y:.2f} times the mean"
    figure = expert_points(frame, x="probability", y="load", hover=hover, theme=theme)
    reach = [0.0, 1.04 * max(float(frame["probability"].max()), float(frame["load"].max()))]  # type: ignore[arg-type]
    figure.add_scatter(
        x=reach, y=reach, mode="lines", showlegend=False, hoverinfo="skip",
        line={"color": palette(theme).muted, "dash": "dot", "width": 1.5},
    )  # fmt: skip
    layout(
        figure, title=title, x="P, times the mean", y="f, times the mean", theme=theme, height=420, legend=False,
        wide=False,
    )  # fmt: skip
    figure.update_xaxes(rangemode="tozero")
    return figure.update_yaxes(rangemode="tozero")


def spread_curves(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """How uneven load and probability are, over the layers. frame: ``app.frames.imbalance.spreads``."""
    title = "How uneven load and probability are"
    if frame.is_empty():
        return message("The router's probabilities were not seen.", title=title, theme=theme)
    colours = palette(theme)
    figure = go.Figure()
    hover = "layer %{x}<br>CV of f %{y:.3f}<br>loss %{customdata[0]:.3f}, sees %{customdata[1]:.0%} of the imbalance"
    extra = frame.select("loss", "seen").to_numpy()
    curve(figure, frame, "load_cv", name="load f", colour=colours.accent, hover=hover, customdata=extra)
    curve(
        figure, frame, "probability_cv", name="probability P", colour=colours.categorical[1],
        hover="layer %{x}<br>CV of P %{y:.3f}",
    )  # fmt: skip
    curve(
        figure, frame, "noise_cv", name="load by chance", colour=colours.muted, dash="dot", width=1.5, markers=False,
        hover="layer %{x}<br>by chance %{y:.3f}",
    )  # fmt: skip
    hidden = frame.filter(pl.col("unseen_imbalance"))
    if len(hidden):
        figure.add_scatter(
            x=hidden["label"].to_list(), y=hidden["load_cv"], mode="markers", name="loss satisfied but unbalanced",
            marker={"color": colours.alarm, "size": 11, "symbol": "circle-open", "line": {"width": 2}},
            hovertemplate="layer %{x}<br>unbalanced, and the loss hardly sees it<extra></extra>",
        )  # fmt: skip
    layout(figure, title=title, x="layer", y="coefficient of variation", theme=theme, height=420, wide=False)
    return over_layers(figure, labels=frame["label"].to_list())


def shared_curves(frame: pl.DataFrame, *, where: str, theme: Theme = "light") -> go.Figure:
    """Norms of what shared and routed experts add, over the layers. frame: ``frames.shared_output`` of one text."""
    title = f"Shared and routed output, {where}"
    if frame.is_empty():
        return message("No output of a shared expert was recorded.", title=title, theme=theme)
    colours = palette(theme)
    figure = go.Figure()
    extra = frame["ratio"].to_numpy()
    for column, name, colour in (
        ("shared", "shared experts", colours.accent), ("routed", "routed experts", colours.categorical[1]),
    ):  # fmt: skip
        hover = f"layer %{{x}}<br>{name} %{{y:.4g}}<br>shared over routed %{{customdata:.2f}}"
        curve(figure, frame, column, name=name, colour=colour, hover=hover, customdata=extra)
    layout(figure, title=title, x="layer", y="norm of the output", theme=theme, height=400, wide=False)
    return over_layers(figure)


def ratio_curves(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """Shared over routed output by domain, over the layers. frame: ``app.frames.shared_output.norms`` of all text."""
    title = "Shared over routed, by domain"
    parts = frame.drop_nulls("domain")
    if parts["domain"].n_unique() < 2:
        parts = frame.with_columns(pl.lit("all text").alias("domain")).unique("label", maintain_order=True)
    if parts.is_empty():
        return message("No output of a shared expert was recorded.", title=title, theme=theme)
    figure = go.Figure()
    for domain, colour in colours_of(parts["domain"].unique(maintain_order=True).to_list()[:10], theme).items():
        name = safe(domain, 24)
        part = parts.filter(pl.col("domain") == domain)
        curve(
            figure, part, "ratio", name=name, colour=colour, hover=f"{name}, layer %{{x}}<br>%{{y:.2f}} times",
        )  # fmt: skip
    layout(figure, title=title, x="layer", y="shared over routed", theme=theme, height=400, wide=False)
    return over_layers(figure)


def repeat_curves(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """How often a step runs the experts of the step before again. frame: ``app.frames.steps.repeats``."""
    title = "The same expert again in the next step"
    if frame.is_empty():
        return message(_NOT_YET, title=title, theme=theme)
    colours = palette(theme)
    figure = go.Figure()
    curve(
        figure,
        frame,
        "repeat",
        name="as they are",
        colour=colours.accent,
        hover="layer %{x}<br>%{y:.1%} of the choices",
    )
    curve(
        figure, frame, "popularity", name="popularity alone", colour=colours.muted, dash="dot", width=1.5,
        markers=False, hover="layer %{x}<br>%{y:.1%} by popularity",
    )  # fmt: skip
    layout(figure, title=title, x="layer.step", y="share of the choices", theme=theme, height=400, wide=False)
    return over_layers(figure, percent=True)


def step_entropy_curves(frame: pl.DataFrame, *, of: str, theme: Theme = "light") -> go.Figure:
    """Entropy of each step over the layers, one curve per step. frame: ``app.frames.steps.entropies``."""
    title = f"Entropy per step, of the {of}"
    if frame.is_empty():
        return message("The router's logits were not seen.", title=title, theme=theme)
    figure = go.Figure()
    steps = [str(step) for step in frame["step"].unique().sort().to_list()]
    for step, colour in colours_of(steps, theme).items():
        part = frame.filter(pl.col("step") == int(step)).with_columns(pl.col("layer").cast(pl.String).alias("label"))
        hover = f"layer %{{x}}, step {step}<br>%{{y:.1%}} of the largest entropy"
        curve(figure, part, "entropy", name=f"step {step}", colour=colour, hover=hover)
    layers = [str(layer) for layer in frame["layer"].unique().sort().to_list()]
    layout(figure, title=title, x="layer", y="entropy over ln E", theme=theme, height=400, wide=False)
    return over_layers(figure, percent=True, labels=layers)


def entropy_curves(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """What is open of a layer's choice when earlier ones are known. frame: ``app.frames.layer_memory.entropies``."""
    title = "What is open of a layer's choice"
    if frame.is_empty():
        return message(_NOT_YET, title=title, theme=theme)
    colours = palette(theme)
    names = {
        ("nothing", "observed"): ("nothing known", colours.muted, "solid"),
        ("layer before", "observed"): ("layer before known", colours.accent, "solid"),
        ("two layers back", "observed"): ("layer before that known", colours.categorical[1], "solid"),
        ("layer before", "shuffled"): ("another token's known", colours.categorical[3], "dot"),
    }
    figure = go.Figure()
    for (known, control), (name, colour, dash) in names.items():
        part = frame.filter((pl.col("known") == known) & (pl.col("control") == control))
        hover = f"layer %{{x}}<br>{name}: %{{y:.3f}} bits"
        curve(figure, part, "bits", name=name, colour=colour, dash=dash, hover=hover, markers=dash == "solid")
    layout(figure, title=title, x="layer", y="bits", theme=theme, height=420, wide=False)
    figure = over_layers(figure, labels=frame["label"].unique(maintain_order=True).to_list())
    return figure.update_yaxes(rangemode="normal")


def memory_curves(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """What a second layer back adds. frame: ``app.frames.layer_memory.memory``."""
    title = "What a second layer back adds"
    if frame.is_empty():
        return message("It takes three MoE layers.", title=title, theme=theme)
    colours = palette(theme)
    figure = go.Figure()
    curve(figure, frame, "bits", name="as it is", colour=colours.accent, hover="layer %{x}<br>%{y:.3f} bits")
    curve(
        figure, frame, "chance", name="shuffled choices", colour=colours.muted, dash="dot", width=1.5, markers=False,
        hover="layer %{x}<br>%{y:.3f} bits of nothing",
    )  # fmt: skip
    layout(figure, title=title, x="layer", y="bits", theme=theme, height=420, wide=False)
    return over_layers(figure)


def affinity_curves(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """What a layer's router finds on the layer before's input. frame: ``app.frames.neighbours.recalls``."""
    title = "A layer's router on the input of the layer before"
    if frame.is_empty():
        return message("No router was run early.", title=title, theme=theme)
    colours = palette(theme)
    figure = go.Figure()
    curve(
        figure, frame.drop("low", "high"), "recall", name="router on the earlier input", colour=colours.accent,
        hover="layer %{x}<br>%{y:.1%} of its choices",
    )  # fmt: skip
    if frame["popularity"].drop_nulls().len():
        curve(
            figure, frame, "popularity", name="most popular experts", colour=colours.categorical[1],
            hover="layer %{x}<br>popularity %{y:.1%}",
        )  # fmt: skip
    curve(
        figure, frame.select("label", "chance"), "chance", name="random experts", colour=colours.muted, dash="dash",
        width=1.3, markers=False, hover="layer %{x}<br>random experts %{y:.1%}",
    )  # fmt: skip
    layout(figure, title=title, x="layer", y="choices found", theme=theme, height=420, wide=False)
    return over_layers(figure, percent=True)


def similarity_curves(frame: pl.DataFrame, *, names: dict[str, str], theme: Theme = "light") -> go.Figure:
    """Nearest experts by mean output. frame: ``app.frames.neighbours.similarity``; names: of its controls."""
    title = "Nearest expert by mean output"
    if frame.is_empty():
        return message(_NOT_YET, title=title, theme=theme)
    colours = palette(theme)
    figure = go.Figure()
    looks = {"observed": (colours.accent, "solid"), "within": (colours.categorical[1], "solid"),
             "shuffled": (colours.muted, "dot")}  # fmt: skip
    for control, (colour, dash) in looks.items():
        part = frame.filter(pl.col("control") == control)
        hover = f"layer %{{x}}<br>{names[control]}: cosine %{{y:.3f}}"
        curve(
            figure, part, "cosine", name=names[control], colour=colour, dash=dash, hover=hover, markers=dash == "solid"
        )  # fmt: skip
    layout(figure, title=title, x="layer", y="cosine", theme=theme, height=420, wide=False)
    return over_layers(figure)


def row_histogram(frame: pl.DataFrame, *, label: str, theme: Theme = "light") -> go.Figure:
    """Cosines of a router's rows beside those of random rows. frame: ``app.frames.router_rows.cosines``."""
    title = f"Cosines of router rows, layer {safe(label)}"
    if frame.is_empty():
        return message("The rows of this layer's router were not recorded.", title=title, theme=theme)
    colours = palette(theme)
    middle = (frame["lower"] + frame["upper"]) / 2.0
    figure = go.Figure(
        go.Bar(
            x=middle, y=frame["pairs"], width=frame["upper"] - frame["lower"], name="pairs of rows",
            marker={"color": colours.accent, "line": {"width": 0}},
            customdata=frame.select("lower", "upper", "by_chance").to_numpy(),
            hovertemplate="%{customdata[0]:.3f} to %{customdata[1]:.3f}<br>%{y:,} pairs"
            "<br>%{customdata[2]:,.1f} by chance<extra></extra>",
        )
    )  # fmt: skip
    figure.add_scatter(
        x=middle, y=frame["by_chance"], mode="lines", name="random rows", hoverinfo="skip",
        line={"color": colours.categorical[1], "width": 2, "shape": "spline"},
    )  # fmt: skip
    layout(figure, title=title, x="cosine", y="pairs of rows", theme=theme, height=400, wide=False, bargap=0)
    return figure.update_xaxes(zeroline=False)


def row_curves(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """How far router rows are from random ones, over the layers. frame: ``app.frames.router_rows.spreads``."""
    title = "Router rows against random ones"
    if frame.is_empty():
        return message("No router's rows were recorded.", title=title, theme=theme)
    colours = palette(theme)
    figure = go.Figure()
    extra = frame.select("mean", "largest", "chance_largest", "near_copies").to_numpy()
    hover = "layer %{x}<br>spread of the cosines %{y:.2f} times chance<br>mean cosine %{customdata[0]:+.3f}"
    hover += "<br>largest %{customdata[1]:.3f} (%{customdata[2]:.3f} by chance)<br>%{customdata[3]:,} near copies"
    curve(figure, frame, "spread", name="spread of cosines", colour=colours.accent, hover=hover, customdata=extra)
    norms = frame.with_columns((pl.col("norm_cv") / pl.col("chance_norm_cv")).alias("norms"))
    curve(
        figure, norms, "norms", name="spread of norms", colour=colours.categorical[1], customdata=norms["norm_cv"],
        hover="layer %{x}<br>spread of the norms %{y:.2f} times chance (CV %{customdata:.3f})",
    )  # fmt: skip
    one = frame.select("label", pl.lit(1.0).alias("one"))
    curve(
        figure, one, "one", name="random rows", colour=colours.muted, dash="dot", width=1.5, markers=False,
        hover="random rows: 1",
    )  # fmt: skip
    layout(figure, title=title, x="layer", y="times chance", theme=theme, height=400, wide=False)
    return over_layers(figure)
