"""What the page Placement is asked: devices, nodes, replicas, method, requests at once, and whose text counts."""

from __future__ import annotations

from typing import Any

import streamlit as st

from app import state
from app.frames import placement as frames
from planner.place.methods import find
from planner.placing import BATCH
from store import Run

MOST_DEVICES = 4096
PAGE_TOKENS = 200_000
"""Of a trace that the page reads, so that it stays quick; the command takes all."""


def controls(run: Run) -> dict[str, Any]:
    """Draw them.

    Returns:
        arguments of ``app.frames.placement.placed``.
    """
    usable = {one.name: one for one in frames.usable(run)}
    asked: dict[str, Any] = {"max_tokens": PAGE_TOKENS} if run.has_trace else {}
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        with st.container(width=340):
            asked["method"] = state.choose("Method", list(usable), key="method", words=_title)
        asked["devices"] = state.choose_number(
            "Devices", key="devices", low=1, high=MOST_DEVICES, default=frames.first_devices(run),
            help="Of the expert-parallel group. They hold as many slots of every layer each.",
        )  # fmt: skip
        nodes = [str(one) for one in range(1, asked["devices"] + 1) if asked["devices"] % one == 0]
        asked["nodes"] = int(state.choose("Nodes", nodes, key="nodes", help="Among which devices are divided evenly."))
        if usable[asked["method"]].replicates:
            asked["redundant"] = state.choose_number(
                "Redundant slots", key="redundant", low=0, high=65_536, default=0,
                help="Slots of every layer beyond one per expert, for replicas, over all devices.",
            )  # fmt: skip
        asked |= _options(usable[asked["method"]].required)
        if run.has_trace:
            asked["batch"] = state.choose_number(
                "Batch", key="requests", low=1, high=65_536, default=BATCH,
                help="Requests that are decoded together, over all devices.",
            )  # fmt: skip
        if len(run.domains) > 1:
            domains = state.choose_some("Whose text counts", run.domains, key="domains", none="all domains")
            asked |= {"domains": tuple(domains)} if domains else {}
        if run.badge.status == "invalid":
            asked["allow_invalid"] = state.choose_flag("Place all the same", key="allow-invalid", default=False)
    return asked


def _options(required: tuple[str, ...]) -> dict[str, Any]:
    """What a method cannot do without: of Hecate, how long attention runs and how fast experts are copied."""
    if required != ("attention", "bandwidth"):
        return {}
    attention = state.choose_size(
        "Attention of a layer, ms", key="attention", low=0.0, high=10_000.0, default=0.5,
        help="How long it runs in one forward pass: what can be copied meanwhile costs no time.",
    )  # fmt: skip
    bandwidth = state.choose_size(
        "Link between devices, GB/s", key="bandwidth", low=1e-3, high=100_000.0, default=50.0,
        help="At which experts are copied from one device to another.",
    )  # fmt: skip
    free = state.choose_number(
        "Free slots per device", key="free-slots", low=0, high=4096, default=1,
        help="Experts of each layer that a device has memory for beside its own.",
    )  # fmt: skip
    return {"options": (("attention", attention / 1e3), ("bandwidth", bandwidth * 1e9), ("free_slots", free))}


def _title(name: str) -> str:
    return find(name).title
