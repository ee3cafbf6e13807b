"""A plan's widths, expert by expert, and where its predicted cost comes from."""

from __future__ import annotations

import json

import polars as pl
import streamlit as st

from app import data, state
from app.components import chart
from app.figures import compress_bits as figures
from app.figures.style import safe
from app.frames import compress
from app.frames import compress_bits as frames
from compressor.plan import Plan
from planner.estimate.prediction import Calibration
from store import Run

_number = st.column_config.NumberColumn


def maps(plan: Plan) -> None:
    """The widths as a map; nothing for plans that quantize nothing."""
    found = frames.widths(plan)
    if found.is_empty():
        return
    parts = frames.differing(found)
    part = state.choose("Projection", parts, key="projection", segmented=True) if len(parts) > 1 else parts[0]
    of = f" of {part} projections" if len(parts) > 1 else ""
    chart.show(
        figures.bits_map(found, part=part, title=f"Bits{of}: {safe(compress.title(plan))}", theme=state.theme()),
        found,
        key="plan-bits",
        read="The stronger the colour, the narrower the weights: strong cells save most. "
        + ("Crosses: experts that go. " if found["gone"].any() else "")
        + ("The projections of an expert differ: choose one above." if len(parts) > 1 else ""),
        rests_on=f"{len(found):,} experts; scales and zero points come on top (below).",
        alt="Map of layers and experts: bits of a weight",
    )


def details(run: Run, plan: Plan, calibration: Calibration | None = None) -> None:
    """How many weights have which width, and which layers the predicted cost comes from."""
    given = key_of(calibration)
    turned = data.of_plan(frames.turns, run, plan, calibration=given)
    share = frames.histogram(plan)
    if turned.is_empty() and share.is_empty():
        return
    with chart.pair():
        if not turned.is_empty():
            whole = turned["kl"].sum()
            chart.show(
                figures.cost_by_layer(turned, title="Where the predicted cost comes from", theme=state.theme()),
                turned,
                key="plan-cost",
                read="The bars add up to the plan's predicted divergence: high ones are layers whose experts the plan "
                "should spare first.",
                rests_on=f"{whole:.3g} nats in all, {'corrected by measured plans' if given else 'from sums'}.",
                alt="Stacked bars: predicted divergence by decoder layer and kind of change",
            )
        if not share.is_empty():
            chart.show(
                figures.histogram(share, title="Weights by width", theme=state.theme()),
                share,
                key="plan-widths",
                read="How many of the experts' weights are stored in how many bits.",
                rests_on=f"{share['weights'].sum():,} weights of experts that stay.",
                alt="Bars: share of weights by width",
            )
    _table(plan)


def key_of(calibration: Calibration | None) -> str:
    """What prices rest on as text, so that it can be a key; empty where no plan was measured."""
    return json.dumps(calibration.content()) if calibration is not None and calibration.count else ""


def _table(plan: Plan) -> None:
    found = compress.widths(plan)
    if found.is_empty():
        return
    with st.expander("All figures: widths by layer", icon=":material/table:"):
        st.dataframe(
            found.with_columns(pl.col("bits").round(3)),
            hide_index=True,
            alt="Every layer: how many experts have which width, and effective bits",
            column_config={"label": "layer", "bits": _number("bits, all counted", format="%.3f")},
        )
