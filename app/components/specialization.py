"""A section on what experts are for: domains or tokens, beside controls, and against local routing."""

from __future__ import annotations

import polars as pl
import streamlit as st

from app import data, state
from app.components import chart, header
from app.figures import specialization as figures
from app.frames import specialization as frames
from store import Run

_UNITS = {
    ("domain", "expert"): "spread over domains / mean",
    ("domain", "largest"): "largest share of a domain",
    ("", "expert"): "share of an expert's own tokens",
    ("", "largest"): "largest share of a token id",
}
_READ = {
    ("domain", "expert"): "0: the expert takes the same share of every domain. Mean over the experts of a layer.",
    ("domain", "largest"): "The share of a domain's tokens that its busiest expert takes, averaged over domains.",
    ("", "expert"): "Of the token ids whose first choice an expert mostly is: the part that goes to it. Ids with 20 "
    "occurrences or more.",
    ("", "largest"): "The part of a token id's occurrences that goes to its busiest expert, averaged over ids with 10 "
    "occurrences or more.",
}


def section(run: Run) -> None:
    """Specialization over the layers, and SRP against it; or why the run says nothing of them."""
    st.subheader("What are experts for?", anchor=False)
    known = data.frame(frames.specialization, run)
    here = [kind for kind in frames.KINDS if kind in known["kind"].to_list()]
    if not here:
        _nothing(run)
        return
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        kind = state.choose("Experts for", here, key="for", words=frames.KINDS.__getitem__, segmented=True)
        form = state.choose(
            "Form", list(frames.FORMS), key="form", words=frames.FORMS.__getitem__, segmented=True,
            help="Per expert: the paper on local routing. Largest share: OLMoE.",
        )  # fmt: skip
    which = ("domain" if kind == "domain" else "", form)
    frame = known.filter((pl.col("kind") == kind) & (pl.col("form") == form))
    frame = frame.filter(pl.col("at").is_null() | (pl.col("at") >= 10))  # rarer ids say little
    with chart.pair():
        rest = frame.select("tokens", "sequences").drop_nulls("tokens").head(1).rows()
        tokens, sequences = rest[0] if rest else (0, None)
        chart.show(
            figures.layer_curve(
                frame, title=f"Specialization in {frames.KINDS[kind]}", y=_UNITS[which], theme=state.theme()
            ),
            frame,
            key=f"specialization-{kind}-{form}",
            read=f"{_READ[which]} Only what lies above the dotted line is specialization.",
            rests_on=f"{tokens:,} tokens" + (f", {sequences:,} sequences; 95 % intervals." if sequences else "."),
            alt="Curve over the layers: specialization of the experts, with controls",
        )
        _against_srp(run, kind)
    _missing(run, here)


def _against_srp(run: Run, kind: str) -> None:
    frame = data.frame(frames.experts, run, kind=kind)
    found = data.frame(frames.correlations, run).filter(pl.col("kind") == kind)
    words = "Too few experts have both figures for a correlation."
    if not found.is_empty():
        row = found.row(0, named=True)
        words = (
            f"Correlation over {len(frame):,} experts {row['value']:.2f}; experts renamed inside their layers give "
            f"{row['low']:.2f} to {row['high']:.2f}."
        )
    name = _UNITS["domain" if kind == "domain" else "", "expert"]
    chart.show(
        figures.srp_scatter(frame, title="Do specialised experts serve segments?", x=name, theme=state.theme()),
        frame,
        key=f"specialization-srp-{kind}",
        read="Points that rise to the right: experts that are for one kind of text stay in use over a segment, which "
        "a cache likes.",
        rests_on=words,
        alt="Points: SRP of every expert against its specialization",
    )


def _missing(run: Run, here: list[str]) -> None:
    """What the other kinds need."""
    if "domain" not in here:
        st.caption("Specialization in domains takes text of several domains (folders or labels).")
    if "input" not in here:
        reason = state.plain(run.omissions.get("text") or run.omissions.get("trace") or "this run keeps no text", 300)
        st.caption(f"Specialization in tokens takes the token ids of the text: {reason}")
    elif "predicted" not in here and not run.omissions:
        st.caption("Predicted tokens: level `predictions`.")


def _nothing(run: Run) -> None:
    if len(run.domains) > 1 or (run.has_trace and run.has_tokens):
        header.not_yet("Specialization", run)
    elif not header.omitted("Specialization", run, "trace", "text"):
        st.write("Specialization takes text of several domains, or its token ids; this run has neither.")
