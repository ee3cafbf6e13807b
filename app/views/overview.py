"""Overview: can the run be trusted, what is in it, what needs attention, and where to look next."""

from __future__ import annotations

import polars as pl
import streamlit as st

from app import data, state
from app.components import chart, coverage, header
from app.components.page import render
from app.figures import curves
from app.frames import alerts, domains, load, overview
from app.views import PAGES
from store import Run

_ICONS = {
    "problem": ("red", ":material/error:"),
    "warning": ("orange", ":material/warning:"),
    "note": ("gray", ":material/info:"),
}


def page(run: Run) -> None:
    """Draw the page."""
    header.title("Overview", run, what="Can this run be trusted, what is in it, and what needs attention?")
    _figures(data.frame(overview.key_figures, run))
    with st.container(border=True, gap="small"):
        _alerts(data.frame(alerts.alerts, run))
    _next(data.frame(overview.next_steps, run))
    _charts(run)
    coverage.section(run)
    _omissions(data.frame(overview.omissions, run))
    _checks(run)


def _figures(frame: pl.DataFrame) -> None:
    value = {name: (text, detail) for name, text, detail in frame.iter_rows()}
    with st.grid(5, min_column_width=150, gap="small"):
        for name in ("tokens", "sequences", "MoE layers", "experts per layer", "experts per token"):
            text, detail = value[name]
            st.metric(name, text, border=True, help=detail or None, height="stretch")
    rest = [
        (name, *value[name])
        for name in value
        if name not in ("tokens", "sequences", "MoE layers", "experts per layer", "experts per token")
    ]
    parts = [
        f"**{name}** {state.plain(text)}" + (f" ({state.plain(detail)})" if detail else "")
        for name, text, detail in rest
    ]
    st.caption(" · ".join(parts))


def _alerts(frame: pl.DataFrame) -> None:
    st.subheader("Alerts", anchor=False)
    if frame.is_empty():
        st.write(
            ":green[:material/check_circle:] Nothing needs attention: no dead expert, no collapse, no failed check."
        )
    for row in frame.head(8).iter_rows(named=True):
        colour, icon = _ICONS[row["severity"]]
        where = f" · layers {state.plain(row['layers'])}" if row["layers"] else ""
        st.markdown(f":{colour}[{icon}] **{state.plain(row['alert'])}**{where}  \n{state.plain(row['detail'], 300)}.")
    if len(frame) > 8:
        st.caption(f"{len(frame) - 8} more in the download.")
    if len(frame):
        chart.downloads(frame, None, key="alerts")


def _next(frame: pl.DataFrame) -> None:
    known = {page.title: page for page in PAGES}
    st.subheader("What to look at next", anchor=False)
    grid = st.grid(max(len(frame), 1), min_column_width=190, gap="small")
    for row in frame.iter_rows(named=True):
        target = known[row["page"]]
        with grid, st.container(border=True, gap=None, height="stretch"):
            if target.url == PAGES[0].url:
                st.markdown(f"**{row['page']}**")
            else:
                st.page_link(target.file, label=f"**{row['page']}**", icon=target.icon)
            st.caption(state.plain(row["reason"], 300))


def _charts(run: Run) -> None:
    theme = state.theme()
    tokens, reach = data.frame(domains.domain_tokens, run), data.frame(load.coverage, run)
    starved = int(reach["starved"].sum())
    with chart.pair():
        chart.show(
            curves.domain_bars(tokens, theme=theme),
            tokens,
            key="domains",
            read="Every statistic of this run can be read per domain; a domain with few tokens says little.",
            rests_on=f"{tokens['tokens'].sum():,} tokens." if len(tokens) else "",
            alt="Bars: tokens per domain of the run's text",
        )
        words = (
            f"{starved:,} experts starve: collect more text, or text that reaches them."
            if starved
            else "No expert starves."
        )
        chart.show(
            curves.coverage_band(reach, theme=theme),
            reach,
            key="coverage",
            read="Each layer's experts from the least to the most used. Experts below the dashed line, a tenth of "
            f"the balanced load, have too few tokens to be judged or calibrated. {words}",
            alt="Bands: fewest, middle and most tokens per expert in every MoE layer",
        )


def _omissions(frame: pl.DataFrame) -> None:
    """What the source of an imported run cannot say."""
    if frame.is_empty():
        return
    with st.expander(f"What this source cannot say: {', '.join(frame['subject'])}", icon=":material/visibility_off:"):
        for subject, reason in frame.iter_rows():
            st.markdown(f"**{state.plain(subject)}**: {state.plain(reason, 300)}")


def _checks(run: Run) -> None:
    frame = data.frame(overview.check_summary, run)
    bad = run.badge.status in ("invalid", "warning")
    with st.expander(
        f"Self-checks of the capture: {state.plain(run.badge.reason, 200)}", expanded=bad, icon=":material/fact_check:"
    ):
        if frame.is_empty():
            st.write(
                "This run recorded no check." if not run.live else "The checks are published with the first shards."
            )
            return
        st.dataframe(
            frame,
            hide_index=True,
            alt="Table of the run's self-checks",
            column_config={
                "status": st.column_config.TextColumn("status", width="small"),
                "name": st.column_config.TextColumn("check", width="medium"),
                "places": st.column_config.NumberColumn(
                    "layers", help="rows of the table of checks: usually one per layer"
                ),
                "value": st.column_config.NumberColumn("largest value", format="%.3g"),
                "tolerance": st.column_config.NumberColumn("allowed", format="%.3g"),
                "detail": st.column_config.TextColumn("what it means", width="large"),
            },
        )
        chart.downloads(data.frame(overview.checks, run), None, key="checks")


if __name__ == "__main__":
    render(page)
