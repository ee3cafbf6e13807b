"""Figures of a plan: a map of what becomes of every expert, the neurons that stay, and presets beside each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl
from numpy.typing import NDArray

from app.figures.heatmap import MAX_DETAIL_CELLS, expert_map, matrix
from app.figures.style import Theme, colorbar, layout, message, palette, safe, scale

MARKED_CELLS = 2048
"""Up to so many cells each expert that goes carries a mark; beyond, marks would hide the map and its colours tell."""

_NAMES = {"kept": "kept", "dropped": "goes", "merged": "merged into another", "silenced": "silenced with its block"}
_SYMBOLS = {"dropped": "x-thin", "merged": "triangle-left", "silenced": "line-ew"}


def plan_map(frame: pl.DataFrame, *, title: str, theme: Theme = "light") -> go.Figure:
    """Layers by experts: blue stays, orange goes, purple is merged into another; darker = higher in its layer by score.

    frame: ``app.frames.compress.units``. Rings mark protected experts, diamonds those that take others in.
    """
    if frame.is_empty():
        return message("The plan names no expert.", title=title, theme=theme)
    ranked = frame.with_columns(_standing().alias("standing"))
    _, labels, width = matrix(ranked, "standing")
    figure = go.Figure()
    cells = len(labels) * width
    for name in _NAMES:
        part = ranked.filter(pl.col("fate") == name)
        if part.is_empty():
            continue
        values, _, _ = matrix(
            ranked.with_columns(pl.when(pl.col("fate") == name).then(pl.col("standing")).alias("standing")), "standing"
        )
        heat = go.Heatmap(
            z=values, y=labels, zmin=0.0, zmax=1.0, colorscale=scale(_scale(name, theme)), hoverongaps=False,
            showscale=name == "kept", colorbar=_colorbar(), name=_NAMES[name],
        )  # fmt: skip
        _hover(heat, part, labels, width, name)
        figure.add_trace(heat)
        figure.add_trace(_key(name, theme))
        if cells <= MARKED_CELLS and name in _SYMBOLS:
            _mark(figure, part, _SYMBOLS[name], size=7, colour=palette(theme).text, width=1.2)
    _rings(figure, ranked, theme)
    return _with_legend(expert_map(figure, title=title, labels=labels, width=width, theme=theme), theme)


def neuron_map(frame: pl.DataFrame, *, title: str, theme: Theme = "light") -> go.Figure:
    """Layers by experts: the share of its neurons that each expert keeps; experts that go are empty.

    frame: ``app.frames.compress.units``.
    """
    if frame["neurons_kept"].drop_nulls().is_empty():
        return message("No expert stays.", title=title, theme=theme)
    values, labels, width = matrix(frame, "neurons_kept")
    heat = go.Heatmap(
        z=values, y=labels, zmin=0.0, zmax=1.0, colorscale=scale(palette(theme).sequential), hoverongaps=False,
        colorbar=colorbar("neurons that stay", tickformat=".0%"),
        hovertemplate="layer %{y}, expert %{x}<br>keeps %{z:.1%} of its neurons<extra></extra>",
    )  # fmt: skip
    return expert_map(go.Figure(heat), title=title, labels=labels, width=width, theme=theme)


def preset_errors(frame: pl.DataFrame, *, title: str, chosen: str, theme: Theme = "light") -> go.Figure:
    """Predicted error of the layers by preset, the least first; the chosen preset stands out.

    frame: ``app.frames.compress_presets.comparison``.
    """
    shown = frame.filter(pl.col("weighed_error").is_not_null()).sort("weighed_error")
    if shown.is_empty():
        return message(
            "This run cannot predict the layers' error: it takes level activations.", title=title, theme=theme
        )
    colours = palette(theme)
    names = [
        safe(title) + (" (control)" if name == "random" else "")
        for name, title in shown.select("preset", "title").rows()
    ]
    extra = list(zip(shown["experts_after"], shown["saved"], shown["score"], strict=True))
    figure = go.Figure(
        go.Bar(
            x=shown["weighed_error"], y=names, orientation="h", customdata=extra,
            marker={"color": [colours.accent if name == chosen else colours.muted for name in shown["preset"]]},
            text=[f"{value:.3g}" for value in shown["weighed_error"]], textposition="outside", cliponaxis=False,
            hovertemplate="%{y}: predicted error %{x:.4g}<br>%{customdata[0]:,} experts stay, %{customdata[1]} saved"
            "<br>by %{customdata[2]}<extra></extra>",
        )
    )  # fmt: skip
    layout(
        figure, title=title, x="predicted relative squared error, layers weighed", y="", theme=theme,
        height=110 + 26 * len(shown), legend=False,
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", showgrid=False, type="category")
    figure.update_xaxes(rangemode="tozero")
    return figure


def _standing() -> pl.Expr:
    """0..1, 1 = the most important of its layer; 0.5 for all where the plan holds no scores."""
    last = pl.max_horizontal(pl.col("experts") - 1, 1)
    return pl.when(pl.col("place").is_null()).then(0.5).otherwise(1 - (pl.col("place") - 1) / last)


def _scale(fate: str, theme: Theme) -> list[str]:
    """Nearly the background = least important; blue stays, orange goes, purple is merged, grey is silenced."""
    colours = palette(theme)
    if fate == "kept":
        return list(colours.sequential)
    if fate == "dropped":
        return list(colours.diverging[3::-1])
    strong = {"merged": colours.categorical[3], "silenced": colours.muted}[fate]
    return [_mix(strong, colours.background, share) for share in (0.3, 0.55, 0.8, 1.0)]


def _mix(colour: str, other: str, share: float) -> str:
    parts = [
        round(share * int(colour[at : at + 2], 16) + (1 - share) * int(other[at : at + 2], 16)) for at in (1, 3, 5)
    ]
    return "#" + "".join(f"{part:02X}" for part in parts)


def _colorbar() -> dict[str, Any]:
    return colorbar("place in its layer by score", tickvals=[0, 1], ticktext=["last", "first"])


def _hover(heat: go.Heatmap, part: pl.DataFrame, labels: list[str], width: int, fate: str) -> None:
    """Words for the cells that the trace draws; a large map has to do without."""
    if len(labels) * width > MAX_DETAIL_CELLS:
        heat.update(hovertemplate=f"layer %{{y}}, expert %{{x}}: {_NAMES[fate]}<extra></extra>")
        return
    rows = {label: row for row, label in enumerate(labels)}
    words: NDArray[np.object_] = np.full((len(labels), width, 2), "", dtype=object)
    for label, expert, score, why in part.select("label", "expert", "score", "why").iter_rows():
        words[rows[label], expert] = "–" if score is None else f"{score:.4g}", safe(why, 160)
    heat.update(
        customdata=words,
        hovertemplate=f"layer %{{y}}, expert %{{x}}: {_NAMES[fate]}<br>score %{{customdata[0]}}"
        "<br>%{customdata[1]}<extra></extra>",
    )


def _key(fate: str, theme: Theme) -> go.Scatter:
    """An entry of the legend: heat maps have none of one colour."""
    return go.Scatter(
        x=[None], y=[None], mode="markers", name=_NAMES[fate], hoverinfo="skip",
        marker={"symbol": "square", "size": 11, "color": _scale(fate, theme)[-3]},
    )  # fmt: skip


def _mark(figure: go.Figure, part: pl.DataFrame, symbol: str, *, size: int, colour: str, width: float) -> None:
    figure.add_scatter(
        x=part["expert"], y=part["label"], mode="markers", hoverinfo="skip", showlegend=False,
        marker={"symbol": symbol, "size": size, "color": colour, "line": {"width": width, "color": colour}},
    )  # fmt: skip


def _rings(figure: go.Figure, frame: pl.DataFrame, theme: Theme) -> None:
    colours = palette(theme)
    looks = (
        ("protected", frame.filter("protected"), {"symbol": "circle-open", "size": 14, "color": colours.alarm}, 2.2),
        (
            "takes others in",
            frame.filter((pl.col("fate") == "kept") & (pl.col("members") > 1)),
            {"symbol": "diamond-open", "size": 9, "color": colours.text},
            1.4,
        ),
    )
    for name, part, marker, width in looks:
        if len(part) and (name == "protected" or frame.height <= MARKED_CELLS):
            figure.add_scatter(
                x=part["expert"], y=part["label"], mode="markers", name=name, hoverinfo="skip",
                marker={**marker, "line": {"width": width}},
            )  # fmt: skip


def _with_legend(figure: go.Figure, theme: Theme) -> go.Figure:
    figure.update_layout(showlegend=True, margin={"t": 78})
    return figure
