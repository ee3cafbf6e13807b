"""The look of every figure: palettes for light and dark, the layout they share, and safe text."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import plotly.graph_objects as go

Theme = Literal["light", "dark"]
FONT = "system-ui, 'Segoe UI', 'Liberation Sans', Arial, sans-serif"


@dataclass(frozen=True)
class Palette:
    """Colours of one theme. Sequential scales run from "little" (near the background) to "much"."""

    background: str
    text: str
    muted: str
    grid: str
    accent: str
    alarm: str
    sequential: tuple[str, ...]
    diverging: tuple[str, ...]
    categorical: tuple[str, ...]


_PALETTES: dict[str, Palette] = {
    "light": Palette(
        background="#FFFFFF",
        text="#17212B",
        muted="#6B7A89",
        grid="#E6EBF0",
        accent="#1F6FB2",
        alarm="#D1495B",
        sequential=("#F4F7FA", "#DCE9F3", "#B7D5E8", "#86BBDA", "#529BC8", "#2A7AB3", "#125B95", "#083F70", "#04284D"),
        diverging=("#9C3D10", "#C8642B", "#E39A6B", "#F3CFB6", "#F6F7F8", "#BBD8EA", "#76AFD3", "#357FB2", "#0F5486"),
        categorical=(
            "#1F6FB2",
            "#DD7A1B",
            "#1E8F6D",
            "#8457C2",
            "#C94057",
            "#2A9DB8",
            "#8E6B3A",
            "#C75BA1",
            "#6F7F8F",
            "#8A9A22",
        ),
    ),
    "dark": Palette(
        background="#10171F",
        text="#E4EAF0",
        muted="#93A1AF",
        grid="#263341",
        accent="#58A6DC",
        alarm="#F2777E",
        sequential=("#15202B", "#17324A", "#19476B", "#1B5F8F", "#2A7CB2", "#4C9BCD", "#7DBBE0", "#B3DAEF", "#EAF6FD"),
        diverging=("#F5A86B", "#D9803C", "#A95A24", "#63381D", "#1A222B", "#1C4563", "#276E9E", "#4A9BD0", "#8CC8EE"),
        categorical=(
            "#58A6DC",
            "#F0A04B",
            "#45BF97",
            "#AF8BE6",
            "#F2777E",
            "#56C5DC",
            "#C49E66",
            "#E08CC3",
            "#9AA9B8",
            "#BECB55",
        ),
    ),
}


def palette(theme: Theme = "light") -> Palette:
    """The colours of a theme; an unknown theme reads as light."""
    return _PALETTES.get(theme, _PALETTES["light"])


def scale(colours: Sequence[str]) -> list[tuple[float, str]]:
    """Colours at even distances, as Plotly wants a colour scale."""
    return [(index / (len(colours) - 1), colour) for index, colour in enumerate(colours)]


def fade(colour: str, alpha: float) -> str:
    """``#rrggbb`` as rgba with the given opacity."""
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {alpha:g})"


def safe(text: object, limit: int = 60) -> str:
    """Text from data for a label: escaped, because Plotly reads tags, and cut where it is long."""
    plain = " ".join(str(text).split())
    return html.escape(plain if len(plain) <= limit else plain[: limit - 1] + "…")


def colours_of(names: Sequence[str], theme: Theme = "light") -> dict[str, str]:
    """A colour for each name, in order; they repeat after the tenth."""
    wheel = palette(theme).categorical
    return {name: wheel[index % len(wheel)] for index, name in enumerate(names)}


def layout(
    figure: go.Figure,
    *,
    title: str,
    x: str,
    y: str,
    theme: Theme = "light",
    height: int = 380,
    legend: bool = True,
    wide: bool = True,
    **axes: Any,
) -> go.Figure:
    """Give a figure its title, axis titles and the shared look; further arguments go to ``update_layout``.

    ``wide``: whether it has a row of the page for itself, so that the legend needs fewer lines. Call it when all traces
    are there.
    """
    names = list(figure.layout) if figure.layout else []
    x_axes = [name for name in names if name.startswith("xaxis")] or ["xaxis"]
    y_axes = [name for name in names if name.startswith("yaxis")] or ["yaxis"]
    x_axis = {"automargin": True, "title": {"text": x, "font": {"size": 12}, "standoff": 10}}
    y_axis = {"automargin": True, "title": {"text": y, "font": {"size": 12}, "standoff": 16}}
    top = 50 + (_legend_height(figure, 860 if wide else 400) if legend else 0)
    # Merged here and set at once: Plotly's own update checks the layout anew for every key.
    figure.layout = _merged(
        figure.layout.to_plotly_json(),
        {
            "template": template(theme),
            "title": {"text": title, "font": {"size": 15}, "x": 0, "xanchor": "left", "y": 0.98, "yanchor": "top"},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "height": height,
            "margin": {"l": 8, "r": 12, "t": top, "b": 8},
            "showlegend": legend,
            "legend": {
                "orientation": "h", "x": 0, "xanchor": "left", "y": 1.01, "yanchor": "bottom", "font": {"size": 12},
                "title": {"text": ""}, "bgcolor": "rgba(0,0,0,0)", "traceorder": "normal",
            },
            "hovermode": "closest",
            **dict.fromkeys(x_axes, x_axis),
            **dict.fromkeys(y_axes, y_axis),
            **axes,
        },
    )  # fmt: skip
    return figure


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Both, and of what both have the second's; dictionaries in them likewise."""
    inner = {
        name: _merged(first[name], value)
        for name, value in second.items()
        if isinstance(value, dict) and isinstance(first.get(name), dict)
    }
    return {**first, **second, **inner}


