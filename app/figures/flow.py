"""Flow: maps of experts that meet in a token, in one layer or in two, and curves of what can be foreseen."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl
from numpy.typing import NDArray

from app.figures.heatmap import MAX_DETAIL_CELLS, percent_of_chance
from app.figures.layers import curve, over_layers
from app.figures.style import Theme, colorbar, layout, message, palette, pickable, safe, scale

MEASURES = {
    "attraction": "times what popularity gives",
    "co_activation": "% of the row's tokens",
    "lift": "times independence",
    "jaccard": "% of the tokens of either",
    "pointwise_information": "bits",
    "share": "% of the row's choices",
}
"""What the colours of a map mean, by its measure."""

_RATIOS = {"attraction": "what popularity gives", "lift": "what independence gives"}

PREDICTORS = {
    "transition": "earlier layer",
    "popularity": "popularity",
    "previous": "token before",
    "router": "early router",
    "residual": "early router, normed",
}
"""What foresees, short enough for a legend of two columns."""

CONTROLS = {
    "shuffled_in_sequence": "other token of text",
    "shuffled": "any other token",
}
_NOTHING = "Nothing was counted for this choice."


def pair_map(
    frame: pl.DataFrame,
    *,
    measure: str,
    title: str,
    layer: str,
    source: str | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """Experts by experts in the frame's order: of one layer, or of the earlier layer ``source`` by those of ``layer``.

    frame: ``app.frames.flow.pairs`` or ``transitions``. Ratios are drawn on a logarithmic scale around 1. A click picks
    the expert of the column.
    """
    if frame[measure].drop_nulls().is_empty():
        return message(_NOTHING, title=title, theme=theme, height=420)
    square = source is None
    x, y = ("expert", "expert") if source is None else tuple(f"expert of layer {safe(one)}" for one in (layer, source))
    cells = _cells(frame, measure)
    rows, columns = (_order(frame, *names) for names in (("place", "expert"), ("other_place", "other")))
    drawn, colours, hover = _coloured(cells, measure, theme)
    heat = go.Heatmap(z=drawn, x=columns, y=rows, hoverongaps=False, **colours)
    words = f"{y} %{{y}}, {x} %{{x}}<br>"
    if cells.size <= MAX_DETAIL_CELLS:
        given = "co_activation" if square else "share"
        beside = "attraction" if square else "lift"
        detail = [_cells(frame, name) for name in ("joint_tokens", given, beside)]
        words += "%{customdata[0]:,.0f} tokens use both, %{customdata[1]:.1%} of the row's"
        words += f"<br>%{{customdata[2]:.2f}} {MEASURES[beside]}"
        heat.update(customdata=np.stack(detail, axis=-1).astype(np.float32))
        if measure not in (given, beside):
            words += f"<br>{hover}"
    elif measure in _RATIOS:
        heat.update(customdata=percent_of_chance(cells))
        words += f"%{{customdata:,}} % of {_RATIOS[measure]}"
    else:
        words += hover
    heat.update(hovertemplate=words + "<extra></extra>")
    figure = layout(go.Figure(heat), title=title, x=x, y=y, theme=theme, height=460, legend=False)
    axis: dict[str, Any] = {"type": "category", "showgrid": False, "zeroline": False, "ticks": "", "nticks": 20}
    figure.update_xaxes(categoryorder="array", categoryarray=columns, **axis)
    figure.update_yaxes(categoryorder="array", categoryarray=rows, autorange="reversed", **axis)
    return pickable(figure, layer=f"={layer}", expert="x")


def excess_curve(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """Share of the pairs that popularity does not explain. frame: ``app.frames.flow.excess``."""
    title = "Pairs of experts beyond popularity"
    shown = frame.drop_nulls("excess")
    if shown.is_empty():
        return message("Computed when the run is finished.", title=title, theme=theme)
    colours = palette(theme)
    figure = go.Figure()
    curve(
        figure, shown, "excess", name="pairs as they are", colour=colours.accent,
        hover="layer %{x}<br>%{y:.1%} of the pairs",
    )  # fmt: skip
    noise = shown.select("label", pl.col("noise").alias("excess"), low="noise_low", high="noise_high")
    curve(
        figure, noise, "excess", name="popularity alone", colour=colours.muted, dash="dot", markers=False,
        hover="layer %{x}<br>%{y:.1%} by noise alone",
    )  # fmt: skip
    layout(figure, title=title, x="layer", y="share of pairs", theme=theme, height=460, wide=False)
    return over_layers(figure, percent=True)


def information_curve(frame: pl.DataFrame, *, theme: Theme = "light") -> go.Figure:
    """Bits that the layer before says about a layer's experts. frame: ``app.frames.flow.information``."""
    title = "What the experts of the layer before say"
    near = frame.filter(pl.col("distance") == 1)
    if near.is_empty():
        return message("Computed when the run is finished.", title=title, theme=theme)
    colours = palette(theme)
    figure = go.Figure()
    names = {"observed": "same token", **CONTROLS}
    for (control, name), colour in zip(names.items(), (colours.accent, *colours.categorical[2:4]), strict=True):
        part = near.filter(pl.col("control") == control)
        hover = f"layer %{{x}}<br>{name}: %{{y:.4f}} bits"
        dash = "solid" if control == "observed" else "dot"
        curve(
            figure, part, "bits", name=name, colour=colour, hover=hover, dash=dash, markers=control == "observed"
        )  # fmt: skip
    layout(figure, title=title, x="layer", y="bits", theme=theme, height=460, wide=False)
    return over_layers(figure)


