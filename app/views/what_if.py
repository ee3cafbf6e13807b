"""What-if routing: what would fewer, more or other experts per token keep and cost, without running the model?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import streamlit as st

from app import data
from app.components import chart, header, steering, what_if_advice, what_if_controls, what_if_live, what_if_plan
from app.components.answer import answer
from app.components.page import render
from app.components.sections import sections
from app.exhibits import what_if as exhibits
from app.exhibits import what_if_answers as answers
from app.exhibits import what_if_more as more
from app.exhibits.exhibit import Absent
from app.frames import what_if as frames
from store import Run


def page(run: Run) -> None:
    """Draw the page."""
    header.title("What-if routing", run, what="Fewer, more or other experts per token: what would it keep, and cost?")
    try:
        exhibits.require_finished(run)
    except Absent as missing:
        chart.absent(missing)
        return
    with st.spinner("Looking which rules make sense here"):
        here = set(data.frame(frames.methods, run).filter("here")["name"].to_list())
    sections(_drawers(run, here))
    what_if_controls.hidden(run)


def _drawers(run: Run, here: set[str]) -> dict[str, Callable[[], None]]:
    drawers: dict[str, Callable[[Run], None]] = {"Curves": _curves}
    if here & set(frames.CURVES):
        drawers["Layers"] = _layers
    for name, title, draw in (
        ("sinkhorn", "Balance", _balance), ("smoothing", "Smoothing", _smoothing), ("tiers", "Tiers", _tiers),
    ):  # fmt: skip
        if name in here:
            drawers[title] = draw
    drawers |= {"Steering": steering.section, "Live": what_if_live.section, "Advice": what_if_advice.section}
    return {name: partial(draw, run) for name, draw in drawers.items()}


def _curves(run: Run) -> None:
    try:
        chosen, result = what_if_controls.rule(run)
    except Absent as missing:
        chart.absent(missing)
        return
    answer(answers.curves, run, **chosen)
    what_if_controls.certainty(result, chosen["value"])
    with chart.pair():
        chart.exhibit(exhibits.kept, run, key="what-if-kept", **chosen)
        chart.exhibit(exhibits.active, run, key="what-if-active", **chosen)
    chart.exhibit(exhibits.by_layer, run, key="what-if-by-layer", **{k: v for k, v in chosen.items() if k != "value"})


def _layers(run: Run) -> None:
    try:
        chosen, result = what_if_controls.rule(run, plan=True)
    except Absent as missing:
        chart.absent(missing)
        return
    answer(answers.layers, run, **chosen)
    what_if_controls.certainty(result, chosen["value"])
    with chart.pair():
        chart.exhibit(exhibits.layers, run, key="what-if-layers", **chosen)
        chart.exhibit(exhibits.mass, run, key="what-if-mass", **chosen)
    chart.exhibit(exhibits.balance, run, key="what-if-balance", **chosen)
    chart.exhibit(exhibits.change, run, key="what-if-change", **chosen)
    what_if_plan.section(
        run, "rule", **frames.as_rule(result, chosen["method"], chosen["value"]), weights=chosen["weights"],
        domain=chosen["domain"], limit_tokens=frames.limit_of(run, chosen["whole"]),
    )  # fmt: skip


def _balance(run: Run) -> None:
    asked = what_if_controls.text(run)
    answer(answers.even, run, **asked.choices)
    what_if_controls.trusted(run, "sinkhorn", asked)
    with chart.pair():
        chart.exhibit(more.even_balance, run, key="even-balance", **asked.choices)
        chart.exhibit(more.even_price, run, key="even-price", **asked.choices)
    chart.exhibit(more.even_change, run, key="even-change", **asked.choices)


def _smoothing(run: Run) -> None:
    asked = what_if_controls.text(run)
    answer(answers.smoothing, run, **asked.choices)
    what_if_controls.trusted(run, "smoothing", asked)
    with chart.pair():
        chart.exhibit(more.smoothing, run, key="smoothing", **asked.choices)
        chart.exhibit(more.entropy, run, key="smoothing-entropy", **asked.choices)


def _tiers(run: Run) -> None:
    asked, thresholds = what_if_controls.tiers(run)
    chosen = asked.choices | thresholds
    answer(answers.tiers, run, **chosen)
    what_if_controls.trusted(run, "tiers", asked, skip_above=thresholds["skip_above"])
    with chart.pair():
        chart.exhibit(more.tiers, run, key="tiers", **chosen)
        chart.exhibit(more.tier_bits, run, key="tier-bits", **chosen)


if __name__ == "__main__":
    render(page)
