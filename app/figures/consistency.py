"""Figures of local routing consistency: SRP and cache hit rates, beside their controls and what was published."""

from __future__ import annotations

import plotly.graph_objects as go
import polars as pl

from app.figures.style import Theme, colours_of, fade, layout, message, palette, safe, scale

CONTROL_WORDS = {
    "observed": "this run",
    "shuffled_in_sequence": "shuffled inside sequences",
    "shuffled": "shuffled over all: popularity alone",
    "uniform": "uniformly random experts",
}
_DASHES = {"observed": "solid", "shuffled_in_sequence": "dash", "shuffled": "dot", "uniform": "dashdot"}
BESIDE_HEIGHT = 560
"""Height of figures that stand beside the bars of the published models, pixels."""
POLICY_WORDS = {"sch": "SCH", "lru": "LRU", "lfu": "LFU", "belady": "Belady"}


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
    figure.add_scatter(x=observed["segment_length"], y=observed["lower_bound"], mode="lines", name="lower bound (always keep)",
                       line={"color": colours.alarm, "width": 1.4, "dash": "dot"},
                       hovertemplate="%{x} tokens<br>lower bound %{y:.1%}<extra></extra>")  # fmt: skip
    for control, colour in zip(CONTROL_WORDS, (colours.accent, *colours.categorical[1:4]), strict=True):
        part = frame.filter(pl.col("control") == control).sort("segment_length")
        if part.is_empty():
            continue
        hover = f"{CONTROL_WORDS[control]}, %{{x}} tokens<br>SRP %{{y:.2%}} (%{{customdata[0]:.2%}} to %{{customdata[1]:.2%}})"
        hover += "<br>router size %{customdata[2]:.2f}, threshold %{customdata[3]:.0f}<br>%{customdata[4]:,.0f} sequences<extra></extra>"
        figure.add_scatter(
            x=part["segment_length"], y=part["value"], name=CONTROL_WORDS[control], mode="lines+markers", hovertemplate=hover,
            customdata=part.select("low", "high", "router_size", "threshold", "sequences").to_numpy(),
            error_y={"type": "data", "symmetric": False, "array": (part["high"] - part["value"]).fill_null(0.0),
                     "arrayminus": (part["value"] - part["low"]).fill_null(0.0), "thickness": 1.5, "width": 5},
            line={"color": colour, "dash": _DASHES[control], "width": 2.6 if control == "observed" else 1.6}, marker={"size": 7},
        )  # fmt: skip
    layout(figure, title=title, x="segment length (tokens, log scale)", y="SRP (0 to 1)", theme=theme, height=440)
    _segment_axis(figure, observed)
    figure.update_yaxes(tickformat=".0%", range=[0, 1])
    return figure


def router_size_curve(frame: pl.DataFrame, published: pl.DataFrame | None = None, *, theme: Theme = "light") -> go.Figure:
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
        figure.add_scatter(x=part["segment_length"], y=part["router_size"], name=CONTROL_WORDS[control], mode="lines+markers",
                           line={"color": colour, "dash": _DASHES[control], "width": 2.6 if control == "observed" else 1.6},
                           hovertemplate=f"{CONTROL_WORDS[control]}, %{{x}} tokens<br>%{{y:.2f}} × the original selection<extra></extra>")  # fmt: skip
    figure.add_hline(y=1, line={"color": colours.muted, "width": 1, "dash": "dot"})
    layout(figure, title=title, x="segment length (tokens, log scale)", y="router size (times the original)", theme=theme, height=420)
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
    for length, colour in zip(lengths, _shades(len(lengths), theme), strict=True):
        part = frame.filter(pl.col("segment_length") == length)
        figure.add_scatter(x=part["label"], y=part["value"], name=f"{length:g} tokens", mode="lines+markers", customdata=part["router_size"],
                           line={"color": colour, "width": 2}, marker={"size": 5},
                           hovertemplate=f"layer %{{x}}, {length:g} tokens<br>SRP %{{y:.1%}}<br>router size %{{customdata:.2f}}<extra></extra>")  # fmt: skip
    layout(figure, title=title, x="layer", y="SRP (0 to 1)", theme=theme, height=420)
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
    hover = "layer %{customdata[0]}, expert %{customdata[1]}<br>used by %{x:.2%} of tokens<br>SRP %{y:.1%}<extra></extra>"
    points = go.Scattergl if len(shown) > 2000 else go.Scatter
    layers = shown["layer"].to_numpy()
    figure = go.Figure(
        points(x=shown["frequency"], y=shown["value"], mode="markers", name="expert", showlegend=False, hovertemplate=hover,
               customdata=list(zip(shown["label"], shown["expert"], strict=True)),
               marker={"size": 6, "opacity": 0.75, "color": layers, "colorscale": scale(colours.sequential[2:]), "showscale": True,
                       "cmin": int(layers.min()), "cmax": max(int(layers.max()), int(layers.min()) + 1),
                       "colorbar": {"title": {"text": "layer", "side": "right"}, "thickness": 12, "outlinewidth": 0}})
    )  # fmt: skip
    bound = shown.sort("frequency")
    figure.add_scatter(x=bound["frequency"], y=bound["lower_bound"], mode="lines", name="lower bound 2r / (1 + r)",
                       line={"color": colours.alarm, "width": 1.5, "dash": "dot"}, hoverinfo="skip")  # fmt: skip
    uniform = shown["uniform"][0]
    figure.add_vline(x=uniform, line={"color": colours.muted, "width": 1, "dash": "dash"},
                     annotation={"text": "balanced", "font": {"color": colours.muted, "size": 11}, "yanchor": "bottom"})  # fmt: skip
    layout(figure, title=title, x="tokens that use the expert (share, log scale)", y="SRP (0 to 1)", theme=theme, height=BESIDE_HEIGHT)
    low, high = float(shown["frequency"].min()), float(shown["frequency"].max())  # type: ignore[arg-type]
    ticks = [step * 10.0**power for power in range(-6, 1) for step in (1, 2, 5) if low * 0.7 <= step * 10.0**power <= high * 1.4]
    figure.update_xaxes(type="log", showgrid=False, tickvals=ticks, ticktext=[f"{100 * tick:g} %" for tick in ticks])
    figure.update_yaxes(tickformat=".0%", range=[0, 1.02])
    return figure


