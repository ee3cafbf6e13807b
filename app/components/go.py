"""A link to a page that picks a layer, expert or token on the way."""

from __future__ import annotations

from typing import Any

import streamlit as st

from app import focus


def go(label: str, file: str, *, icon: str | None = None, **picked: Any) -> None:
    """Draw it.

    Args:
        file: of the page, as in ``app.views.PAGES``.
        picked: parts of the focus: layer, expert, sequence, token; None leaves a part as it is.
    """
    held = focus.current()
    # What is in the address already goes along by itself.
    new = {part: str(value) for part, value in picked.items() if value is not None and getattr(held, part) != value}
    query = new if all(getattr(held, part) is None for part in new) else focus.asked_by_link(new)
    st.page_link(file, label=label, icon=icon, query_params=query or None, width="content")
