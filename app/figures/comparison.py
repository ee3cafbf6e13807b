"""Two runs compared: agreement over the layers with its baselines, margins of the tokens that flip, load moved."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

from app.figures.heatmap import MAX_DETAIL_CELLS, expert_map, matrix
from app.figures.interval import band
from app.figures.style import Theme, colorbar, layout, message, palette, pickable, rows_height, safe, scale

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
        band(figure, x=x, low=frame[f"{name}_low"], high=frame[f"{name}_high"], colour=colour)
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
    return pickable(figure, layer="x")


def load_curve(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """Share of the selections that moves to other experts, per layer, below what flips alone would allow.

    frame: ``app.frames.comparison.layers``.
    """
    colours = palette(theme)
    x = frame["label"].to_list()
    figure = go.Figure()
    band(figure, x=x, low=frame["total_variation_low"], high=frame["total_variation_high"], colour=colours.accent)
    for y, words, line in (
        (frame["total_variation"], "load moved", {"color": colours.accent, "width": 2}),
        (1 - frame["overlap"], "selections changed", {"color": colours.muted, "dash": "dot", "width": 1.5}),
    ):
        hover = f"layer %{{x}}<br>{words} %{{y:.3%}}<extra></extra>"
        figure.add_scatter(x=x, y=y, mode="lines+markers", name=words, hovertemplate=hover, line=line)
    layout(figure, title="Load that moves", x="layer", y="share of selections", theme=theme, height=380, wide=False)
    figure.update_xaxes(type="category", showgrid=False, nticks=24)
    figure.update_yaxes(tickformat=".1~%", rangemode="tozero")
    return pickable(figure, layer="x")


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


def load_pair_map(
    frame: pl.DataFrame, *, names: tuple[str, str], picks_experts: bool = True, theme: Theme = "light"
) -> go.Figure:
    """Load of every expert in both runs beside each other, on one scale of factors of the uniform share.

    frame: ``app.frames.comparison.load``. picks_experts: whether experts have the numbers of the first run.
    """
    figure = make_subplots(
        rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=[safe(name, 40) for name in names]
    )
    shares, labels, width = zip(*(matrix(frame, name) for name in ("share", "other_share")), strict=True)
    sizes = np.isfinite(shares[0]).sum(1, keepdims=True)
    with np.errstate(divide="ignore"):
        logs = [np.log2(one * sizes) for one in shares]
    largest = max((float(np.abs(one[np.isfinite(one)]).max(initial=0.0)) for one in logs), default=1.0)
    bound = float(np.clip(np.ceil(largest), 1.0, 3.0))
    hover = "layer %{y}, expert %{x}<br>2^%{z:.2f} × the uniform share<extra>%{fullData.name}</extra>"
    for column, cells in enumerate(logs, start=1):
        heat = go.Heatmap(
            z=np.clip(cells, -bound, bound).astype(np.float32), y=labels[0], coloraxis="coloraxis", hoverongaps=False,
            hovertemplate=hover, name=safe(names[column - 1]),
        )  # fmt: skip
        figure.add_trace(heat, row=1, col=column)
    ticks = _factors(int(bound))
    layout(
        figure, title="Load of each expert in both runs", x=f"expert (0 to {width[0] - 1})", y="layer", theme=theme,
        height=rows_height(len(labels[0])), legend=False, margin={"l": 8, "r": 12, "t": 66, "b": 8},
        coloraxis={
            "colorscale": scale(palette(theme).diverging), "cmid": 0.0, "cmin": -bound, "cmax": bound,
            "colorbar": colorbar("times the uniform share", **ticks),
        },
    )  # fmt: skip
    figure.update_yaxes(
        type="category", autorange="reversed", showgrid=False, categoryorder="array", categoryarray=labels[0],
        nticks=24, ticks="",
    )  # fmt: skip
    figure.update_yaxes(title_text="", row=1, col=2)
    figure.update_xaxes(showgrid=False, zeroline=False, ticks="", nticks=16)
    figure.update_annotations(font={"size": 12})
    return pickable(figure, layer="y", expert="x") if picks_experts else pickable(figure, layer="y")


def evenness_curves(frame: pl.DataFrame, *, names: tuple[str, str], theme: Theme = "light") -> go.Figure:
    """How evenly each run loads its experts, per layer: normalised entropy and MaxVio, one panel each.

    frame: ``app.frames.comparison.evenness``; the runs may have other layers and numbers of experts.
    """
    panels = {
        "normalised_entropy": "Normalised entropy (1 = even)",
        "max_violation": "MaxVio (0 = even)",
    }
    figure = make_subplots(rows=1, cols=2, subplot_titles=list(panels.values()), horizontal_spacing=0.08)
    colours = palette(theme).categorical
    for column, (measure, words) in enumerate(panels.items(), start=1):
        for side, (name, colour) in enumerate(zip(names, colours, strict=False)):
            part = frame.filter(side=side)
            figure.add_scatter(
                x=part["label"], y=part[measure], name=safe(name, 40), legendgroup=str(side), showlegend=column == 1,
                mode="lines+markers" if len(part) <= 48 else "lines", line={"color": colour, "width": 2},
                marker={"size": 5}, customdata=part.select("num_experts", "tokens").to_numpy(), row=1, col=column,
                hovertemplate=f"layer %{{x}}<br>{words.partition(' (')[0]} %{{y:.3f}}<br>%{{customdata[0]}} experts, "
                "%{customdata[1]:,.0f} tokens<extra>%{fullData.name}</extra>",
            )  # fmt: skip
    layout(figure, title="How even the load is in both runs", x="layer", y="", theme=theme, height=340)
    figure.update_layout(margin_t=94, legend_y=1.1)
    figure.update_annotations(font={"size": 12})
    order = list(dict.fromkeys(frame["label"]))
    figure.update_xaxes(type="category", showgrid=False, nticks=24, categoryorder="array", categoryarray=order)
    figure.update_yaxes(rangemode="tozero")
    return pickable(figure, layer="x")


def rank_curves(frame: pl.DataFrame, *, names: tuple[str, str], label: str, theme: Theme = "light") -> go.Figure:
    """Load of one layer's experts from the busiest down, in both runs: what can be compared where experts of the two
    have nothing to do with each other.

    frame: ``app.frames.comparison.ranks`` of the layer.
    """
    figure = go.Figure()
    for side, (name, colour) in enumerate(zip(names, palette(theme).categorical, strict=False)):
        part = frame.filter(side=side)
        hover = "%{x:.0%} of the experts take at least %{y:.2f} × the uniform share<br>expert %{customdata[0]}: "
        figure.add_scatter(
            x=part["part"], y=part["relative"], name=safe(name, 40), mode="lines+markers", marker={"size": 4},
            line={"color": colour, "width": 2, "shape": "hv"}, customdata=part.select("expert", "tokens").to_numpy(),
            hovertemplate=hover + "%{customdata[1]:,} tokens<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    figure.add_hline(y=1, line={"color": palette(theme).muted, "dash": "dot", "width": 1})
    title = f"Load by rank, layer {safe(label)}"
    layout(figure, title=title, x="experts, the busiest first", y="times the uniform share", theme=theme, height=340)
    figure.update_xaxes(tickformat=".0%", range=[0, 1.01], showgrid=False)
    figure.update_yaxes(rangemode="tozero")
    return figure


def load_difference_map(
    frame: pl.DataFrame, *, picks_experts: bool = True, theme: Theme = "light"
) -> go.Figure:  # fmt: skip
    """Load of every expert in the second run minus the first, in percentage points.

    frame: ``app.frames.comparison.load``. picks_experts: whether experts have the numbers of the first run.
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
    figure = expert_map(go.Figure(heat), title=title, labels=labels, width=width, theme=theme)
    return figure if picks_experts else pickable(figure, layer="y")


def _factors(bound: int) -> dict[str, list[str] | list[int]]:
    """Ticks of a log2 scale: 1/2 .. 2 up to 1/8 .. 8; the ends hold what lies beyond."""
    words = {-3: "⅛", -2: "¼", -1: "½", 0: "1", 1: "2", 2: "4", 3: "8"}
    values = list(range(-bound, bound + 1))
    texts = [words[value] for value in values]
    return {"tickvals": values, "ticktext": [f"≤ {texts[0]}", *texts[1:-1], f"≥ {texts[-1]}"]}


def _range(low: float, high: float | None) -> str:
    if high is None:
        return f"≥ {low:.2g}"
    return f"< {high:.2g}" if low == 0.0 else f"{low:.2g} – {high:.2g}"
