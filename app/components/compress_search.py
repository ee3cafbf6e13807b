"""The longer way to an advice, in the background: all methods, and finalists that are measured on the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import streamlit as st

from app import jobs, state
from app.frames import compress_curve as frames
from app.job_paths import checked_source, checked_texts
from app.text import from_here, size
from moescope.errors import MoescopeError
from planner.recommendation import Candidate, Recommendation
from store import Run


def form(run: Run, found: Recommendation, best: Candidate | None, asked: dict[str, Any]) -> None:
    """A button that prices all methods, and a form that measures the best ones too."""
    budget = frames.budget_of(run, found)
    with st.container(horizontal=True, gap="small", vertical_alignment="center"):
        if st.button("Price all methods", icon=":material/query_stats:", key="all-methods"):
            _start(run, budget, asked)
        st.caption("All presets and mixtures, at this budget and at ten sizes; a minute or more, in the background.")
    if best is None:
        return
    with st.expander("Measure the finalists on the model, in the background", icon=":material/straighten:"):
        st.caption(
            "Some plans are tried on the model in memory to correct the predictions, then the best ones are measured, "
            "and a search goes on from them. Nothing is written but the recommendation. In a terminal:"
        )
        st.code(
            f"moescope recommend {from_here(run.path)} MODEL --memory SIZE --data CALIBRATION-TEXT", language="bash"
        )
        with st.form("measure", border=False):
            source = st.text_input("Folder of the checkpoint", key="measure-source", placeholder=best.plan.source.model)
            texts = st.text_area("Text to measure on: files or folders, one per line", key="measure-texts", height=80)
            pressed = st.form_submit_button("Measure finalists", icon=":material/play_arrow:")
        if pressed:
            _measure(run, budget, best, asked, source or "", texts or "")


def options(asked: dict[str, Any]) -> list[str]:
    """What was asked, as arguments of ``moescope recommend``."""
    found = ["--domains", ",".join(asked["domains"])] if asked.get("domains") else []
    found += ["--engine", asked["engine"]] if asked.get("engine") else []
    found += ["--no-guard"] if not asked.get("guard", True) else []
    return found + (["--allow-invalid"] if asked.get("allow_invalid") else [])


def _start(run: Run, budget: int, asked: dict[str, Any]) -> None:
    try:
        job = jobs.recommend(
            run.path, memory=budget, title=f"all methods for {size(budget)}", options=options(asked), curve=True
        )
    except MoescopeError as error:
        st.error(state.plain(str(error), 400))
        return
    st.success(f"Started, process {job.pid}.")


def _measure(run: Run, budget: int, best: Candidate, asked: dict[str, Any], source: str, texts: str) -> None:
    from app.whole_model import whole_model

    try:
        folder: Path = checked_source(best.plan, source)
        found = checked_texts(texts)
        if not found:
            st.error("Plans are measured on text: name files or folders, one per line.")
            return
        other, _ = whole_model(run, str(folder))
        job = jobs.recommend(
            run.path, memory=budget + other, title=f"measuring finalists for {size(budget)}", options=options(asked),
            source=folder, texts=found,
        )  # fmt: skip
    except MoescopeError as error:
        st.error(state.plain(str(error), 400))
        return
    st.success(f"Started, process {job.pid}.")
