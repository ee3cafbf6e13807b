"""Pages of a long list or text: which one is shown is in the address."""

from __future__ import annotations

import streamlit as st


def pager(count: int, *, key: str) -> int:
    """The chosen page, from 1; no widget where there is one page. What the address asks for beyond them reads as 1."""
    if count < 2:
        return 1
    held = st.session_state.get(key)
    if held is not None and not (isinstance(held, int) and 1 <= held <= count):
        del st.session_state[key]
    chosen = st.pagination(count, key=key, bind="query-params")
    return int(chosen) if 1 <= chosen <= count else 1