@cache
def template(theme: Theme = "light") -> go.layout.Template:
    """Colours of text, axes and grid. They stand in a template, so that a page can put its own theme in their place."""
    colours = palette(theme)
    axis = {
        "gridcolor": colours.grid,
        "zerolinecolor": colours.grid,
        "linecolor": colours.grid,
        "tickcolor": colours.grid,
        "tickfont": {"color": colours.muted, "size": 12},
        "title": {"font": {"color": colours.muted}},
    }
    return go.layout.Template(
        layout={
            "font": {"color": colours.text, "family": FONT, "size": 12},
            "title": {"font": {"color": colours.text}},
            "legend": {"font": {"color": colours.text}},
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": colours.muted, "activecolor": colours.text},
            "hoverlabel": {
                "bgcolor": colours.background,
                "bordercolor": colours.muted,
                "font": {"color": colours.text, "size": 12},
                "align": "left",
            },
            "colorway": list(colours.categorical),
            "xaxis": axis,
            "yaxis": axis,
        }
    )


def _legend_height(figure: go.Figure, width: int) -> int:
    """Pixels that the legend takes above the plot: Plotly lays its entries out in columns as wide as the longest."""
    names = [str(trace.name) for trace in figure.data if trace.name and trace.showlegend is not False]
    if not names:
        return 0
    columns = max(1, width // (46 + 7 * max(map(len, names))))
    return 20 * -(-len(names) // columns) + 6


def colorbar(title: str, **more: Any) -> dict[str, Any]:
    """A slim colour bar beside the plot."""
    return {
        "title": {"text": title, "font": {"size": 12}, "side": "right"},
        "thickness": 12,
        "len": 1.0,
        "outlinewidth": 0,
        "tickfont": {"size": 11},
        "xpad": 8,
        **more,
    }


def log_ticks(values: Iterable[float | None]) -> dict[str, Any]:
    """Ticks of a log axis for these values: powers of ten, with more between them where there are few."""
    positive = [value for value in values if value is not None and value > 0]
    if not positive:
        return {"type": "log", "dtick": 1}
    low, high = min(positive), max(positive)
    steps = (1, 1.5, 2, 3, 5, 7) if high / low < 4 else (1, 2, 5) if high / low < 300 else (1,)
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    ticks = [step * 10.0**power for power in powers for step in steps]
    shown = [tick for tick in ticks if low / 3 <= tick <= high * 3]
    return {"type": "log", "tickvals": shown, "ticktext": [number(tick) for tick in shown]}


def number(value: float) -> str:
    """A number for a tick: 0.05, 2, 500, 20k, 3M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / min(size, 1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:g}"


def message(text: str, *, title: str, theme: Theme = "light", height: int = 220) -> go.Figure:
    """A figure that holds one sentence instead of data."""
    figure = go.Figure()
    figure.add_annotation(
        text=safe(text, 300),
        showarrow=False,
        x=0.5,
        y=0.5,
        xref="paper",
        yref="paper",
        font={"size": 13},
    )
    layout(figure, title=title, x="", y="", theme=theme, height=height, legend=False)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure


def pickable(figure: go.Figure, **sources: str) -> go.Figure:
    """Say what a click on the figure picks: ``layer``, ``expert``, ``sequence`` or ``token``, each with its source.

    A source is "x" or "y", the point's place on that axis (a category by its text); "customdata.N", the N-th value of
    the point's customdata; or "=TEXT", the same for the whole figure. Pages then mark what is picked: where x or y is
    a layer or an expert, its cell, row or column.
    """
    figure.update_layout(meta={"pick": sources})
    return figure


def rows_height(rows: int, *, each: int = 20, least: int = 260, most: int = 760) -> int:
    """The height of a map with so many rows, pixels."""
    return int(min(max(rows * each + 110, least), most))
