"""Which part of a long sequence is shown: chosen, in the address, and moved to where the kept token is."""

from __future__ import annotations

import streamlit as st

from app.frames import tokens


def token_part(length: int, sequence: int, selected: int | None) -> int:
    """The first token that is shown: of the chosen part, or of the part with the kept token where that has moved."""
    count = max(-(-length // tokens.PART), 1)
    held, seen = st.session_state, st.session_state.get("tokens-seen")
    held["tokens-seen"] = now = (held.get("run"), sequence, selected)
    if seen != now and selected is not None:
        held["part"] = selected // tokens.PART + 1
    elif seen is not None and seen[:2] != now[:2]:
        held["part"] = 1
    if count < 2:
        return 0
    if held.get("part") is None:
        if "part" not in st.query_params:
            held["part"] = 1
    elif not (isinstance(held["part"], int) and 1 <= held["part"] <= count):
        held["part"] = 1
    with st.container(horizontal=True, gap="small", vertical_alignment="center"):
        st.caption("Part", width="content")
        part = st.number_input(
            "Part", 1, count, None, step=1, key="part", bind="query-params", width=130, label_visibility="collapsed"
        )  # fmt: skip
        first = ((part or 1) - 1) * tokens.PART
        last = min(first + tokens.PART, length) - 1
        st.caption(f"of {count} · tokens {first:,} to {last:,} of {length:,}", width="content")
    return first
