"""A way to serve as a plan, and as files of the engines that execute it, with what each of them cannot say."""

from __future__ import annotations

from typing import Any

import streamlit as st

import store
from app import data, state
from app.components import chart, engine_file
from app.frames import caching as frames
from compressor.plan import Plan
from moescope.errors import MoescopeError
from planner.cache.study import Study
from store import Run


def section(run: Run, found: Study, asked: dict[str, Any]) -> None:
    """Draw the section. asked: of :func:`app.frames.caching.answer`."""
    titles = {one.name: frames.short(one) for one in found.ways}
    way = state.choose(
        "The plan of", list(titles), key="plan-of", words=titles.__getitem__, help="The fastest comes first."
    )
    try:
        with st.spinner("Planning"):
            plan = data.made(frames.plan, run, way=way, **asked)
    except MoescopeError as error:
        st.info(f"No plan for this way: {state.plain(str(error), 400)}", icon=":material/block:")
        return
    _plan(run, plan)
    engine_file.every("cache", plan)
    st.caption("The same in a terminal:")
    st.code(frames.commands(run, **asked), language="bash")


def _plan(run: Run, plan: Plan) -> None:
    with st.container(horizontal=True, gap="small", vertical_alignment="center"):
        if st.button("Keep beside the run", icon=":material/save:", key="keep-cache-plan"):
            try:
                st.toast(f"Kept as {state.plain(store.write_plan(run.path, plan.text()).name)}", icon=":material/save:")
            except MoescopeError as error:
                st.error(state.plain(str(error), 300))
        st.download_button(
            "Download JSON", plan.text(), f"{chart.file_name('cache-plan')}.json", "application/json",
            key="download-cache-plan", icon=":material/download:", on_click="ignore",
        )  # fmt: skip
        st.caption(f"Plan {plan.digest[:12]}; the same run and the same choice give the same bytes.")
