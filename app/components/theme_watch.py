"""Redraw when the user, or the system, switches between light and dark.

Streamlit recolours its own parts but does not run the script again, so colours inside figures would stay behind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import streamlit as st

_JS = """
export default function ({ parentElement, setStateValue }) {
  const host = parentElement.host ?? parentElement
  const shown = () => getComputedStyle(host).getPropertyValue("--st-background-color").trim()
  let last = shown()
  const timer = setInterval(() => {
    const now = shown()
    if (now && now !== last) { last = now; setStateValue("background", now) }
  }, 300)
  return () => clearInterval(timer)
}
"""
_MOUNT: Callable[..., Any] | None = None


def theme_watch() -> None:
    """Mount the watcher; it shows nothing."""
    global _MOUNT
    if _MOUNT is None:
        _MOUNT = st.components.v2.component("moescope_theme_watch", js=_JS)
    _MOUNT(key="theme-watch", on_background_change=lambda: None, height=1)
