"""The bar on top of every page: run > layer > expert > sequence > token, as widgets that are bound to the address."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from app import focus, state
from app.components.copy_link import copy_link
from app.frames.axes import layer_labels
from store import Run

_VIEWS = Path(__file__).parents[1] / "views"


def focus_bar(run: Run) -> None:
    """Draw the bar; every name in it is a link to the page on it."""
    focus.know(run)
    focus.follow_link()
    labels = layer_labels(run)
    if not labels:
        return
    _drop_impossible(run, labels)
    with st.container(key="focus-bar", horizontal=True, gap="xsmall", vertical_alignment="center"):
        st.page_link(str(_VIEWS / "overview.py"), label=state.plain(run.name, 40))
        _crumb("Layer", "routing")
        st.selectbox(
            "Layer", labels, index=None, placeholder="any", key="layer", bind="query-params", width=92,
            label_visibility="collapsed",
        )  # fmt: skip
        _crumb("Expert", "expert")
        experts = [str(number) for number in range(focus.experts_of(run, st.session_state.get("layer")))]
        st.selectbox(
            "Expert", experts, index=None, placeholder="any", key="expert", bind="query-params", width=92,
            label_visibility="collapsed",
        )  # fmt: skip
        if run.has_trace:
            _crumb("Sequence", "tokens")
            st.number_input(
                "Sequence", min_value=0, value=None, step=1, placeholder="any", key="sequence", bind="query-params",
                width=104, label_visibility="collapsed",
            )  # fmt: skip
            st.caption("token", width="content")
            st.number_input(
                "Token", min_value=0, value=None, step=1, placeholder="any", key="token", bind="query-params",
                width=104, label_visibility="collapsed",
            )  # fmt: skip
        st.space("stretch")
        copy_link()


def _crumb(label: str, view: str) -> None:
    st.caption("›", width="content")
    st.page_link(str(_VIEWS / f"{view}.py"), label=label)


def _drop_impossible(run: Run, labels: list[str]) -> None:
    """Forget what this run does not have; of a bad address, too."""
    held = st.session_state
    if held.get("layer") is not None and held["layer"] not in labels:
        held["layer"] = None
    most = focus.experts_of(run, held.get("layer"))
    if held.get("expert") is not None and not (str(held["expert"]).isdigit() and int(held["expert"]) < most):
        held["expert"] = None
    for key in ("sequence", "token"):
        if held.get(key) is not None and not (isinstance(held[key], int) and held[key] >= 0):
            held[key] = None
