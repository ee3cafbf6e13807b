"""Super experts: outliers of down_proj, and the massive activations that they feed."""

from __future__ import annotations

import polars as pl
import streamlit as st

from app import data, state
from app.components import ablation, chart, header
from app.components.page import render
from app.figures import outliers
from app.figures.ablation import sink_curve
from app.frames import super_experts as frames
from store import Run

# Below so many experts, less than one lies above the 99.5th percentile by construction.
FEW_EXPERTS = 200
_CHOICES = {"all": "all tokens", "first_routed": "first routed token"}


def page(run: Run) -> None:
    """Draw the page."""
    header.title("Super experts", run, what="Does the model depend on a few experts whose outputs are outliers?")
    if "activations" not in run.info.levels:
        header.needs_level("What experts put out", "activations", run)
        return
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
    if maxima.is_empty():
        st.info("No expert output has been recorded yet.", icon=":material/hourglass_top:")
        return
    limits = data.frame(frames.thresholds, run)
    _verdict(run, maxima, limits, tokens)
    theme = state.theme()
    chart.show(
        outliers.output_map(maxima, tokens=tokens, theme=theme),
        maxima,
        key=f"outputs-{tokens}",
        read="Largest absolute value that each expert's down_proj put out, before the gate weight. Rings mark super "
        "experts by the paper's rule: above the 99.5th percentile, above a tenth of the largest, in a layer where "
        "massive activations form.",
        rests_on=f"{len(maxima):,} experts that were used.",
        alt="Map of layers and experts: largest output, log scale",
    )
    with chart.pair():
        chart.show(
            outliers.ranked_outputs(maxima, limits, tokens=tokens, theme=theme),
            maxima,
            key=f"ranked-{tokens}",
            read="Super experts stand far above the curve that the other experts make. A smooth curve means that "
            "there are none.",
            rests_on="The 200 largest.",
            alt="Experts ranked by their largest output against the thresholds of two rules",
        )
        residual = data.frame(frames.residual, run)
        chart.show(
            outliers.residual_curve(residual, theme=theme),
            residual,
            key="residual",
            read="A jump by orders of magnitude over the median is a massive activation; rings mark layers above "
            "100 and 1,000 times the median, filled ones those in which it grows: there super experts stand. They "
            "usually sit at the first position, in few channels.",
            rests_on=_forming(residual),
            alt="Curves over the layers: largest, later and median absolute hidden state",
        )
    if "attention" in run.info.levels:
        sinks = data.frame(frames.attention_sinks, run)
        chart.show(
            sink_curve(sinks, theme=theme),
            sinks,
            key="sinks",
            read="How much attention falls on position 0, whatever token stands there. Massive activations make it an "
            "attention sink: heads that have nothing to say look there.",
            rests_on="Queries after position 0; layers without softmax attention have no point.",
            alt="Attention on the first position over the layers, mean and range of the heads",
        )
    ablation.section(run, rule=next((rule for rule in ("paper", "code") if maxima[rule].any()), None))
    _table(maxima, tokens)


def _forming(residual: pl.DataFrame) -> str:
    layers = residual.filter(pl.col("forming"))["layer"].to_list()
    if not layers:
        return "No massive activation forms in any layer, so by the paper's rule no expert is a super expert."
    return f"Massive activations form in layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}."


def _verdict(run: Run, maxima: pl.DataFrame, limits: pl.DataFrame, tokens: str) -> None:
    if limits.is_empty():
        header.not_yet("Which experts are super experts", run)
        return
    limit = limits.filter((pl.col("tokens") == tokens) & (pl.col("rule") == "paper"))["value"]
    top = maxima.row(0, named=True)
    numbers = f"The largest output is {top['value']:,.3g} (layer {top['label']}, expert {top['expert']})"
    if len(limit) and limit[0] is not None:
        numbers += f"; the paper's rule asks for more than {limit[0]:,.3g}"
    few = ""
    if len(maxima) < FEW_EXPERTS:
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
    st.subheader("Where the largest outputs stand", anchor=False)
    columns = ["rank", "label", "expert", "kind", "value", "paper", "code"]
    columns += ["position", "channel", "sequence"] if tokens == "all" else []
    number = st.column_config.NumberColumn
    st.dataframe(
        maxima.select(columns).head(50),
        hide_index=True,
        alt="The fifty experts with the largest outputs",
        column_config={
            "label": "layer",
            "value": number("largest |output|", format="%.4g"),
            "paper": st.column_config.CheckboxColumn("paper's rule"),
            "code": st.column_config.CheckboxColumn("code's rule"),
            "position": number("at position", help="position in the sequence; 0 is the first token"),
            "channel": number(
                "channel", help="channel of the residual stream; super experts of one model often share it"
            ),
        },
    )


if __name__ == "__main__":
    render(page)
