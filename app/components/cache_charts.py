"""The charts of the page Cache: hit rates and what they are made of, times by memory, ways, domains."""

from __future__ import annotations

import streamlit as st

from app import state
from app.components import chart
from app.figures import caching as figures
from app.figures import caching_ways
from app.frames import caching as frames
from app.text import size
from planner.cache.study import Study

_number = st.column_config.NumberColumn


def times(found: Study) -> None:
    """How long a token takes with which memory."""
    frame, asked = frames.times(found), found.slots * found.memory["slot"]
    chart.show(
        figures.time_by_memory(frame, asked=asked, resident=found.resident_ms, theme=state.theme()),
        frame,
        key="cache-times",
        read="Lower is faster; the dashed upright is this memory. Caching pays where the thick line, with all of its "
        "band, lies a tenth below the two that it is held against: whole layers, and the same way on random experts. "
        "Hover names the way; below the bound nothing can lie.",
        rests_on=f"{found.tokens:,} tokens of {found.requests:,} requests; the band is a 95 % interval over requests.",
        alt="Milliseconds per token against memory for experts: best way, whole layers, random experts, bound",
    )


def hits(found: Study) -> None:
    """Hit rates by size, and what they are made of."""
    frame, made, each = frames.hit_rates(found), frames.parts(found), found.slots / found.layers
    chart.show(
        figures.hit_rate_curves(frame, each=each, theme=state.theme()),
        frame,
        key="cache-hits",
        read="The dashed upright is this memory. What LRU hits beyond its grey lines is order in the text: within "
        "requests, or over all. Bounds know the future; no policy lies above the highest, which need not keep what it "
        "loads; whole sets: all of a token's experts must be there together.",
        rests_on=f"Each layer has a cache of its own; {found.tokens:,} tokens; bands are 95 % intervals over requests.",
        alt="Hit rate against slots per layer: policies, bounds and controls",
    )
    chart.show(
        figures.hit_rate_parts(made, each=max(found.slots // found.layers, 1), theme=state.theme()),
        made,
        key="cache-parts",
        read="Random: what any cache of this size hits. Popularity: some experts are used more by all text. Topic: a "
        "request uses some more. Locality: neighbouring tokens use the same. A static set can only win popularity.",
        rests_on="In points of the hit rate; a part may be negative.",
        alt="Stacked bars: hit rate of LRU and of a static set by cause",
    )


def ways(found: Study) -> None:
    """Every way at this memory."""
    frame = frames.ways(found)
    asked = size(found.slots * found.memory["slot"])
    chart.show(
        caching_ways.ways(frame, bound=found.bound_ms, theme=state.theme()),
        frame,
        key="cache-ways",
        read="Shorter is faster. A way that goes by the trace is worth its trouble where its bar ends before its "
        "diamond and before the bars that need no trace; nothing can be faster than the bound.",
        rests_on=f"{asked} for experts; intervals are 95 % over requests.",
        alt="Bars: milliseconds per token of every way to serve with this memory",
    )
    with st.expander("All figures of the ways", icon=":material/table:"):
        st.dataframe(
            frame,
            hide_index=True,
            alt="Every way to serve: time, hit rate, stalls, loads",
            column_order=[
                "title", "ms", "low", "high", "p95_ms", "hit_rate", "stalled", "mb_per_token", "wasted_mb", "chance_ms",
                "needs_trace",
            ],
            column_config={
                "title": "way",
                "ms": _number("ms per token", format="%.3g"),
                "low": _number("from", format="%.3g"),
                "high": _number("to", format="%.3g"),
                "p95_ms": _number("95th percentile", format="%.3g", help="milliseconds of a pass"),
                "hit_rate": _number("hit rate", format="percent"),
                "stalled": _number(
                    format="percent", help="layers of tokens in which the device waits for a copy or for the CPU"
                ),
                "mb_per_token": _number("MB per token", format="%.3g", help="over the link"),
                "wasted_mb": _number("of them wasted", format="%.3g", help="prefetched in vain"),
                "chance_ms": _number("on random experts", format="%.3g", help="empty = not tried"),
                "needs_trace": "goes by the trace",
            },
        )  # fmt: skip


def domains(found: Study) -> None:
    """The best way by domain."""
    frame = frames.domains(found)
    if len(frame) < 2:
        return
    best = next((way.title for way in found.ways if way.needs_trace), "")
    rests_on = f"{state.plain(best, 120)}; the slowest on top."
    with chart.pair():
        chart.show(
            caching_ways.domain_times(frame, theme=state.theme()),
            frame,
            key="cache-domain-times",
            read="The top bar is what the least fortunate text gets.",
            rests_on=rests_on,
            alt="Bars: milliseconds per token by domain",
        )
        chart.show(
            caching_ways.domain_hits(frame, theme=state.theme()),
            frame,
            key="cache-domain-hits",
            read="A diamond to the right of its dot: the domain loses by being served among others.",
            rests_on=rests_on,
            alt="Dots: hit rate by domain, among the others and alone",
        )
