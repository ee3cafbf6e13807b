"""What stands on top of every page: the title, the verdict on the capture, progress of a live run; and empty states."""

from __future__ import annotations

import streamlit as st

from app.state import code, plain
from app.text import duration
from store import Badge, Run

_BADGES = {
    "valid": ("capture valid", "green", ":material/verified:"),
    "warning": ("capture doubtful", "orange", ":material/warning:"),
    "invalid": ("capture invalid", "red", ":material/error:"),
    "unchecked": ("capture unchecked", "gray", ":material/help:"),
}


def title(name: str, run: Run, *, what: str) -> None:
    """The page's title with the run's name and badge, and one sentence on what the page answers."""
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.title(name, anchor=False, width="content")
        badge(run.badge)
        if run.live:
            st.badge("collecting", color="blue", icon=":material/sync:")
    st.caption(what)
    if run.badge.status in ("invalid", "warning"):
        show = st.error if run.badge.status == "invalid" else st.warning
        show(plain(run.badge.reason, 300))
    for sentence in run.unreadable:
        st.warning(plain(sentence, 300))
    if run.live:
        progress(run)


def badge(verdict: Badge) -> None:
    """The verdict of the run's self-checks; hover for the reasons."""
    label, colour, icon = _BADGES[verdict.status]
    st.badge(label, color=colour, icon=icon, help=plain("; ".join(verdict.reasons) or verdict.reason, 600))  # type: ignore[arg-type]


def progress(run: Run) -> None:
    """How far a live run is."""
    done = run.progress
    if done is None:
        st.info(
            "The collection is starting; the first numbers appear with its first shard.",
            icon=":material/hourglass_top:",
        )
        return
    if done.state in ("interrupted", "failed"):
        st.warning(
            f"The collection has {'ended early' if done.state == 'interrupted' else 'failed'}: "
            f"{plain(done.detail or 'no detail', 200)}. What it published is shown. Continue it with `moescope "
            "collect ... --resume`."
        )
        return
    share = min(done.tokens / done.token_budget, 1.0) if done.token_budget else 0.0
    budget = f" of {done.token_budget:,}" if done.token_budget else ""
    text = (
        f"{done.tokens:,}{budget} tokens · {done.tokens_per_second:,.0f} tokens/s · {duration(done.seconds_left)} left"
    )
    st.progress(share, text="compacting the shards into one file" if done.state == "compacting" else text)


def closed_store(reason: str, title: str = "The store cannot be read") -> None:
    """The page of a store that cannot be read, or of a run in one."""
    st.title(title, anchor=False)
    st.error(plain(reason, 300))
    if st.button("Look again", icon=":material/refresh:"):
        st.rerun()


def empty_store(directories: list[str]) -> None:
    """The page of a store without runs: what to do next."""
    st.title("No runs yet", anchor=False)
    where = ", ".join(code(name) for name in directories)
    st.write(f"The store {where} is empty. A run appears here as soon as its collection starts.")
    st.markdown("**See something at once**: profile the small model that comes with moescope.")
    st.code("moescope demo", language="bash")
    st.markdown("**Profile your own model** on your own text (a folder, JSONL, Parquet or plain text files).")
    st.code("moescope collect MODEL --data PATH", language="bash")
    st.markdown("**Ask first** what a collection would take.")
    st.code("moescope inspect MODEL", language="bash")
    if st.button("Look again", icon=":material/refresh:"):
        st.rerun()
