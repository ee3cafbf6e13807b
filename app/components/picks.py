"""Clicks in charts become the focus, and the focus is marked in charts. One bridge for all charts of a page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import streamlit as st

from app import focus

_HERE = Path(__file__).parent
_MOUNT: Callable[..., Any] | None = None


def picks() -> None:
    """Mount the bridge; it shows nothing. A chart takes part if its figure is ``pickable``."""
    global _MOUNT
    if _MOUNT is None:
        js = (_HERE / "picks.js").read_text(encoding="utf-8")
        _MOUNT = st.components.v2.component("moescope_picks", js=js)
    held = {key: None if st.session_state.get(key) is None else str(st.session_state[key]) for key in focus.KEYS}
    _MOUNT(key="picks", data=held, on_picked_change=_keep, height=1)


def _keep() -> None:
    found = getattr(st.session_state.get("picks"), "picked", None)
    if isinstance(found, dict):
        focus.pick(**{key: found[key] for key in focus.KEYS if key in found})
