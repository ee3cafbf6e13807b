"""A plan's widths, expert by expert, and where its predicted cost comes from."""

from __future__ import annotations

import json

import polars as pl
import streamlit as st

from app import data, state
from app.components import chart, table
from app.components.table import Column
from app.exhibits import compress_plan as exhibits
from app.exhibits.exhibit import Absent
from app.frames import compress
from app.frames import compress_bits as frames
from compressor.plan import Plan, QuantizeStep
from planner.estimate.prediction import Calibration
from store import Run


def maps(run: Run, plan: Plan) -> None:
    """The widths as a map; nothing for plans that quantize nothing."""
    if not quantizes(plan):
        return
    parts = data.of_plan(_parts, run, plan)
    part = state.choose("Projection", parts, key="projection", segmented=True) if len(parts) > 1 else ""
    of_plan(exhibits.of_bits, run, plan, key="plan-bits", part=part)


def details(run: Run, plan: Plan, *, calibration: str = "") -> None:
    """How many weights have which width, and which layers the predicted cost comes from."""
    if not quantizes(plan):
        of_plan(exhibits.of_cost, run, plan, key="plan-cost", calibration=calibration)
        return
    with chart.pair():
        of_plan(exhibits.of_cost, run, plan, key="plan-cost", calibration=calibration)
        of_plan(exhibits.of_widths, run, plan, key="plan-widths")
    with st.expander("All figures: widths by layer", icon=":material/table:"):
        table.show(
            data.of_plan(_widths, run, plan), key="plan-widths-table", bordered=False,
            columns={"experts": Column("experts by width", "text"), "bits": Column("bits, all counted", "number")},
            alt="Every layer: how many experts have which width, and effective bits",
        )  # fmt: skip


def of_plan(maker: exhibits.OfPlan, run: Run, plan: Plan, *, key: str, **choices: str) -> None:
    """Draw an exhibit of the plan that is shown, or say why it is not there; made once per plan."""
    try:
        chart.draw(data.of_plan(maker, run, plan, theme=state.theme(), **choices), key=key)
    except Absent as missing:
        chart.absent(missing)


def quantizes(plan: Plan) -> bool:
    """Whether it gives experts widths."""
    return any(isinstance(step, QuantizeStep) for step in plan.steps)


def key_of(calibration: Calibration | None) -> str:
    """What prices rest on as text, so that it can be a key; empty where no plan was measured."""
    return json.dumps(calibration.content()) if calibration is not None and calibration.count else ""


def _parts(run: Run, plan: Plan) -> list[str]:
    return frames.differing(frames.widths(plan))


def _widths(run: Run, plan: Plan) -> pl.DataFrame:
    return compress.widths(plan)
