"""Whether caching pays, why, and the key figures."""

from __future__ import annotations

from typing import Any

import streamlit as st

from app import state
from app.frames import caching as frames
from app.text import size
from planner.cache.study import Study

_LOOKS = {
    "fits": ("All fits", "blue", ":material/check_circle:"),
    "pays": ("Pays", "green", ":material/check_circle:"),
    "pays above": ("Pays above", "orange", ":material/trending_up:"),
    "does not pay": ("Does not pay", "red", ":material/block:"),
}


FIRST = 2
"""Reasons that stand there at once."""


def card(found: Study) -> None:
    """The verdict with its reasons."""
    label, colour, icon = _LOOKS[found.verdict.word]
    words = found.verdict.sentence
    with st.container(border=True, gap="xsmall"):
        with st.container(horizontal=True, gap="small", vertical_alignment="center"):
            st.badge(label, color=colour, icon=icon)  # type: ignore[arg-type]
            st.markdown(f"**{state.plain(words[0].upper() + words[1:], 200)}**", width="content")
        first, others = found.verdict.reasons[:FIRST], found.verdict.reasons[FIRST:]
        st.markdown("\n".join(f"- {state.plain(reason, 600)}" for reason in first))
        if others:
            with st.expander("More reasons", icon=":material/info:"):
                st.markdown("\n".join(f"- {state.plain(reason, 600)}" for reason in others))


def metrics(found: Study) -> None:
    """Key figures of the fastest way, beside what bounds it, and where the device's memory goes."""
    best, rate = found.best, 1e3 / found.best.ms
    gap = best.ms / found.bound_ms - 1 if found.bound_ms > 0 else 0.0
    hits = "no interval with prefetching" if best.hit_low is None else f"{best.hit_low:.1%} to {best.hit_high:.1%}"
    worst = found.domains[0]
    held, memory = size(found.slots * found.memory["slot"]), frames.memory(found)
    figures = (
        ("Tokens/s", f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}", frames.short(best),
         f"The fastest way: {best.title}."),
        ("ms per token", f"{best.ms:.3g}", f"{best.low:.3g} to {best.high:.3g}",
         "Mean over the tokens of the requests for judging; 95 % interval over requests."),
        ("Hit rate", f"{best.hit_rate:.1%}", hits,
         "Of the fastest way: uses whose expert was on the device; 95 % interval over requests."),
        ("Bound, ms", f"{found.bound_ms:.3g}", f"{gap:.0%} above it",
         "What no way to serve can beat with this memory, whatever it foresees."),
        ("Experts held", f"{found.slots:,} of {found.all_slots:,}", held, "On the device: slots, each as large as the "
         f"largest expert, and what they take. Of {size(found.memory['total'])}: other weights "
         f"{size(memory['other'])}, keys and values {size(memory['kv'])}, activations {size(memory['activations'])}. "
         f"All experts on the device would take {found.resident_ms:.3g} ms per token."),
        ("Slowest domain", f"{worst.ms:.3g} ms", state.plain(worst.domain, 30),
         "Per token, of the best way that goes by the trace: what the least fortunate text gets."),
    )  # fmt: skip
    plain: dict[str, Any] = {"delta_color": "off", "delta_arrow": "off", "border": True, "height": "stretch"}
    with st.grid(6, min_column_width=150, gap="small"):
        for label, value, below, why in figures:
            st.metric(label, value, below, help=state.plain(why, 600), **plain)


def notes(found: Study) -> None:
    """What was assumed, and what it rests on."""
    st.caption(
        f"Judged on {found.tokens:,} tokens of {found.requests:,} requests; whatever is fitted was fitted on the other "
        "half of the requests of each domain. " + " ".join(state.plain(note, 400) for note in found.notes)
    )
