"""Overview: can the run be trusted, what does it say, what needs attention, and where to look next."""

from __future__ import annotations

from functools import partial

import polars as pl
import streamlit as st

from app import data, state
from app.components import chart, coverage, header, table
from app.components.go import go
from app.components.page import render
from app.components.sections import sections
from app.components.table import Column
from app.exhibits import coverage as exhibits
from app.findings import findings
from app.findings.finding import Finding
from app.frames import alerts, overview
from app.views import PAGES
from store import Run

_ICONS = {
    "problem": ("red", ":material/error:"),
    "warning": ("orange", ":material/warning:"),
    "note": ("gray", ":material/info:"),
}
_FIRST = ("tokens", "sequences", "MoE layers", "experts per layer", "experts per token")
MOST_ALERTS = 5


def page(run: Run) -> None:
    """Draw the page."""
    header.title("Overview", run, what="Can this run be trusted, what does it say, and what needs attention?")
    drawers = {"Summary": _summary, "Text": _text, "Rankings": coverage.rankings, "Scores": coverage.scores}
    sections({name: partial(draw, run) for name, draw in {**drawers, "Checks": _checks}.items()})


def _summary(run: Run) -> None:
    figures = data.frame(overview.key_figures, run)
    value = {name: (text, detail) for name, text, detail in figures.iter_rows()}
    with st.grid(len(_FIRST), min_column_width=130, gap="small"):
        for name in _FIRST:
            text, detail = value[name]
            st.metric(name, text, border=True, help=detail or None, height="stretch")
    with st.container(border=True, gap="xsmall"):
        _findings(data.made(_headlines, run), run)
    with st.grid(2, min_column_width=380, gap="small"):
        with st.container(border=True, gap="xsmall", height="stretch"):
            _alerts(data.frame(alerts.alerts, run))
            missing = data.frame(overview.omissions, run)["subject"].to_list()
            if missing:
                st.caption(f"What this source cannot say: {state.plain(', '.join(missing), 200)}. Why: section Checks.")
        with st.container(border=True, gap="xsmall", height="stretch"):
            _next(data.frame(overview.next_steps, run))


def _headlines(run: Run) -> list[Finding]:
    return findings.headlines(run, frames=data.frame)


def _findings(found: list[Finding], run: Run) -> None:
    _heading("What this run says", findings.as_frame(found), key="findings")
    if not found:
        st.caption("Nothing yet: findings come with the first shards." if run.live else "Nothing was counted.")
    for one in found:
        with st.container(horizontal=True, wrap=False, vertical_alignment="center", gap="small"):
            evidence = f" · {state.plain(one.evidence[0].line, 300)}" if one.evidence else ""
            st.markdown(f":small[**{state.plain(one.answer, 200)}**{evidence}]", width="stretch")
            if one.page != "Overview":
                target = next(page for page in PAGES if page.title == one.page)
                go(one.page, target.file, icon=target.icon, layer=one.layer, expert=one.expert)


def _heading(words: str, frame: pl.DataFrame, *, key: str) -> None:
    """A heading with the download of what stands below it."""
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.markdown(f"**{words}**", width="stretch")
        if len(frame):
            chart.downloads(frame, None, key=key)


def _alerts(frame: pl.DataFrame) -> None:
    _heading("Alerts", frame, key="alerts")
    if frame.is_empty():
        st.write(
            ":green[:material/check_circle:] Nothing needs attention: no dead expert, no collapse, no failed check."
        )
    for row in frame.head(MOST_ALERTS).iter_rows(named=True):
        colour, icon = _ICONS[row["severity"]]
        where = f" · layers {state.plain(row['layers'])}" if row["layers"] else ""
        detail = state.plain(row["detail"], 300)
        st.markdown(f":{colour}[{icon}] :small[**{state.plain(row['alert'])}**{where}: {detail}]")
    if len(frame) > MOST_ALERTS:
        st.caption(f"{len(frame) - MOST_ALERTS} more in the download.")


def _next(frame: pl.DataFrame) -> None:
    known = {page.title: page for page in PAGES}
    st.markdown("**What to look at next**")
    for row in frame.iter_rows(named=True):
        target = known[row["page"]]
        with st.container(horizontal=True, wrap=False, vertical_alignment="center", gap="small"):
            if target.url == PAGES[0].url:
                st.markdown(f"**{row['page']}**", width="content")
            else:
                st.page_link(target.file, label=row["page"], icon=target.icon, width="content")
            st.caption(state.plain(row["reason"], 300), width="stretch")


def _text(run: Run) -> None:
    with chart.pair():
        chart.exhibit(exhibits.text, run, key="domains")
        chart.exhibit(exhibits.reach, run, key="coverage")


def _checks(run: Run) -> None:
    st.markdown(f"**{state.plain(run.badge.reason, 300)}**")
    summary = data.frame(overview.check_summary, run)
    if summary.is_empty():
        st.write("This run recorded no check." if not run.live else "The checks are published with the first shards.")
    else:
        table.show(
            summary,
            key="checks",
            alt="Table of the run's self-checks",
            read="What the profiler proved about its own capture; failures stand first.",
            columns={
                "status": Column("status", "text", width=60),
                "name": Column("check", "text", width=140),
                "places": Column("places", "count", "rows of the table of checks: usually one per layer", width=62),
                "value": Column("worst", "figure", "the largest value", width=90),
                "tolerance": Column("allowed", "figure", width=86),
                "detail": Column("what it means, at the worst place", "text", width=500),
            },
        )
    missing = data.frame(overview.omissions, run)
    if len(missing):
        st.subheader("What this source cannot say", anchor=False)
        for subject, reason in missing.iter_rows():
            st.markdown(f"**{state.plain(subject)}**: {state.plain(reason, 300)}")
    st.subheader("How it was recorded", anchor=False)
    figures = data.frame(overview.key_figures, run).filter(~pl.col("figure").is_in(_FIRST))
    table.show(
        figures,
        key="provenance",
        alt="Model, types, levels and completeness of the run",
        columns={"figure": Column("figure", "text", width=130), "value": Column("value", "text", width=520)},
    )


if __name__ == "__main__":
    render(page)
