"""The charts of the page Cache, section by section."""

from __future__ import annotations

from typing import Any

import streamlit as st

from app.components import chart, table
from app.components.table import Column
from app.exhibits import caching
from app.frames import caching as frames
from planner.cache.study import Study
from store import Run

_WAYS = {
    "title": Column("way", "text"),
    "ms": Column("ms per token"),
    "p95_ms": Column("95th percentile, ms", help="of a pass"),
    "hit_rate": Column("hit rate", "share"),
    "stalled": Column(
        "stalled", "share", help="layers of tokens in which the device waits for a copy or for the CPU"
    ),
    "mb_per_token": Column("MB per token", help="over the link"),
    "wasted_mb": Column("of them wasted, MB", help="prefetched in vain"),
    "chance_ms": Column("on random experts, ms", help="empty = not tried"),
    "needs_trace": Column("goes by the trace", "text"),
}  # fmt: skip


def speed(run: Run, found: Study, chosen: dict[str, Any]) -> None:
    """How long a token takes with which memory, and every way at this memory."""
    with chart.pair():
        chart.exhibit(caching.speed, run, key="cache-times", **chosen)
        chart.exhibit(caching.ways, run, key="cache-ways", **chosen)
    with st.expander("All figures of the ways", icon=":material/table:"):
        table.show(
            frames.ways(found), key="cache-ways-table", columns=_WAYS, bordered=False,
            hide=("name", "short", "hit_low", "hit_high", "layer_slots"),
            alt="Every way to serve: time, hit rate, stalls, loads",
            read="The fastest way on top; from and to are the 95 % interval of its time.",
        )  # fmt: skip


def hits(run: Run, chosen: dict[str, Any]) -> None:
    """Hit rates by size, and what they are made of."""
    chart.exhibit(caching.hits, run, key="cache-hits", **chosen)
    chart.exhibit(caching.parts, run, key="cache-parts", **chosen)


def domains(run: Run, chosen: dict[str, Any]) -> None:
    """The best way by domain."""
    with chart.pair():
        chart.exhibit(caching.domain_times, run, key="cache-domain-times", **chosen)
        chart.exhibit(caching.domain_hits, run, key="cache-domain-hits", **chosen)
