"""What can be done with the plan on the page Compress: keep it, take it along, follow it in the background."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import Any

import streamlit as st

import store
from app import jobs, state
from app.components import chart, compress_export
from app.job_paths import checked_destination, checked_source, checked_texts
from app.text import duration, from_here
from compressor.plan import Plan
from moescope.errors import MoescopeError
from store import Run

LOOK_EVERY = 1.0
"""Seconds between two looks at a job that runs."""

_LOOKS = {
    "running": ("running", "blue", ":material/sync:"),
    "done": ("done", "green", ":material/check_circle:"),
    "failed": ("failed", "red", ":material/error:"),
    "stopped": ("stopped", "orange", ":material/pause_circle:"),
    "lost": ("gone without a word", "red", ":material/help:"),
    "elsewhere": ("on another machine", "gray", ":material/dns:"),
}

_OPTIONS = (
    "preset",
    "share",
    "memory",
    "quantizer",
    "other_weights",
    "domains",
    "form",
    "guard",
    "engine",
    "allow_invalid",
)
_DOES = {"apply": "applying", "evaluate": "measuring", "recommend": "pricing and measuring", "sweep": "measuring"}


def section(run: Run, plan: Plan, asked: dict[str, Any]) -> None:
    """Keep and download the plan; the commands for a terminal; apply it from here.

    Args:
        run: the plan's run.
        plan: the plan.
        asked: arguments of ``planner.make`` that give it; empty where a search found it.
    """
    with st.container(horizontal=True, gap="small", vertical_alignment="center"):
        if st.button("Keep beside the run", icon=":material/save:", key="keep-plan"):
            _keep(run, plan)
        st.download_button(
            "Download JSON", plan.text(), f"{chart.file_name('plan')}.json", "application/json",
            key="download-plan", icon=":material/download:", on_click="ignore",
        )  # fmt: skip
        st.caption(f"Plan {plan.digest[:12]}; the same run and the same choice give the same bytes.")
    compress_export.section(plan)
    st.caption("The same in a terminal:")
    st.code(commands(run, asked), language="bash")
    with st.expander("Apply it from here, in the background", icon=":material/rocket_launch:"):
        _form(run, plan)


def commands(run: Run, asked: dict[str, Any]) -> str:
    """The commands that do the same in a terminal, from the folder that the dashboard was started in."""
    target, store = shlex.quote(from_here(run.path)), shlex.quote(from_here(run.path.parent))
    return (
        f"{_planning(target, asked)}\n"
        f"moescope apply plan.json MODEL -o SMALLER --store {store}\n"
        f"moescope evaluate SMALLER --against MODEL --data HELD-OUT --beside {target}"
    )


def _planning(target: str, asked: dict[str, Any]) -> str:
    """The command that makes the plan; for one that a search found, where the plan is to be had."""
    if not asked:
        return "# plan.json: Download JSON, above"
    words = [f"--preset {asked['preset']}"]
    words += [f"--share {asked['share']:g}"] if "share" in asked else []
    words += [f"--memory {asked['memory']}"] if "memory" in asked else []
    words += [f"--other-weights {asked['other_weights']}"] if "other_weights" in asked else []
    words += [f"--quantizer {asked['quantizer']}"] if asked.get("quantizer") else []
    words += [f"--engine {asked['engine']}"] if asked.get("engine") else []
    if asked.get("domains"):
        words.append(f"--domains {shlex.quote(','.join(asked['domains']))}")
    words += [f"--form {asked['form']}"] if asked.get("form") else []
    words += ["--no-guard"] if not asked.get("guard", True) else []
    words += ["--allow-invalid"] if asked.get("allow_invalid") else []
    settings = {name: value for name, value in asked.items() if name not in _OPTIONS}
    words += [f"--set {name}={shlex.quote(json.dumps(value))}" for name, value in settings.items()]
    return f"moescope plan {target} {' '.join(words)} -o plan.json"


def running_jobs(run: Run) -> None:
    """The jobs beside the run, with progress and a button to stop; looked at again while one runs."""
    found = jobs.jobs(run.path)
    if not found:
        return
    active = any(jobs.status(job).state == "running" for job in found)
    st.fragment(_jobs, run_every=LOOK_EVERY if active else None)(str(run.path), active)


def _keep(run: Run, plan: Plan) -> None:
    try:
        path = store.write_plan(run.path, plan.text())
    except MoescopeError as error:
        st.error(state.plain(str(error), 300))
        return
    st.toast(f"Kept as {state.plain(path.name)}", icon=":material/save:")


def _form(run: Run, plan: Plan) -> None:
    st.caption(
        "The new checkpoint is written by a process of its own, which goes on when this page is closed. Paths are "
        "those of the machine that the dashboard runs on."
    )
    with st.form("apply", border=False):
        source = st.text_input("Folder of the checkpoint", key="apply-source", placeholder=plan.source.model)
        destination = st.text_input("Folder of the new checkpoint, which must not exist", key="apply-destination")
        texts = st.text_area(
            "Held-out text to measure it on afterwards: files or folders, one per line; empty = do not measure",
            key="apply-texts", height=80,
        )  # fmt: skip
        pressed = st.form_submit_button("Apply", icon=":material/play_arrow:")
    if pressed:
        _start(run, plan, source or "", destination or "", texts or "")


def _start(run: Run, plan: Plan, source: str, destination: str, texts: str) -> None:
    try:
        job = jobs.start(
            run.path,
            plan=store.write_plan(run.path, plan.text()),
            digest=plan.digest,
            source=checked_source(plan, source),
            destination=checked_destination(destination),
            held_out=checked_texts(texts),
        )
    except MoescopeError as error:
        st.error(state.plain(str(error), 400))
        return
    st.success(f"Started, process {job.pid}.")


def _jobs(path: str, was_active: bool) -> None:
    run = Path(path)
    found = [(job, jobs.status(job)) for job in jobs.jobs(run)]
    active = any(status.state == "running" for _, status in found)
    if was_active and not active:
        st.rerun(scope="app")  # measured results may have come
    for job, status in found[:8]:
        _job(job, status)


def _job(job: jobs.Job, status: jobs.Status) -> None:
    label, colour, icon = _LOOKS[status.state]
    with st.container(border=True, gap="xsmall"):
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            st.badge(label, color=colour, icon=icon)  # type: ignore[arg-type]
            what = _DOES.get(status.command, "working")
            ran = f", {what} since {duration(max(0.0, time.time() - job.started))}" if status.state == "running" else ""
            named = state.plain(job.title) or f"{state.code(Path(job.plan).stem)} → {state.code(job.destination)}"
            st.markdown(f"{named}{ran}")
            if status.state == "running" and st.button("Stop", icon=":material/stop:", key=f"stop-{job.name}"):
                _stop(job)
            again = {"stopped": "Go on", "lost": "Go on", "failed": "Try again"}.get(status.state)
            if again and st.button(again, icon=":material/play_arrow:", key=f"go-on-{job.name}"):
                _go_on(job)
        if status.state == "running":
            st.progress(status.share or 0.0, text=state.plain(status.words or "starting", 160))
        elif status.words:
            st.caption(state.plain(status.words, 300))
        if status.state in ("failed", "lost"):
            with st.expander("What it printed"):
                st.code(status.log or "nothing", language=None)


def _stop(job: jobs.Job) -> None:
    try:
        jobs.stop(job)
    except MoescopeError as error:
        st.error(state.plain(str(error), 300))


def _go_on(job: jobs.Job) -> None:
    try:
        jobs.again(job)
    except MoescopeError as error:
        st.error(state.plain(str(error), 300))
        return
    st.rerun(scope="app")
