"""A button that copies the address of what is shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import streamlit as st

_HTML = "<button type='button' title='Copy the address of this view'>Copy link</button>"
_CSS = """
button { font: inherit; font-size: 0.85rem; color: var(--st-link-color); background: none; border: 0; cursor: pointer;
  padding: 0.25rem 0; white-space: nowrap }
button:hover { text-decoration: underline }
button:focus-visible { outline: 2px solid var(--st-primary-color); border-radius: 4px }
"""
_JS = """
export default function ({ parentElement }) {
  const button = parentElement.querySelector("button")
  const say = (text) => { button.textContent = text; setTimeout(() => { button.textContent = "Copy link" }, 1500) }
  const byHand = (text) => {
    const field = document.createElement("textarea")
    field.value = text
    document.body.append(field)
    field.select()
    const done = document.execCommand("copy")
    field.remove()
    return done
  }
  button.onclick = async () => {
    try { await navigator.clipboard.writeText(location.href); say("Copied") }
    catch { say(byHand(location.href) ? "Copied" : "Copy it from the address bar") }
  }
}
"""
_MOUNT: Callable[..., Any] | None = None


def copy_link() -> None:
    """Mount the button."""
    global _MOUNT
    if _MOUNT is None:
        _MOUNT = st.components.v2.component("moescope_copy_link", html=_HTML, css=_CSS, js=_JS)
    _MOUNT(key="copy-link", width="content")
