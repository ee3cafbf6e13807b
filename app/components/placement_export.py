"""A placement as files of engines, with what each of them cannot say, and the command that makes it."""

from __future__ import annotations

import shlex
from typing import Any

import streamlit as st

from app.components import chart, engine_file
from app.frames.placement import Placed
from app.text import from_here
from planner.placing import BATCH
from store import Run


def section(run: Run, found: Placed, asked: dict[str, Any]) -> None:
    """Draw the section."""
    engine_file.every("place", found.plan)
    with st.container(horizontal=True, gap="small", vertical_alignment="center"):
        st.download_button(
            "Plan of moescope", found.plan.text(), f"{chart.file_name('placement')}.json", "application/json",
            key="export-plan", icon=":material/download:", on_click="ignore",
        )  # fmt: skip
        st.caption("For moescope export, and as a record of what this rests on.")
    st.caption("The same from a terminal, where the plan is kept beside the run:")
    st.code(command(run, asked), language="bash")


def command(run: Run, asked: dict[str, Any]) -> str:
    """The command that makes the placement of the page; of the whole trace."""
    words = ["moescope", "place", from_here(run.path), "--devices", str(asked["devices"]), "--method", asked["method"]]
    for name, default in (("nodes", 1), ("redundant", 0), ("batch", BATCH)):
        if asked.get(name, default) != default:
            words += [f"--{name}", str(asked[name])]
    if asked.get("domains"):
        words += ["--domains", ",".join(asked["domains"])]
    for name, value in asked.get("options", ()):
        words += ["--option", f"{name}={value:g}"]
    if asked.get("allow_invalid"):
        words.append("--allow-invalid")
    return shlex.join(words)