def recall_curves(frame: pl.DataFrame, *, extra: int, theme: Theme = "light") -> go.Figure:
    """Share of each layer's choices that were foreseen one layer ahead, with bands, controls and chance.

    frame: ``app.frames.flow.predictability``, with rows of ``lookaheads`` below (predictor = input, no interval).
    """
    title = "Experts foreseen one layer ahead"
    near = frame.filter((pl.col("extra") == extra) & (pl.col("distance") <= 1) & (pl.col("label") != "all"))
    if near.is_empty():
        return message("Computed when the run is finished.", title=title, theme=theme)
    figure = go.Figure()
    for predictor, name in PREDICTORS.items():
        part = near.filter((pl.col("predictor") == predictor) & (pl.col("control") == "observed"))
        _recall(figure, part, name, predictor, theme)
    for control, name in CONTROLS.items():
        part = near.filter((pl.col("predictor") == "transition") & (pl.col("control") == control))
        _recall(figure, part, name, control, theme)
    chance = near.unique(["layer", "step"]).sort("layer", "step")
    curve(
        figure, chance.select("label", "chance"), "chance", name="random experts", colour=palette(theme).muted,
        dash="dash", width=1.3, markers=False, hover="layer %{x}<br>random experts %{y:.1%}",
    )  # fmt: skip
    layout(figure, title=title, x="layer", y="choices foreseen", theme=theme, height=460, wide=False)
    return over_layers(figure, percent=True, labels=chance["label"].to_list())


