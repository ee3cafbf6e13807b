"""Exhibits of the page Routing: load, balance, domains, and how decided the router is."""

from __future__ import annotations

from typing import Literal

import store
from app.exhibits.exhibit import Entry, Exhibit, Frames, fresh
from app.figures import heatmap
from app.figures.style import Theme, safe
from app.frames import load as frames_of_load

Scale = Literal["relative", "share"]

_READ_LOAD = {
    "relative": "Orange experts get less than their uniform share, blue ones more, in factors of two.",
    "share": "The darker (in dark mode: the brighter), the larger the expert's part of its layer's selections.",
}


def load(
    run: store.Run,
    *,
    frames: Frames = fresh,
    theme: Theme = "light",
    domain: str | None = None,
    phase: str | None = None,
    scale: Scale = "relative",
) -> Exhibit:
    """Layer x expert: each expert's load."""
    frame = frames(frames_of_load.expert_load, run, domain=domain, phase=phase)
    where = where_of(domain, phase)
    return Exhibit(
        figure=heatmap.load_map(frame, value=scale, where=safe(where), theme=theme),
        frame=frame,
        read=_READ_LOAD[scale],
        rests_on=f"{frame['tokens'].sum():,} selections.",
        alt=f"Map of layers and experts: load, {where}",
    )


def where_of(domain: str | None, phase: str | None) -> str:
    """Which text: "german, decode", or "all text"."""
    return ", ".join(part for part in (domain, phase) if part) or "all text"


EXHIBITS = (Entry("load", load, "Load of each expert", page="routing"),)
