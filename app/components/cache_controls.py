"""What the page Cache is asked: machine, memory, link, widths, context, batch, and whose text counts."""

from __future__ import annotations

from typing import Any

import streamlit as st

from app import data, state
from app.frames import caching as frames
from moescope.errors import PlanError
from planner.cache.setting import CONTEXT
from planner.machines import LINKS, MACHINES
from store import Run

GIB = 2**30
FIRST = "rtx4090"
OWN = "the machine's"
AS_THEY_ARE = "as they are"
_MOST_GIB = 4096.0
_LEAST_GIB = 1e-6


def controls(run: Run) -> dict[str, Any] | None:
    """Draw them.

    Returns:
        arguments of ``app.frames.caching.answer``; None where something has to be said first, and was asked for.

    Raises:
        PlanError: no budget can be worked out for such a choice.
    """
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        with st.container(width=300):
            asked: dict[str, Any] = {"name": _machine()}
        memory = st.container(width=190)
        with st.container(width=160):
            asked |= _link(MACHINES[asked["name"]].link.name)
        with st.container(width=160):
            asked |= _bits()
        with st.container(width=160):
            asked["context"] = state.choose_number(
                "Context, tokens", key="context-length", low=1, high=10_000_000, default=CONTEXT,
                help="Tokens whose keys and values lie on the device, for each sequence.",
            )  # fmt: skip
        with st.container(width=160):
            asked["batch"] = state.choose_number(
                "Sequences", key="batch", low=1, high=256, default=1,
                help="Sequences that are decoded together: a layer needs the experts of all of them at once.",
            )  # fmt: skip
        if len(run.domains) > 1:
            domains = state.choose_some("Whose text counts", run.domains, key="domains", none="all domains")
            asked |= {"domains": tuple(domains)} if domains else {}
        others = 0.0 if data.made(frames.knows_the_rest, run) else _others()
    if run.badge.status == "invalid" and not _all_the_same():
        return None
    if others is None:
        return None
    asked |= {"other_weights": int(others * GIB)} if others > 0 else {}
    with memory:
        asked["vram"] = _memory(run, asked)
    return asked


def _machine() -> str:
    return state.choose(
        "Machine", list(MACHINES), key="machine", default=FIRST, words=lambda name: MACHINES[name].title
    )


def _link(own: str) -> dict[str, str]:
    link = state.choose("Link", [OWN, *LINKS], key="link", help=f"Host memory to device; the machine's is {own}.")
    return {"link": link} if link != OWN else {}


def _bits() -> dict[str, int]:
    bits = state.choose(
        "Bits of experts", [AS_THEY_ARE, *map(str, frames.BITS)], key="bits",
        help="All experts quantized alike: narrow ones are smaller, more of them fit, and they are copied faster.",
    )  # fmt: skip
    return {"bits": int(bits)} if bits != AS_THEY_ARE else {}


def _memory(run: Run, asked: dict[str, Any]) -> int:
    """Bytes of the device's memory."""
    given = {name: asked[name] for name in ("context", "batch", "bits", "other_weights") if name in asked}
    most = MACHINES[asked["name"]].vram
    try:
        interesting, trouble = min(data.made(frames.half, run, **given), most), None
    except PlanError as error:
        interesting, trouble = most, error
    value = state.choose_size(
        "Device memory, GiB", key="vram", low=_LEAST_GIB, high=_MOST_GIB, default=float(f"{interesting / GIB:.4g}"),
        help=f"What weights, keys and values may take; this machine has {most / GIB:.3g} GiB for them. Shown at first: "
        "what holds half of the experts, where the machine has as much.",
    )  # fmt: skip
    if trouble is not None:
        raise trouble
    return int(value * GIB)


def _all_the_same() -> bool:
    sure = state.choose_flag("Answer all the same", key="allow-invalid", default=False)
    if not sure:
        st.warning("The checks of this run failed: what rests on its trace may be wrong.", icon=":material/error:")
    return sure


def _others() -> float | None:
    """GiB; None = not given yet."""
    with st.container(width=190):
        value = state.choose_size(
            "Other weights, GiB", key="other-weights", low=0.0, high=_MOST_GIB, default=0.0,
            help="All weights beside routed experts: attention, shared experts, embeddings.",
        )  # fmt: skip
    if value > 0:
        return value
    st.info(
        "The run does not say how large its model is beside the experts: give the size of the other weights.",
        icon=":material/edit:",
    )
    return None
