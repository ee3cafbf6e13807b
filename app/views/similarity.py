"""Similarity: which experts of a layer are alike, by which measure, and do the measures agree?"""

from __future__ import annotations

import polars as pl
import streamlit as st

from app import data, focus, state
from app.components import chart, header
from app.components.page import render
from app.figures import similarity as figures
from app.figures.style import safe
from app.frames import similarity as frames
from store import Run

_READ = {
    "router_row": "Blue pairs: the router looks for the same thing in a token, so both experts compete for it.",
    "router_logit": "Blue pairs: the router wants both for the same tokens; orange ones exclude each other.",
    "output_cosine": "Blue pairs answer the same token in the same direction, whether or not it was routed to them.",
    "output_product": "As the cosine, with long outputs counting more: a single massive activation can colour a row.",
    "cka": "Pairs that tell the same tokens apart. With few tokens everything looks alike: read the debiased form.",
    "debiased_cka": "Blue pairs tell the same tokens apart, in whatever directions; 0 is what unrelated experts give.",
    "gated_output": "Blue pairs stand in for each other in the layer's sum. Pairs that never meet are 0 however alike.",
    "weight": "Neurons have no order, so only experts that began as copies of each other stand out here.",
    "weight_mean": "Means over neurons need no order, and say little: they leave most of the weights out.",
    "weight_matched": "After the neurons were matched: a best of many orders, so no pair is at 0. Empty cells were too "
    "costly to match.",
}
_PART = "One matrix of the weights by itself, neurons in the order in which they stand."


def page(run: Run) -> None:
    """Draw the page."""
    header.title("Similarity", run, what="Which experts of a layer are alike, by which measure, and do these agree?")
    known = data.frame(frames.kinds, run)
    here = known.filter(pl.col("here"))
    if here.is_empty():
        _nothing(run, known)
        return
    titles = dict(known.select("kind", "title").iter_rows())
    names = here["kind"].to_list()
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        label = focus.current().layer_in(run)
        kind = _choose_kind("Similarity of", names, titles, key="kind", preferred=("debiased_cka", "router_logit"))
        other = _choose_kind("Beside it", names, titles, key="beside", preferred=("weight_matched", "router_row"))
        scale = state.choose(
            "Written", list(frames.SCALES), key="scale", words=frames.SCALES.__getitem__, segmented=True,
            help="Look-into-MoEs writes a cosine as an angle, SERE and HC-SMoE as (s + 1) / 2. Ranks stay as they are.",
        )  # fmt: skip
    _maps(run, label=label, kinds=(kind, other), titles=titles, scale=scale)
    _pairs(run, label=label, kind=kind, titles=titles)
    _layers(run, kind=kind, titles=titles)
    _agreement(run, label=label, kinds=(kind, other), titles=titles)
    _missing(run, known)


def _choose_kind(label: str, names: list[str], titles: dict[str, str], *, key: str, preferred: tuple[str, ...]) -> str:
    default = next((name for name in preferred if name in names), names[-1])
    return state.choose(label, names, key=key, default=default, words=titles.__getitem__)


def _maps(run: Run, *, label: str, kinds: tuple[str, str], titles: dict[str, str], scale: str) -> None:
    """Two kinds beside each other, in the order that the first one makes."""
    with chart.pair():
        for place, kind in enumerate(dict.fromkeys(kinds)):
            frame = data.frame(frames.matrix, run, label=label, kind=kind, order_by=kinds[0])
            pairs = len(frame.drop_nulls("similarity")) // 2
            chart.show(
                figures.similarity_map(
                    frame, title=f"{_title(titles[kind])}, layer {safe(label)}", value=scale, theme=state.theme()
                ),
                frame,
                key=f"similarity-{kind}-{label}",
                read=_READ.get(kind, _PART)
                + (" Experts stand in the order in which this kind groups them." if not place else " Same order."),
                rests_on=f"{pairs:,} pairs.",
                alt=f"Map of experts by experts: {titles[kind]}",
            )


