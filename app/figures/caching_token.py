"""Figure of one token on the clock: what device, link and CPU do, layer after layer."""

from __future__ import annotations

import plotly.graph_objects as go
import polars as pl

from app.figures.style import Theme, fade, layout, message, palette, pickable

LANES = {"device": "device", "link": "link", "cpu": "CPU"}
KINDS = {
    "dense": "attention and router", "hit": "expert that was there", "load": "copy over the link",
    "loaded": "expert that was copied", "cpu": "expert on the CPU", "tail": "head",
}  # fmt: skip
_NAMED = 16
"""Up to so many layers carry their name above the lanes; of more, every so many do."""


def token(frame: pl.DataFrame, *, title: str, theme: Theme = "light") -> go.Figure:
    """Bars of time in three lanes; dotted lines: where a layer begins.

    frame: ``app.frames.caching.events``.
    """
    if frame.is_empty():
        return message("Nothing happens.", title=title, theme=theme)
    colours, figure = palette(theme), go.Figure()
    wheel = colours.categorical
    paint = {
        "dense": fade(colours.muted, 0.7), "hit": wheel[0], "load": wheel[1], "loaded": wheel[2], "cpu": wheel[3],
        "tail": fade(colours.muted, 0.35),
    }  # fmt: skip
    for kind, words in KINDS.items():
        part = frame.filter(pl.col("kind") == kind)
        if part.is_empty():
            continue
        where = [
            ("behind the last layer" if layer is None else f"layer {layer}")
            + ("" if expert is None else f", expert {expert}")
            for layer, expert in part.select("layer", "expert").iter_rows()
        ]
        figure.add_bar(
            y=[LANES[lane] for lane in part["lane"]], x=part["end_ms"] - part["begin_ms"], base=part["begin_ms"],
            orientation="h", name=words,
            marker={"color": paint[kind], "line": {"width": 0.6, "color": colours.background}},
            customdata=[
                (words_of, *row)
                for words_of, row in zip(
                    where, part.select("begin_ms", "end_ms", "layer", "expert").iter_rows(), strict=True
                )
            ],
            hovertemplate=f"%{{customdata[0]}}: {words}<br>%{{customdata[1]:.3g}} to %{{customdata[2]:.3g}} ms"
            "<extra></extra>",
        )  # fmt: skip
    lanes = [words for lane, words in LANES.items() if lane == "device" or lane in set(frame["lane"])]
    layout(figure, title=title, x="ms since the token began", y="", theme=theme, height=190 + 55 * len(lanes),
           wide=False, barmode="overlay", bargap=0.35)  # fmt: skip
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=lanes[::-1], showgrid=False)
    figure.update_xaxes(range=[0, float(frame["end_ms"].max()) * 1.002])  # type: ignore[arg-type]
    _layers(figure, frame.filter(pl.col("kind") == "dense"), colours.muted)
    return pickable(figure, layer="customdata.3", expert="customdata.4")


def _layers(figure: go.Figure, begins: pl.DataFrame, colour: str) -> None:
    """A line where each layer begins, and its name in the lanes' upper margin."""
    every = -(-len(begins) // _NAMED)
    for place, (layer, begin) in enumerate(begins.select("layer", "begin_ms").iter_rows()):
        figure.add_vline(x=begin, line={"color": fade(colour, 0.5), "width": 1, "dash": "dot"})
        if place % every == 0:
            figure.add_annotation(
                x=begin, y=1, yref="paper", xanchor="left", yanchor="top", showarrow=False, text=layer,
                font={"size": 10, "color": colour},
            )  # fmt: skip
