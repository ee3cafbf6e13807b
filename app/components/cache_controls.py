"""What the page Cache is asked: machine, memory, widths, how it serves, and whose text counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import streamlit as st

from app import data, state
from app.exhibits.caching import GIB, MACHINE
from app.exhibits.listed import listed
from app.frames import caching as frames
from app.frames.axes import phases
from moescope.errors import PlanError
from planner.cache.setting import CONTEXT
from planner.machine import Machine
from planner.machines import DISKS, LINKS, MACHINES
from store import Run

OWN = "the machine's"
AS_THEY_ARE = "as they are"
NO_DISK = "none"
_MOST_GIB = 4096.0
_LEAST_GIB = 1e-6


def controls(run: Run) -> dict[str, Any] | None:
    """Draw them.

    Returns:
        choices of the exhibits of ``app/exhibits/caching.py``; None where something has to be said first, and was asked
        for.

    Raises:
        PlanError: no budget can be worked out for such a choice, or a file that is no machine.
    """
    with st.container(horizontal=True, gap="small", vertical_alignment="bottom"):
        with st.container(width=235):
            chosen: dict[str, Any] = {"machine": _machine()}
        memory = st.container(width=165)
        with st.container(width=135):
            chosen |= _bits()
        with st.container(width=115):
            chosen["sequences"] = state.choose_number(
                "Sequences", key="batch", low=1, high=256, default=1,
                help="Sequences that are decoded together: a layer needs the experts of all of them at once.",
            )  # fmt: skip
        if len(run.domains) > 1:
            with st.container(width=170):
                names = state.choose_some("Whose text counts", run.domains, key="domains", none="all domains")
            chosen["domains"] = listed(names)
        with st.popover("More", icon=":material/tune:", key="more-choices"):
            chosen |= _more(run, chosen)
        others = 0.0 if data.frame(frames.knows_the_rest, run) else _others()
    if run.badge.status == "invalid" and not _all_the_same():
        return None
    if others is None:
        return None
    chosen |= {"other_weights": others} if others > 0 else {}
    _say(chosen)
    with memory:
        chosen["memory"] = _memory(run, chosen)
    return chosen


def _machine() -> str:
    return state.choose(
        "Machine", list(MACHINES), key="machine", default=MACHINE, words=lambda name: MACHINES[name].title
    )


def _bits() -> dict[str, Any]:
    bits = state.choose(
        "Bits of experts", [AS_THEY_ARE, *map(str, frames.BITS)], key="bits",
        help="All experts quantized alike: narrow ones are smaller, more of them fit, and they are copied faster.",
    )  # fmt: skip
    return {"bits": int(bits)} if bits != AS_THEY_ARE else {}


def _more(run: Run, chosen: dict[str, Any]) -> dict[str, Any]:
    """What is asked less often: machine, context, prompts, phase."""
    found: dict[str, Any] = {}
    file = st.text_input(
        "Machine file, instead of a name", key="machine-file", placeholder="machine.json",
        help="Of moescope measure-device; a path on the machine that the dashboard runs on. It stands in no link.",
    )  # fmt: skip
    if file and file.strip():
        found["machine"] = _file(file.strip())
    machine = frames.on_machine(found.get("machine", chosen["machine"]))
    with st.container(horizontal=True):
        found |= _parts(machine)
    with st.container(horizontal=True):
        found["context"] = state.choose_number(
            "Context, tokens", key="context-length", low=1, high=10_000_000, default=CONTEXT,
            help="Tokens whose keys and values lie on the device, for each sequence.",
        )  # fmt: skip
        found["chunk"] = state.choose_number(
            "Prompt chunk, tokens", key="chunk", low=1, high=1_000_000, default=1,
            help="Tokens of a prompt that one pass reads; 1 = tokens one after another, as in decoding.",
        )  # fmt: skip
    found["phase"] = state.choose_phase(data.frame_list(phases, run))
    return found


def _file(path: str) -> str:
    """The path, if a machine can be read from it; named so that it is read as one."""
    if not Path(path).is_file():
        raise PlanError(f"no machine file {path!r}: moescope measure-device -o FILE writes one")
    return path if "/" in path or path.endswith(".json") else f"./{path}"


def _parts(machine: Machine) -> dict[str, Any]:
    """What the machine has instead: link, host memory, disk."""
    found: dict[str, Any] = {}
    link = state.choose(
        "Link", [OWN, *LINKS], key="link", help=f"Host memory to device; the machine's is {machine.link.name}."
    )
    found |= {"link": link} if link != OWN else {}
    if not machine.shares_memory:
        own = float(f"{machine.ram / GIB:.4g}")
        host = state.choose_size(
            "Host memory, GiB", key="host-memory", low=0.0, high=_MOST_GIB, default=own,
            help="What experts may take of it; those beyond it lie on disk.",
        )  # fmt: skip
        found |= {"host_memory": host} if host != own else {}
    own_disk = machine.disk.name if machine.disk else NO_DISK
    disk = state.choose(
        "Disk", [OWN, *DISKS, NO_DISK], key="disk",
        help=f"For experts that host memory does not hold; the machine's is {own_disk}.",
    )  # fmt: skip
    return found | ({"disk": disk} if disk != OWN else {})


def _say(chosen: dict[str, Any]) -> None:
    """What was chosen where nobody sees it at once."""
    words = [f"{name.replace('_', ' ')} {chosen[name]}" for name in ("link", "disk", "phase") if chosen.get(name)]
    words += [f"{chosen['host_memory']:g} GiB of host memory"] if "host_memory" in chosen else []
    words += [f"context {chosen['context']:,} tokens"] if chosen["context"] != CONTEXT else []
    words += [f"prompts in chunks of {chosen['chunk']:,} tokens"] if chosen["chunk"] != 1 else []
    words += [f"machine of {chosen['machine']}"] if chosen["machine"] not in MACHINES else []
    if words:
        st.caption(state.plain(f"Also chosen: {', '.join(words)}.", 400))


def _memory(run: Run, chosen: dict[str, Any]) -> float:
    """GiB of the device's memory."""
    most = frames.on_machine(chosen["machine"]).vram
    others = chosen.get("other_weights")
    given = {"context": chosen["context"], "batch": chosen["sequences"], "bits": chosen.get("bits"),
             "other_weights": None if others is None else int(others * GIB)}  # fmt: skip
    try:
        interesting, trouble = min(data.frame(frames.half, run, **frames.given(given)), most), None
    except PlanError as error:
        interesting, trouble = most, error
    value = state.choose_size(
        "Device memory, GiB", key="vram", low=_LEAST_GIB, high=_MOST_GIB, default=float(f"{interesting / GIB:.4g}"),
        help=f"What weights, keys and values may take; this machine has {most / GIB:.3g} GiB for them. Shown at first: "
        "what holds half of the experts, where the machine has as much.",
    )  # fmt: skip
    if trouble is not None:
        raise trouble
    return value


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
