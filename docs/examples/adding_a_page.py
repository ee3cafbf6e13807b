"""Layer ranking: which layers send their tokens to few experts, by one measure at a time."""

from __future__ import annotations

from typing import Literal

import plotly.graph_objects as go
import polars as pl

import store
from app import data, state
from app.components import chart, header, table
from app.components.page import render
from app.exhibits import Absent, Entry, Exhibit, Frames, fresh
from app.figures import style
from app.frames.axes import most
from app.frames.load import balance

Measure = Literal["gini", "max_violation", "beyond_chance"]
WORDS = {
    "gini": "Gini coefficient (0 to 1)",
    "max_violation": "MaxVio: the busiest expert over the mean, minus 1",
    "beyond_chance": "variation of load, as a multiple of what chance gives",
}


# The frame: from a run to a table. Formulas are in profiler/metrics/, SQL is in store/.
def layers(run: store.Run, *, by: str = "gini") -> pl.DataFrame:
    """One row per MoE layer that was used, the most uneven first: rank, label, value, and the measures of balance."""
    frame = balance(run).filter(pl.col("tokens") > 0)
    frame = frame.with_columns((pl.col("cv") / pl.col("noise_cv")).alias("beyond_chance"))
    frame = frame.sort(by, descending=True, nulls_last=True, maintain_order=True).with_row_index("rank", offset=1)
    return frame.with_columns(pl.col(by).alias("value"))


# The figure: from a table to a picture. No query, no Streamlit.
def ranking(frame: pl.DataFrame, *, by: str, theme: style.Theme) -> go.Figure:
    """A bar per layer, the most uneven on top; a click picks the layer."""
    bars = go.Bar(
        x=frame["value"].to_numpy(), y=frame["label"].to_list(), orientation="h",
        marker_color=style.palette(theme).accent, hovertemplate="layer %{y}: %{x:.3g}<extra></extra>",
    )  # fmt: skip
    figure = style.layout(
        go.Figure(bars), title="Layers, the most uneven first", x=WORDS[by], y="layer", theme=theme, legend=False,
        height=style.rows_height(len(frame)),
    )  # fmt: skip
    figure.update_yaxes(type="category", autorange="reversed")
    return style.pickable(figure, layer="y")


# The exhibit: figure, data and words, for the page, the report and ``moescope figure``.
def ranked_layers(
    run: store.Run, *, frames: Frames = fresh, theme: style.Theme = "light", by: Measure = "gini"
) -> Exhibit:
    """Bars: MoE layers in order of how uneven their load is."""
    frame = frames(layers, run, by=by)
    if frame.is_empty():
        raise Absent("No layer was used yet.")
    return Exhibit(
        figure=ranking(frame, by=by, theme=theme),
        frame=frame,
        read="Layers on top send more of their tokens to few experts: look there first for experts to drop.",
        rests_on=f"{most(frame['tokens']):,.0f} tokens.",
        alt=f"Bars: MoE layers in order of {WORDS[by]}",
    )


def page(run: store.Run) -> None:
    """Draw the page."""
    header.title("Layer ranking", run, what="Which layers send their tokens to few experts?")
    by = state.choose("Measure", list(WORDS), key="measure", words=lambda name: WORDS[name].split(":")[0])
    if not chart.exhibit(ranked_layers, run, key="layer-ranking", by=by):
        return
    table.show(
        data.frame(layers, run, by=by).select(
            "rank", "label", "gini", "max_violation", "beyond_chance", "dead", "tokens"
        ),
        key="layer-ranking-table",
        alt="MoE layers with their measures of balance",
        read="A row picks its layer.",
    )


EXHIBITS = (Entry("layer-ranking", ranked_layers, "Layers in order of unevenness", page="layer-ranking"),)

if __name__ == "__main__":
    render(page)
