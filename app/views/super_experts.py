"""Super experts: outliers of down_proj, and the massive activations that they feed."""

from __future__ import annotations

from functools import partial

import polars as pl
import streamlit as st

from app import data, state
from app.components import ablation, chart, header, table
from app.components.page import render
from app.components.sections import sections
from app.components.table import Column
from app.exhibits import super_experts as exhibits
from app.exhibits.absent import not_yet
from app.exhibits.exhibit import Absent
from app.frames import super_experts as frames
from store import Run

_CHOICES = {"all": "all tokens", "first_routed": "first routed token"}


def page(run: Run) -> None:
    """Draw the page."""
    header.title("Super experts", run, what="Does the model depend on a few experts whose outputs are outliers?")
    try:
        exhibits.recorded(run, data.frame, "all")
    except Absent as missing:
        chart.absent(missing)
        return
    drawers = {"Outputs": _outputs, "Residual stream": _residual, "Switched off": ablation.section}
    sections({name: partial(draw, run) for name, draw in drawers.items()})


def _outputs(run: Run) -> None:
    tokens = state.choose(
        "Largest output over",
        list(_CHOICES),
        key="over",
        words=_CHOICES.__getitem__,
        segmented=True,
        help="The paper takes all tokens. Its published code sees only the first token routed to an expert in each "
        "sequence.",
    )
    maxima = data.frame(frames.output_maxima, run, tokens=tokens)
    _verdict(run, maxima, data.frame(frames.thresholds, run), tokens)
    chart.exhibit(exhibits.outputs, run, key=f"outputs-{tokens}", over=tokens)
    with chart.pair():
        chart.exhibit(exhibits.ranked_outputs, run, key=f"ranked-{tokens}", over=tokens)
        _table(maxima, tokens)


def _residual(run: Run) -> None:
    with chart.pair():
        chart.exhibit(exhibits.residual, run, key="residual")
        chart.exhibit(exhibits.attention_sinks, run, key="sinks")
    frame = data.frame(frames.residual, run)
    table.show(
        frame.drop("median_there").sort("ratio", descending=True, nulls_last=True),
        key="residual-table",
        alt="Every decoder layer: its largest hidden state and where it stands",
        read="A row picks the layer and the place in the text. Decoder layers without experts are listed, too.",
        columns={
            "absolute_max": Column("largest |value|"),
            "ratio": Column("× the median", "figure", "over the median |value| of the same token"),
            "position": Column("at position", "text", "0 is the first token of its sequence"),
            "channel": Column("channel", "text"),
            "sequence": Column("sequence", "text"),
            "later_max": Column("largest at later positions"),
        },
    )


def _verdict(run: Run, maxima: pl.DataFrame, limits: pl.DataFrame, tokens: str) -> None:
    if limits.is_empty():
        chart.absent(not_yet("Which experts are super experts", run))
        return
    limit = limits.filter((pl.col("tokens") == tokens) & (pl.col("rule") == "paper"))["value"]
    top = maxima.row(0, named=True)
    numbers = f"The largest output is {top['value']:,.3g} (layer {top['label']}, expert {top['expert']})"
    if len(limit) and limit[0] is not None:
        numbers += f"; the paper's rule asks for more than {limit[0]:,.3g}"
    few = ""
    if len(maxima) < frames.FEW_EXPERTS:
        few = (
            f" With {len(maxima)} experts the 99.5th percentile lies between the two largest, so the rule can name "
            "one at most."
        )
    found = maxima.filter(pl.col("paper"))
    code = maxima.filter(pl.col("code"))
    if found.is_empty():
        if len(limit) and limit[0] is not None and top["value"] > limit[0]:
            numbers += ", which it exceeds, but no massive activations form in its layer"
        more = (
            f" The rule of the paper's code names {_names(code)}."
            if len(code)
            else " Neither does the rule of the paper's code name one."
        )
        st.info(f"**No super expert found.** {numbers}.{more}{few}", icon=":material/check_circle:")
        return
    same = (
        "The rule of the paper's code names the same."
        if _names(code) == _names(found)
        else f"The rule of the paper's code names {_names(code) or 'none'}."
    )
    st.warning(
        f"**{len(found)} super expert{'s' if len(found) > 1 else ''}**, as (layer, expert): {_names(found)}. "
        f"{numbers}. {same} Removing them can break the model: protect them in every plan.{few}",
        icon=":material/bolt:",
    )


def _names(frame: pl.DataFrame) -> str:
    rows = frame.sort("layer", "step", "expert").select("label", "kind", "expert").iter_rows()
    pairs = [f"({label}, {'shared ' if kind == 'shared' else ''}{expert})" for label, kind, expert in rows]
    return ", ".join(pairs[:12]) + (f" and {len(pairs) - 12} more" if len(pairs) > 12 else "")


def _table(maxima: pl.DataFrame, tokens: str) -> None:
    columns = ["rank", "label", "expert", "value", "paper", "code"]
    columns += ["channel", "position", "sequence"] if tokens == "all" else []
    table.show(
        maxima.filter(pl.col("kind") == "routed").select(columns).head(50),
        key=f"largest-{tokens}",
        alt="The fifty routed experts with the largest outputs",
        read="The fifty largest of routed experts. A row picks the expert and the token at which the value stood.",
        hide=("rank", "sequence"),
        columns={
            "label": Column("layer", "text", width=52),
            "expert": Column("expert", "text", width=58),
            "value": Column("|output|", "figure", "the largest absolute value", width=76),
            "paper": Column("paper", help="a super expert by the paper's rule", width=58),
            "code": Column("code", help="a super expert by the rule of the paper's code", width=54),
            "channel": Column("channel", "text", "of the residual stream; super experts of one model often share it",
                              width=68),
            "position": Column("position", "text", "in the sequence; 0 is the first token", width=70),
        },
    )  # fmt: skip


if __name__ == "__main__":
    render(page)