def width_curves(frame: pl.DataFrame, *, label: str, theme: Theme = "light") -> go.Figure:
    """Share of one layer's choices that are foreseen, by experts fetched; frame as ``recall_curves``."""
    title = "All layers, by experts fetched" if label == "all" else f"Layer {safe(label)}, by experts fetched"
    mine = frame.filter((pl.col("label") == label) & (pl.col("control") == "observed"))
    if mine.is_empty():
        return message("No layer before this one foresees it.", title=title, theme=theme)
    dashes = {0: "solid", 1: "solid", 2: "dash", 3: "dot"}
    figure = go.Figure()
    for predictor, name in PREDICTORS.items():
        of_one = mine.filter(pl.col("predictor") == predictor)
        for (distance,), part in of_one.sort("distance", "extra").group_by(["distance"], maintain_order=True):
            ahead = f", {distance} layers ahead" if int(distance) > 1 else ""
            figure.add_scatter(
                x=part["extra"], y=part["value"], mode="lines+markers", name=name, legendgroup=predictor,
                showlegend=int(distance) <= 1,
                line={"color": _colour(predictor, theme), "dash": dashes.get(int(distance), "dot"), "width": 2},
                marker={"size": 5},
                hovertemplate=f"{name}{ahead}<br>k + %{{x}} fetched: %{{y:.1%}}<extra></extra>",
            )  # fmt: skip
    chance = mine.unique("extra").sort("extra")
    line = {"color": palette(theme).muted, "width": 1.3, "dash": "dash"}
    hover = "random experts<br>k + %{x} fetched: %{y:.1%}<extra></extra>"
    figure.add_scatter(
        x=chance["extra"], y=chance["chance"], mode="lines", name="random experts", line=line, hovertemplate=hover
    )
    layout(
        figure,
        title=title,
        x="experts fetched beyond k",
        y="choices foreseen",
        theme=theme,
        height=460,
        wide=False,
    )
    figure.update_xaxes(dtick=1, showgrid=False, tickprefix="+")
    return figure.update_yaxes(tickformat=".0%", rangemode="tozero")


def _recall(figure: go.Figure, part: pl.DataFrame, name: str, key: str, theme: Theme) -> None:
    control = key in CONTROLS
    curve(
        figure, part, "value", name=name, colour=_colour(key, theme), hover=f"layer %{{x}}<br>{name}: %{{y:.1%}}",
        dash="dot" if control else "solid", markers=not control,
    )  # fmt: skip


def _colour(key: str, theme: Theme) -> str:
    colours = palette(theme)
    known = {"transition": colours.accent, "popularity": colours.categorical[1], "router": colours.categorical[2]}
    known |= {
        "residual": colours.categorical[3],
        "shuffled": colours.categorical[6],
        "previous": colours.categorical[4],
    }
    return known.get(key, colours.categorical[5])


def _coloured(
    cells: NDArray[np.float64], measure: str, theme: Theme
) -> tuple[NDArray[np.float32], dict[str, Any], str]:
    """What is drawn, its colours, and the words for hovering: shares from 0, ratios and bits around chance."""
    words = MEASURES[measure]
    if measure in ("co_activation", "jaccard", "share"):
        colours = {"colorscale": scale(palette(theme).sequential), "zmin": 0.0}
        bar = colorbar(words, ticksuffix=" %")
        return (100 * cells).astype(np.float32), {**colours, "colorbar": bar}, f"%{{z:.2f}} {words}"
    with np.errstate(divide="ignore"):
        bits = cells if measure == "pointwise_information" else np.log2(cells)
    usual = np.quantile(np.abs(bits[np.isfinite(bits)]), 0.98) if np.isfinite(bits).any() else 1.0
    bound = float(np.clip(np.ceil(usual), 1.0, 3.0))
    colours = {"colorscale": scale(palette(theme).diverging), "zmid": 0.0, "zmin": -bound, "zmax": bound}
    ticks: dict[str, Any] = {}
    if measure != "pointwise_information":
        values = list(range(int(-bound), int(bound) + 1))
        ticks = {"tickvals": values, "ticktext": [f"{2.0**value:.3g}" for value in values]}
    hover = f"%{{z:.2f}} {words}" if measure == "pointwise_information" else f"2^%{{z:.2f}} {words}"
    drawn = np.clip(bits, -bound, bound).astype(np.float32)
    return drawn, {**colours, "colorbar": colorbar(words, **ticks)}, hover


def _cells(frame: pl.DataFrame, value: str) -> NDArray[np.float64]:
    """(places, other places) of a column; NaN without a row."""
    shape = [int(frame[name].max()) + 1 for name in ("place", "other_place")]  # type: ignore[arg-type]
    cells = np.full(shape, np.nan)
    values = frame[value].cast(pl.Float64).fill_null(float("nan")).to_numpy()
    cells[frame["place"].to_numpy(), frame["other_place"].to_numpy()] = values
    return cells


def _order(frame: pl.DataFrame, place: str, name: str) -> list[str]:
    return [str(expert) for expert in frame.unique(place).sort(place)[name]]