def _pairs(run: Run, *, label: str, kind: str, titles: dict[str, str]) -> None:
    frame = data.frame(frames.nearest_pairs, run, label=label, kind=kind)
    st.subheader(f"Most alike by {titles[kind]}, layer {label}", anchor=False)
    if frame.is_empty():
        st.write("This run says nothing of this kind in this layer.")
        return
    number = st.column_config.NumberColumn
    columns = {name: number(titles[name], format="%.3f") for name in frame.columns if name in titles}
    columns["joint_tokens"] = number("joint tokens", help="tokens that used both experts")
    with st.container(border=True, gap="xsmall"):
        st.dataframe(
            frame.select("expert", "other", kind, *(name for name in frame.columns[2:] if name != kind)),
            hide_index=True,
            alt="The pairs of experts that are most alike, by every kind of similarity",
            column_config=columns,
        )
        chart.caption(
            "A pair that is alike by all kinds is a candidate for merging; one that is alike by weights only is not "
            "used alike. Weighted outputs say little where the joint tokens are few.",
            frame,
            None,
            key=f"similar-pairs-{kind}-{label}",
        )


def _layers(run: Run, *, kind: str, titles: dict[str, str]) -> None:
    st.subheader("Over the layers", anchor=False)
    frame = data.frame(frames.redundancy, run).filter(pl.col("kind") == kind)
    counts = frame.select("above_50", "above_70", "above_90").sum().row(0)
    known = len(frame["chance"].drop_nulls()) > 0
    chance = " Below the dotted line pairs are as random as vectors drawn by lot." if known else ""
    chart.show(
        figures.redundancy_band(frame, title=f"{_title(titles[kind])} of all pairs", theme=state.theme()),
        frame,
        key=f"redundancy-{kind}",
        read="A band far above 0 means that all experts of a layer share something; single pairs far above the band "
        f"are redundant.{chance}",
        rests_on=f"Pairs above 0.5: {counts[0]:,}; above 0.7: {counts[1]:,}; above 0.9: {counts[2]:,}.",
        alt=f"Band over the layers: {titles[kind]} of pairs of experts",
    )


def _agreement(run: Run, *, label: str, kinds: tuple[str, str], titles: dict[str, str]) -> None:
    st.subheader("Do the kinds agree?", anchor=False)
    frame = data.frame(frames.agreement, run)
    if frame.is_empty():
        if data.frame(frames.kinds, run).filter(pl.col("here") & ~pl.col("part")).height < 2:
            st.write("This run has one kind of similarity only: there is nothing to compare it with.")
        else:
            header.not_yet("How far the kinds of similarity agree", run)
        return
    of_layer = frame.filter(pl.col("label") == label)
    both = frame.filter(pl.col("first").is_in(kinds) & pl.col("second").is_in(kinds))
    chart.show(
        figures.agreement_map(
            of_layer, titles, title=f"Agreement of the kinds, layer {safe(label)}", theme=state.theme()
        ),
        of_layer,
        key=f"agreement-{label}",
        read="Blue: both kinds find the same pairs alike. In brackets: no more than when the experts of one kind "
        "are renamed at random.",
        rests_on="Spearman's rank correlation over pairs of experts.",
        alt="Map of kinds by kinds: rank correlation of the similarities of pairs",
    )
    chart.show(
        figures.agreement_curve(
            both, title=f"Agreement of {titles[kinds[0]]} and {titles[kinds[1]]}", theme=state.theme()
        ),
        both,
        key=f"agreement-{kinds[0]}-{kinds[1]}",
        read="Above the band, one kind can stand in for the other when experts are grouped. Inside it, what one "
        "calls alike is chance to the other.",
        rests_on="499 renamings of the experts (Mantel test).",
        alt="Curve over the layers: rank correlation of two kinds, with the band of renamed experts",
    )


def _missing(run: Run, known: pl.DataFrame) -> None:
    """What the other kinds need."""
    lacking = known.filter(~pl.col("here"))
    if lacking.is_empty():
        return
    with st.expander("Kinds that this run has not", icon=":material/layers:"):
        for level, part in lacking.group_by("level", maintain_order=True):
            reason = part["missing"].drop_nulls()
            why = state.plain(reason[0], 300) if len(reason) else f"level `{level[0]}`"
            st.markdown(f"- {', '.join(part['title'])}: {why}")


def _nothing(run: Run, known: pl.DataFrame) -> None:
    """An empty state with the reason."""
    reasons = known["missing"].drop_nulls().unique(maintain_order=True).to_list()
    if run.live:
        st.info("No similarity has been recorded yet.", icon=":material/hourglass_top:")
    elif reasons:
        st.info(
            f"This run cannot say which experts are alike: {state.plain(reasons[0], 300)}", icon=":material/layers:"
        )
    else:
        header.needs_level("Similarity of experts", "similarity", run)


def _title(text: str) -> str:
    return text[0].upper() + text[1:]


if __name__ == "__main__":
    render(page)
