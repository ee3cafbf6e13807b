"""The frame around every page: which run, errors as sentences, and refreshing while a run grows."""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st

from app import data, focus, state
from app.components import header
from moescope.errors import MoescopeError
from store import Run

REFRESH_SECONDS = 2.0


def render(body: Callable[[Run], None]) -> None:
    """Draw a page for the chosen run; while it is collected, draw again every two seconds."""
    entries = data.entries()
    name = st.session_state.get("run")
    entry = entries.get(name) if name is not None else None
    if entry is None:
        _gone(name)
        return
    st.fragment(_guarded, run_every=REFRESH_SECONDS if entry.live else None)(body, entry.name, entry.live)


def _guarded(body: Callable[[Run], None], name: str, was_live: bool) -> None:
    """One drawing of the page; what can go wrong with a file becomes a sentence."""
    if focus.moved():
        st.rerun(scope="app")
    entry = data.entries().get(name)
    if entry is None:
        _gone(name)
        return
    if was_live and not entry.live:
        st.rerun(scope="app")
    try:
        body(data.open_run(entry.path))
    except MoescopeError as error:
        if name not in data.entries():
            _gone(name)
            return
        st.error(f"The run cannot be read: {state.plain(str(error), 300)}")
        st.button("Try again", icon=":material/refresh:", key="try-again")


def _gone(name: str | None) -> None:
    st.warning(
        f"The run {state.code(str(name))} is no longer in the store: renamed or deleted. Choose another one in the "
        "sidebar."
    )
    st.button("Look again", icon=":material/refresh:", key="look-again")
    with st.expander("Which folders are read?"):
        st.write(", ".join(state.code(str(path)) for path in data.store_directories()))


__all__ = ["header", "render"]
