"""A button that makes a run's report, and then offers the file."""

from __future__ import annotations

import shlex

import streamlit as st

import store
from app import data
from app.report.document import Document, Tell, compose
from app.report.html import page
from store import Run


@st.fragment
def report_button(run: Run) -> None:
    """Offer the report of a run: one HTML file that opens from disk. Making it takes some seconds."""
    key = f"report-of-{run.name}"
    made: dict[str, object] | None = st.session_state.get(key)
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        text = not run.info.text_kept or st.toggle("with text", value=True, key=f"{key}-text", help=_TEXT)
        asked = {"version": run.version, "plans": _plans(run), "text": text}
        if st.button("Make report", icon=":material/description:", key=f"{key}-make", help=_HELP):
            with st.status("Making the report", state="running") as status:
                made = asked | {"file": _file(run, text=text, tell=lambda said: status.update(label=said.capitalize()))}
                st.session_state[key] = made
                status.update(label="The report is ready", state="complete")
        if made is not None and asked.items() <= made.items():
            file = made["file"]
            assert isinstance(file, bytes)
            st.download_button(
                f"Save, {len(file) / 1e6:.1f} MB", file, f"{run.name}-report.html", "text/html", key=f"{key}-save",
                icon=":material/download:", on_click="ignore",
            )  # fmt: skip


def _plans(run: Run) -> int:
    """What changes when a document is written beside the run or taken away, of which its version says nothing."""
    try:
        return store.plan_path(run.path, "plan", "x").parent.stat().st_mtime_ns
    except OSError:
        return 0


def _file(run: Run, *, text: bool, tell: Tell) -> bytes:
    command = f"moescope report {shlex.quote(run.name)} -o report.html{'' if text else ' --no-text'}"
    document: Document
    if text:
        document = compose(run, command=command, frames=data.frame, tell=tell)
    else:
        with store.open_run(run.path, text=False) as silent:
            document = compose(silent, command=command, tell=tell)
    return page(document, tell=tell).encode()


_HELP = "One file with provenance, findings and every figure, interactive; it opens from disk and needs no network."
_TEXT = "Without it, the report holds no token of the text that the run keeps."
