"""The sections of a page: one is drawn at a time, so that a page stays calm and quick; which one is in the address."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from app import state


def sections(drawers: Mapping[str, Callable[[], None]]) -> None:
    """Offer the sections by name and draw the chosen one; the first where the address names none of them."""
    names = list(drawers)
    if len(names) == 1:
        drawers[names[0]]()
        return
    chosen = state.choose("Section", names, key="section", segmented=True, hidden=True)
    drawers[chosen]()