def hit_rate_curves(frame: pl.DataFrame, *, segment_length: int | None, scope_words: str, theme: Theme = "light") -> go.Figure:
    """Hit rate against cache size rho: SCH at one segment length, LRU, LFU and Belady, with the controls of LRU dashed.

    frame: rows of one scope of ``app.frames.consistency.hit_rates``.
    """
    title = f"Cache hit rate against cache size, {scope_words}"
    if frame.is_empty():
        return message("Hit rates are computed when the run is finished.", title=title, theme=theme)
    figure = go.Figure()
    for policy, colour in colours_of(list(POLICY_WORDS), theme).items():
        part = frame.filter((pl.col("policy") == policy) & (pl.col("control") == "observed"))
        if policy == "sch":
            part = part.filter(pl.col("segment_length") == segment_length)
        if part.is_empty():
            continue
        name = POLICY_WORDS[policy] + (f" ({segment_length} tokens ahead)" if policy == "sch" else "")
        _interval_band(figure, part, colour)
        hover = f"{name}<br>%{{customdata:,}} slots, ρ = %{{x:.2f}}<br>hit rate %{{y:.1%}}<extra></extra>"
        figure.add_scatter(x=part["ratio"], y=part["value"], customdata=part["slots"], name=name, mode="lines", hovertemplate=hover,
                           line={"color": colour, "width": 2.2})  # fmt: skip
    for control in ("shuffled_in_sequence", "shuffled", "uniform"):
        part = frame.filter((pl.col("policy") == "lru") & (pl.col("control") == control))
        if len(part):
            name = f"LRU, {CONTROL_WORDS[control]}"
            figure.add_scatter(x=part["ratio"], y=part["value"], name=name, mode="lines",
                               line={"color": palette(theme).muted, "dash": _DASHES[control], "width": 1.3},
                               hovertemplate=f"{name}<br>ρ = %{{x:.2f}}<br>hit rate %{{y:.1%}}<extra></extra>")  # fmt: skip
    layout(figure, title=title, x="cache size ρ (slots over experts used per token)", y="hit rate (0 to 1)", theme=theme, height=460)
    figure.add_vline(x=1, line={"color": palette(theme).muted, "width": 1, "dash": "dot"})
    figure.update_yaxes(tickformat=".0%", range=[0, 1.02])
    figure.update_xaxes(range=[0, min(float(frame["ratio"].max()), 8.0)])  # type: ignore[arg-type]
    return figure


