"""What-if routing: what would fewer, more or other experts per token keep and cost, without running the model?"""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st

from app import data
from app.components import chart, header, steering, what_if_advice, what_if_controls, what_if_live, what_if_plan
from app.components.answer import answer
from app.components.page import render
from app.components.sections import sections
from app.components.what_if_controls import Text
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
    asked = what_if_controls.text(run) if here else Text(None, False)
    sections(_drawers(run, here, asked))
    what_if_controls.hidden(run)


def _drawers(run: Run, here: set[str], asked: Text) -> dict[str, Callable[[], None]]:
    drawers: dict[str, Callable[[], None]] = {"Curves": lambda: _curves(run, asked)}
    if here & set(frames.CURVES):
        drawers["Layers"] = lambda: _layers(run, asked)
    for name, title, draw in (
        ("sinkhorn", "Balance", _balance), ("smoothing", "Smoothing", _smoothing), ("tiers", "Tiers", _tiers),
    ):  # fmt: skip
        if name in here:
            drawers[title] = lambda draw=draw: draw(run, asked)  # type: ignore[misc]
    drawers["Steering"] = lambda: steering.section(run, asked)
    drawers["Live"] = lambda: what_if_live.section(run)
    drawers["Advice"] = lambda: what_if_advice.section(run)
    return drawers


def _curves(run: Run, asked: Text) -> None:
    try:
        chosen, _ = what_if_controls.rule(run, asked)
    except Absent as missing:
        chart.absent(missing)
        return
    answer(answers.curves, run, **chosen)
    with chart.pair():
        chart.exhibit(exhibits.kept, run, key="what-if-kept", **chosen)
        chart.exhibit(exhibits.active, run, key="what-if-active", **chosen)
    chart.exhibit(exhibits.by_layer, run, key="what-if-by-layer", **{k: v for k, v in chosen.items() if k != "value"})


def _layers(run: Run, asked: Text) -> None:
    try:
        chosen, _ = what_if_controls.rule(run, asked)
    except Absent as missing:
        chart.absent(missing)
        return
    answer(answers.layers, run, **chosen)
    with chart.pair():
        chart.exhibit(exhibits.layers, run, key="what-if-layers", **chosen)
        chart.exhibit(exhibits.mass, run, key="what-if-mass", **chosen)
    chart.exhibit(exhibits.balance, run, key="what-if-balance", **chosen)
    chart.exhibit(exhibits.change, run, key="what-if-change", **chosen)
    what_if_plan.section(
        run, "rule", rule=chosen["method"], value=chosen["value"], weights=chosen["weights"], domain=asked.domain,
        limit_tokens=frames.limit_of(run, asked.whole),
    )  # fmt: skip


def _balance(run: Run, asked: Text) -> None:
    answer(answers.even, run, **asked.choices)
    what_if_controls.trusted(run, "sinkhorn", asked)
    with chart.pair():
        chart.exhibit(more.even_balance, run, key="even-balance", **asked.choices)
        chart.exhibit(more.even_price, run, key="even-price", **asked.choices)
    chart.exhibit(more.even_change, run, key="even-change", **asked.choices)


def _smoothing(run: Run, asked: Text) -> None:
    answer(answers.smoothing, run, **asked.choices)
    what_if_controls.trusted(run, "smoothing", asked)
    with chart.pair():
        chart.exhibit(more.smoothing, run, key="smoothing", **asked.choices)
        chart.exhibit(more.entropy, run, key="smoothing-entropy", **asked.choices)


def _tiers(run: Run, asked: Text) -> None:
    answer(answers.tiers, run, **asked.choices)
    what_if_controls.trusted(run, "tiers", asked)
    with chart.pair():
        chart.exhibit(more.tiers, run, key="tiers", **asked.choices)
        chart.exhibit(more.tier_bits, run, key="tier-bits", **asked.choices)


if __name__ == "__main__":
    render(page)
