"""What a placement is worth: the sentence, key figures, the table of placements beside each other, and notes."""

from __future__ import annotations

from typing import Any

import streamlit as st

from app import state
from app.components import table as tables
from app.components.table import Column
from app.frames import placement as frames
from app.frames.placement import Placed
from app.text import size

DOMAINS = 8
"""Domains that are named."""

_PLAIN: dict[str, Any] = {"delta_color": "off", "delta_arrow": "off", "border": True, "height": "stretch"}
_COLUMNS = {
    "placement": Column("placement", "text"), "balancedness": Column("balancedness", "number"),
    "per_pass": Column("busy, per pass", "share"), "saved": Column("busiest saves", "share"),
    "devices": Column("devices per token", "number"), "remote": Column("pairs that leave", "share"),
    "moves": Column("layer to layer", "share"),
}  # fmt: skip


def sentence(found: Placed) -> None:
    """The verdict, green for yes."""
    if found.verdict is None:
        st.info(
            "Whether it is worth it is not known: this run holds counts and no trace. Below is how evenly the "
            "placement carries the counts that it was made from; other text is carried less evenly as a rule.",
            icon=":material/help:",
        )
        return
    yes = found.verdict.sentence.startswith("Yes")
    show = st.success if yes else st.info
    show(state.plain(found.verdict.sentence, 900), icon=":material/check_circle:" if yes else ":material/block:")


def figures(found: Placed) -> None:
    """Before and after in a row."""
    table = {row["name"]: row for row in frames.comparison(found).iter_rows(named=True)}
    before, after = table["before"], table["after"]
    moved = frames.movement(found)
    with st.grid(5, min_column_width=160, gap="small"):
        st.metric(
            "Balancedness", f"{after['balancedness']:.3f}",
            f"{before['balancedness']:.3f} before", **_PLAIN,
            help="Mean over largest load of a device, per window of text and layer; 1 = all carry as much."
            + f" On {'later text than' if found.verdict else 'the counts that'} the placement was made from.",
        )  # fmt: skip
        if found.verdict is not None:
            st.metric(
                "Busy, per pass", f"{after['per_pass']:.1%}", f"{before['per_pass']:.1%} before",
                **_PLAIN, help="Part of the devices' time that is used if every layer of every forward pass waits for "
                f"its busiest device, {found.batch} requests at once. Uniformly random experts: "
                f"{table['chance']['per_pass']:.1%}.",
            )  # fmt: skip
            st.metric(
                "Devices per token", f"{after['devices']:.2f}", f"{before['devices']:.2f} before", **_PLAIN,
                help="Devices that the experts of one token in one layer lie on.",
            )  # fmt: skip
            st.metric(
                "Pairs that leave", f"{after['remote']:.1%}", f"{before['remote']:.1%} before", **_PLAIN,
                help="Share of token-expert pairs whose expert is not on the device that the token's request is on.",
            )  # fmt: skip
        copied, bytes_ = int(moved["copied"].sum()), int(moved["bytes"].sum())
        st.metric(
            "To be sent", size(bytes_) if bytes_ or not copied else "bytes not known", f"{copied:,} experts",
            **_PLAIN, help="Experts that a device has to be given which it does not hold in the contiguous map with "
            f"as many slots; {int(moved['changed'].sum()):,} of {int(moved['slots'].sum()):,} slots change.",
        )  # fmt: skip


def notes(found: Placed) -> None:
    """What the figures rest on, and what the plan says of itself."""
    where = found.plan.provenance
    read = f"about {found.read:,} of {where.tokens:,}" if found.read else f"{where.tokens:,}"
    more = f" and {len(where.domains) - DOMAINS} more" if len(where.domains) > DOMAINS else ""
    lines = [f"Rests on {read} tokens of {', '.join(where.domains[:DOMAINS])}{more}."]
    if found.read:
        lines.append("The page reads a part, spread over all domains; moescope place reads all.")
    if found.verdict is not None:
        lines.append(
            "Requests are dealt to devices in turn; a token goes to a replica on its own device where there is one, "
            "as SGLang's static dispatch has it."
        )
    st.caption(state.plain(" ".join([*lines, *found.notes]), 1500))


def table(found: Placed) -> None:
    """Placements beside each other."""
    frame = frames.comparison(found)
    known = [name for name in _COLUMNS if frame[name].count()]
    tables.show(
        frame, key="placements", columns=_COLUMNS, hide=tuple(name for name in frame.columns if name not in known),
        alt="Placements beside each other: balance, what is saved, what crosses devices",
        read="*LPT with swaps* is made from the same text without replicas: what replicas have to beat. *LPT on the "
        "later text itself* knows what comes: without replicas hardly anything does better. *Uniformly random experts* "
        "is this placement under a router without preferences: what chance alone unbalances, and no placement mends. "
        "*Busiest saves*: part of the busiest devices' work, added up over passes, against experts as they lie."
        if found.verdict is not None
        else "Both on the counts that the placement was made from.",
    )  # fmt: skip


def slots(found: Placed) -> None:
    """Which expert lies where."""
    tables.show(
        frames.slots(found), key="placement-slots", columns={"experts": Column("experts", "text", width="large")},
        alt="The experts that each device holds of each layer",
        read="Which device holds which experts, in the order of its slots.",
    )  # fmt: skip