def hit_rate_layers(frame: pl.DataFrame, *, policy: str, theme: Theme = "light") -> go.Figure:
    """Hit rate of every layer's own cache at rho 1, 2 and 3. frame: observed rows of one policy, scope = layer label."""
    title = f"Hit rate of every layer's own cache, {POLICY_WORDS.get(policy, policy)}"
    if frame.is_empty():
        return message("Hit rates are computed when the run is finished.", title=title, theme=theme)
    figure = go.Figure()
    for ratio, colour in zip((1.0, 2.0, 3.0), _shades(3, theme), strict=True):
        part = frame.filter((pl.col("ratio") - ratio).abs() < 1e-6)
        if len(part):
            figure.add_scatter(x=part["scope"], y=part["value"], name=f"ρ = {ratio:g}", mode="lines+markers", customdata=part["slots"],
                               line={"color": colour, "width": 2}, marker={"size": 5},
                               hovertemplate=f"layer %{{x}}, ρ = {ratio:g} (%{{customdata}} slots)<br>hit rate %{{y:.1%}}<extra></extra>")  # fmt: skip
    layout(figure, title=title, x="layer", y="hit rate (0 to 1)", theme=theme, height=BESIDE_HEIGHT)
    figure.update_xaxes(type="category", showgrid=False, nticks=24)
    figure.update_yaxes(tickformat=".0%", range=[0, 1.02])
    return figure


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
    figure = go.Figure(
        go.Bar(
            x=shown["value"], y=bold, orientation="h", hovertemplate="%{y}<br>%{x:.1%}<extra></extra>",
            marker={"color": [colours.accent if ours else fade(colours.muted, 0.45) for ours in shown["ours"]]},
            error_x={"type": "data", "symmetric": False, "array": (shown["high"] - shown["value"]).to_list(),
                     "arrayminus": (shown["value"] - shown["low"]).to_list(), "thickness": 1.5, "width": 4, "color": colours.text},
        )
    )  # fmt: skip
    layout(figure, title=title, x=x, y="", theme=theme, height=max(BESIDE_HEIGHT, 90 + 21 * len(shown)), legend=False, bargap=0.28)
    figure.update_xaxes(tickformat=".0%", range=[0, 1])
    figure.update_yaxes(type="category", showgrid=False, tickfont={"size": 11})
    return figure


def _published_lines(figure: go.Figure, published: pl.DataFrame | None, theme: Theme, column: str = "value") -> None:
    """The published models as thin lines of one legend entry."""
    if published is None:
        return
    form = ".1%" if column == "value" else ".2f"
    for index, ((model,), part) in enumerate(published.group_by(["model"], maintain_order=True)):
        figure.add_scatter(x=part["segment_length"], y=part[column], mode="lines", name="20 published models", legendgroup="published",
                           showlegend=index == 0, line={"color": fade(palette(theme).muted, 0.35), "width": 1},
                           hovertemplate=f"{safe(model)}, %{{x}} tokens<br>%{{y:{form}}}<extra>published</extra>")  # fmt: skip


def _interval_band(figure: go.Figure, part: pl.DataFrame, colour: str) -> None:
    if part["low"].null_count() == len(part):
        return
    for column, fill in (("high", None), ("low", "tonexty")):
        figure.add_scatter(x=part["ratio"], y=part[column], mode="lines", line={"width": 0}, fill=fill, fillcolor=fade(colour, 0.15),
                           showlegend=False, hoverinfo="skip")  # fmt: skip


def _segment_axis(figure: go.Figure, frame: pl.DataFrame) -> None:
    lengths = sorted(frame["segment_length"].unique().to_list())
    figure.update_xaxes(type="log", tickvals=lengths, ticktext=[f"{length:g}" for length in lengths], showgrid=False)


def _shades(count: int, theme: Theme) -> list[str]:
    """So many shades of the sequential scale, from light to strong, all readable on the background."""
    usable = palette(theme).sequential[3:]
    return [usable[round(index * (len(usable) - 1) / max(count - 1, 1))] for index in range(count)]


def repetition_curves(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """How often neighbouring tokens repeat experts, per layer, with controls. frame: ``app.frames.consistency.repetition``."""
    title = "Repetition of experts from one token to the next"
    if frame.is_empty():
        return message("Repetition is computed when the run is finished.", title=title, theme=theme)
    colours = palette(theme)
    words = {"repeat_overlap": "shares an expert", "repeat_first_choice": "same first choice"}
    figure = go.Figure()
    for (metric, name), colour in zip(words.items(), colours.categorical, strict=False):
        for control in ("observed", "shuffled_in_sequence", "shuffled", "uniform"):
            part = frame.filter((pl.col("metric") == metric) & (pl.col("control") == control))
            if part.is_empty():
                continue
            full = name if control == "observed" else f"{name}, {CONTROL_WORDS[control]}"
            figure.add_scatter(x=part["label"], y=part["value"], name=full, mode="lines+markers" if control == "observed" else "lines",
                               line={"color": colour if control == "observed" else fade(colour, 0.55), "dash": _DASHES[control],
                                     "width": 2.2 if control == "observed" else 1.3}, marker={"size": 5},
                               hovertemplate=f"layer %{{x}}<br>{full}: %{{y:.1%}} of neighbours<extra></extra>")  # fmt: skip
    layout(figure, title=title, x="layer", y="pairs of neighbours (share)", theme=theme, height=400)
    figure.update_xaxes(type="category", showgrid=False, nticks=24)
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return figure
