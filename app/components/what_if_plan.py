"""A plan that changes routing: kept, taken along, and tried on the model in the background."""

from __future__ import annotations

import json
import shlex
from typing import Any

import polars as pl
import streamlit as st

import store
from app import data, jobs, state
from app.components import chart, compress_apply
from app.frames import sweep as sweep_frames
from app.frames import what_if_plan
from app.frames.axes import layer_label
from app.job_paths import checked_source, checked_texts
from app.text import from_here
from compressor.plan import Plan
from moescope.errors import MoescopeError
from store import Run


def section(run: Run, key: str, **asked: Any) -> None:
    """Draw the plan of a rule or of biases, or say why there is none.

    Args:
        key: unique on the page.
        asked: as :func:`app.frames.what_if_plan.made` takes it.
    """
    unguarded = state.choose_flag(
        "Let super experts lose their tokens", key="unguarded", default=False,
        help="A plan that takes most tokens from a super expert is refused otherwise.",
    )  # fmt: skip
    try:
        with st.spinner("Making the plan"):
            plan: Plan = data.made(what_if_plan.made, run, guard=not unguarded, **asked)
    except MoescopeError as error:
        st.warning(f"No such plan: {state.plain(str(error), 400)}", icon=":material/block:")
        return
    with st.container(horizontal=True, gap="small", vertical_alignment="center"):
        if st.button("Keep beside the run", icon=":material/save:", key=f"keep-{key}"):
            _keep(run, plan)
        st.download_button(
            "Download plan", plan.text(), f"{chart.file_name('route')}.json", "application/json",
            key=f"download-{key}", icon=":material/download:", on_click="ignore",
        )  # fmt: skip
        if plan.route is not None and plan.route.rule == "bias":
            st.download_button(
                "Download biases", _biases(plan), f"{chart.file_name('biases')}.json", "application/json",
                key=f"biases-{key}", icon=":material/download:", on_click="ignore",
            )  # fmt: skip
        words = what_if_plan.title(plan)
        st.caption(f"Plan {plan.digest[:12]}: {state.plain(words)}. compressor\\.load and moescope apply follow it.")
    st.caption("In a terminal:")
    st.code(commands(run, plan, guard=not unguarded, limit=asked.get("limit_tokens")), language="bash")
    _measured(run, plan)
    with st.expander("Live loss: try it on the model, in the background", icon=":material/rocket_launch:"):
        _form(run, plan, key)
    compress_apply.running_jobs(run)


def commands(run: Run, plan: Plan, *, guard: bool, limit: int | None) -> str:
    """The commands that make the plan and try it on the model; the first is missing where values differ by layer,
    which only the page finds."""
    step, target = plan.route, from_here(run.path)
    assert step is not None
    sweep = f"moescope sweep MODEL --plan plan.json --data HELD-OUT --against {shlex.quote(target)}"
    if len({one.value for one in step.layers}) > 1:
        return sweep
    words = ["moescope", "route", target]
    if step.rule == "bias":
        words += ["--bias", "biases.json"]
    else:
        words += ["--rule", step.rule, "--value", f"{step.layers[0].value:.10g}", "--weights", step.weights]
    words += [] if guard else ["--no-guard"]
    words += [] if limit is None or limit >= run.info.tokens else ["--max-tokens", str(limit)]
    domain = plan.provenance.domains
    words += ["--domain", domain[0]] if len(domain) == 1 < len(run.domains) else []
    return f"{shlex.join([*words, '-o', 'plan.json'])}\n{sweep}"


def _biases(plan: Plan) -> str:
    """The biases as ``moescope route --bias`` takes them."""
    assert plan.route is not None
    return json.dumps({layer_label(one.layer, one.step): list(one.bias) for one in plan.route.layers}) + "\n"


def _keep(run: Run, plan: Plan) -> None:
    try:
        path = store.write_plan(run.path, plan.text())
    except MoescopeError as error:
        st.error(state.plain(str(error), 300))
        return
    st.toast(f"Kept as {state.plain(path.name)}", icon=":material/save:")


def _measured(run: Run, plan: Plan) -> None:
    """What sweeps beside the run say of this very plan."""
    try:
        known = sweep_frames.sweeps(run)
    except MoescopeError:  # the section Live says why
        return
    mine = known.filter((pl.col("rule") == "plan") & (pl.col("value") == plan.digest)).drop_nulls("change")
    for row in mine.iter_rows(named=True):
        st.success(
            f"Measured on the model, {row['tokens']:,} tokens: {_change(row)}.", icon=":material/science:"
        )  # fmt: skip


def _change(row: dict[str, Any]) -> str:
    """What a measured plan does to the loss, with its interval where there is one."""
    low, high = row["change_low"], row["change_high"]
    if low is None or high is None:
        return f"the loss changes by {row['change']:+.4f} nats per token; one sequence gives no interval"
    said = "it costs" if low > 0 else "it gains" if high < 0 else "no change that shows:"
    number = f"{abs(row['change']):.4f}" if low > 0 or high < 0 else f"{row['change']:+.4f}"
    return f"{said} {number} nats per token (95 % interval {low:+.4f} to {high:+.4f})"


def _form(run: Run, plan: Plan, key: str) -> None:
    st.caption("A process of its own runs the model with and without the plan; paths are those of this machine.")
    with st.form(f"live-{key}", border=False):
        source = st.text_input("Folder of the checkpoint", key=f"live-source-{key}", placeholder=plan.source.model)
        texts = st.text_area("Held-out text: files or folders, one per line", key=f"live-texts-{key}", height=80)
        pressed = st.form_submit_button("Measure", icon=":material/play_arrow:")
    if not pressed:
        return
    try:
        job = jobs.sweep(
            run.path, plan=store.write_plan(run.path, plan.text()), digest=plan.digest,
            source=checked_source(plan, source or ""), texts=checked_texts(texts or ""),
            title=f"Live loss: {what_if_plan.title(plan)}",
        )  # fmt: skip
    except MoescopeError as error:
        st.error(state.plain(str(error), 400))
        return
    st.success(f"Started, process {job.pid}.")
