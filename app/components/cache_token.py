"""One token on the clock: what device, link and CPU do."""

from __future__ import annotations

from typing import Any

import streamlit as st

from app import data, state
from app.components import chart
from app.figures import caching_token as figures
from app.frames import caching_token as frames
from app.frames.caching import SHORT
from planner.cache.study import Study
from planner.cache.ways import way_of
from store import Run

_MARKS = {
    "typical": "typical", "slow": "slower than 95 % of tokens", "slowest": "the slowest", "fastest": "the fastest",
}  # fmt: skip
NUMBERED = "by number"


def section(run: Run, found: Study, asked: dict[str, Any]) -> None:
    """Draw the section. asked: of :func:`app.frames.caching.answer`."""
    names = frames.drawn_ways(found)
    if not names:
        st.info("Tokens can be drawn of ways without prefetching, and this memory allows none.")
        return
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        way = state.choose("Way", names, key="way", words=lambda name: SHORT[name])
        mark = state.choose("Token", [*_MARKS, NUMBERED], key="mark", words=lambda name: _MARKS.get(name, name))
        with st.spinner("Replaying"):
            clock = data.large(frames.clocked, run, way=way, **asked)
        passes = clock.setting.test.num_passes
        at = frames.marks(clock).get(mark, 0)
        if mark == NUMBERED:
            at = state.choose_number("Number", key="pass", low=0, high=passes - 1, help=f"0 to {passes - 1:,}")
    sequence, place, domain, milliseconds = frames.place_of(clock, at)
    frame = frames.events(clock, at)
    where = f"Token {place} of sequence {sequence}" if asked["batch"] == 1 else f"Pass {place} of batch {sequence}"
    chart.show(
        figures.token(frame, title=f"{where}, {milliseconds:.3g} ms", theme=state.theme()),
        frame,
        key=f"cache-token-{way}",
        read="Time runs to the right; dotted lines are layers. In gaps of its lane the device waits for a copy or for "
        "the CPU: without them the token would be as fast as with all experts there.",
        rests_on=f"{state.plain(way_of(way).title, 120)}; {state.plain(domain)}; number {at:,} of {passes:,} tokens "
        "for judging. Ways with prefetching are not drawn: their copies belong to several tokens.",
        alt="Timeline of one token: device, link and CPU, layer by layer",
    )
