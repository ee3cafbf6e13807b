"""The frame around every page: which run, errors as sentences, and refreshing while a run grows."""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st

from app import data, focus, state
from app.components import header
from moescope.errors import InputError, MoescopeError
from store import Entry, Run, shown

REFRESH_SECONDS = 2.0


def render(body: Callable[[Run], None]) -> None:
    """Draw a page for the chosen run; while it is collected, draw again every two seconds."""
    name = st.session_state.get("run")
    entry = _found(name)
    if entry is None:
        _gone(name)
        return
    st.fragment(_guarded, run_every=REFRESH_SECONDS if entry.live else None)(body, entry.name, entry.live)


def _guarded(body: Callable[[Run], None], name: str, was_live: bool) -> None:
    """One drawing of the page; what can go wrong with a file becomes a sentence."""
    if focus.moved():
        st.rerun(scope="app")
    entry = _found(name)
    if entry is None:
        _gone(name)
        return
    if was_live and not entry.live:
        st.rerun(scope="app")
    try:
        body(data.open_run(entry.path))
    except (MoescopeError, OSError) as error:  # a file may go at any moment
        after = _found(name)
        if after is None:
            _gone(name)
            return
        if after.path != entry.path:  # finished while it was read
            st.rerun(scope="app")
        st.error(f"The run cannot be read: {state.plain(str(error), 300)}")
        st.button("Try again", icon=":material/refresh:", key="try-again")


def _found(name: str | None) -> Entry | None:
    """The run of that name, if it is there, in a store that can be read."""
    try:
        return data.entries().get(name) if name is not None else None
    except InputError:
        return None


def _gone(name: str | None) -> None:
    st.warning(
        f"The run {state.code(str(name))} is no longer in the store: renamed or deleted. Choose another one in the "
        "sidebar."
    )
    st.button("Look again", icon=":material/refresh:", key="look-again")
    with st.expander("Which folders are read?"):
        st.write(", ".join(state.code(shown(path)) for path in data.store_directories()))


__all__ = ["header", "render"]
