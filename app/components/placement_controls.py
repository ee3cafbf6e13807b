"""What the page Placement is asked: devices, nodes, replicas, method, requests at once, and whose text counts."""

from __future__ import annotations

from typing import Any

import streamlit as st

from app import state
from app.exhibits.listed import listed
from app.exhibits.placement import ATTENTION_MS, BANDWIDTH_GB, FREE_SLOTS
from app.frames import placement as frames
from planner.place.methods import find
from planner.placing import BATCH
from store import Run

MOST_DEVICES = 4096


def controls(run: Run) -> dict[str, Any]:
    """Draw them.

    Returns:
        choices of the exhibits of ``app/exhibits/placement.py``.
    """
    usable = {one.name: one for one in frames.usable(run)}
    asked: dict[str, Any] = {}
    with st.container(horizontal=True, gap="small", vertical_alignment="bottom"):
        with st.container(width=250):
            asked["method"] = state.choose("Method", list(usable), key="method", words=_title)
        with _narrow():
            asked["devices"] = state.choose_number(
                "Devices", key="devices", low=1, high=MOST_DEVICES, default=frames.first_devices(run),
                help="Of the expert-parallel group. They hold as many slots of every layer each.",
            )  # fmt: skip
        nodes = [str(one) for one in range(1, asked["devices"] + 1) if asked["devices"] % one == 0]
        with _narrow():
            chosen = state.choose("Nodes", nodes, key="nodes", help="Among which devices are divided evenly.")
            asked["nodes"] = int(chosen)
        if usable[asked["method"]].replicates:
            with _narrow():
                asked["redundant"] = state.choose_number(
                    "Replicas", key="redundant", low=0, high=65_536, default=0,
                    help="Redundant slots of every layer, beyond one per expert, over all devices.",
                )  # fmt: skip
        asked |= _options(usable[asked["method"]].required)
        if run.has_trace:
            with _narrow():
                asked["requests"] = state.choose_number(
                    "Requests", key="requests", low=1, high=65_536, default=BATCH,
                    help="Decoded together, over all devices.",
                )  # fmt: skip
        if len(run.domains) > 1:
            with st.container(width=170):
                names = state.choose_some("Whose text counts", run.domains, key="domains", none="all domains")
            asked["domains"] = listed(names)
        if run.badge.status == "invalid":
            asked["allow_invalid"] = state.choose_flag("Place all the same", key="allow-invalid", default=False)
    return asked


def _narrow() -> Any:
    return st.container(width=118)


def _options(required: tuple[str, ...]) -> dict[str, Any]:
    """What a method cannot do without: of Hecate, how long attention runs and how fast experts are copied."""
    if required != ("attention", "bandwidth"):
        return {}
    attention = state.choose_size(
        "Attention of a layer, ms", key="attention", low=0.0, high=10_000.0, default=ATTENTION_MS,
        help="How long it runs in one forward pass: what can be copied meanwhile costs no time.",
    )  # fmt: skip
    bandwidth = state.choose_size(
        "Link between devices, GB/s", key="bandwidth", low=1e-3, high=100_000.0, default=BANDWIDTH_GB,
        help="At which experts are copied from one device to another.",
    )  # fmt: skip
    free = state.choose_number(
        "Free slots per device", key="free-slots", low=0, high=4096, default=FREE_SLOTS,
        help="Experts of each layer that a device has memory for beside its own.",
    )  # fmt: skip
    return {"attention": attention, "bandwidth": bandwidth, "free_slots": free}


def _title(name: str) -> str:
    return find(name).title
