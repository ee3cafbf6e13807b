"""The charts of the page Placement, each with a sentence that says how to read it."""

from __future__ import annotations

import polars as pl
import streamlit as st

from app import state
from app.components import chart
from app.figures import placement as figures
from app.frames import placement as frames
from app.frames.placement import Placed


def loads(found: Placed) -> None:
    """Load of every device, before and after."""
    frame = frames.device_loads(found)
    bound = figures.bound_of(frame)
    where = "Later text than the placement was made from." if found.verdict else "The counts that it was made from."
    with chart.pair():
        for name, read in (
            ("before", "One row is a layer. Near the background: as much to do as the mean. "
             "Orange devices have more than the mean, and all others wait for them."),
            ("after", "The same experts, moved, on the same scale of colours. What stays orange could not be foreseen, "
             "or is too popular for one device."),
        ):  # fmt: skip
            chart.show(
                figures.load_map(frame, name=name, bound=bound, theme=state.theme()),
                frame, key=f"load-{name}", read=read, rests_on=where,
                alt=f"Map of layers and devices: load over the mean, {frames.WORDS[name]}",
            )  # fmt: skip


def balance(found: Placed) -> None:
    """Balancedness per layer, by windows and by passes, and how passes spread."""
    frame, theme = frames.layers(found), state.theme()
    if found.verdict is None:
        chart.show(
            figures.layer_curves(frame, quantity="balancedness", theme=theme), frame, key="balance-windows",
            read="Mean over largest load of a device; 1 = all carry as much. Layers where the lines meet gain nothing.",
            rests_on="The counts that the placement was made from.", alt="Balancedness of every layer before and after",
        )  # fmt: skip
        return
    windows = found.verdict.after.load.shape[0]
    with chart.pair():
        chart.show(
            figures.layer_curves(frame, quantity="balancedness", theme=theme), frame, key="balance-windows",
            read=f"Loads added up over {windows} windows of later text, then mean over largest. Long windows flatter: "
            "an engine waits in every pass.",
            rests_on="LPT, later text: it knew what comes.",
            alt="Balancedness of every layer by windows, for the placements beside each other",
        )  # fmt: skip
        chart.show(
            figures.layer_curves(frame, quantity="per_pass", theme=theme), frame, key="balance-passes",
            read=f"The same for single passes of {found.batch} requests, which is what costs time. Near the dotted "
            "line only chance is left: more requests at once help then, and no placement does.",
            alt="Balancedness of every layer by forward passes, for the placements beside each other",
        )  # fmt: skip
    spread, sizes = frames.by_pass(found), frames.by_size(found)
    with chart.pair():
        chart.show(
            figures.pass_histogram(spread, theme=theme), spread, key="passes",
            read="How many passes use which part of the devices' time. A placement pays where it moves the hill to the "
            "right; the dotted hill is about as far as chance lets it.",
            rests_on=f"{found.passes['after'].tokens.size:,} passes, all layers of a pass together.",
            alt="Distribution of balancedness over forward passes",
        )  # fmt: skip
        chart.show(
            figures.size_curves(sizes, theme=theme), sizes, key="pass-sizes",
            read="Few tokens cannot keep all devices busy, however experts lie: passes get emptier as requests end.",
            rests_on="Passes with as many tokens are added up; large points are many passes.",
            alt="Balancedness of passes against the number of tokens in them",
        )  # fmt: skip


def traffic(found: Placed) -> None:
    """What crosses devices."""
    frame, steps, theme = frames.layers(found), frames.moves(found), state.theme()
    with chart.pair():
        chart.show(
            figures.layer_curves(frame, quantity="remote", theme=theme), frame, key="traffic-remote",
            read="Share of token-expert pairs that are computed on another device than the token's own. Replicas lower "
            "it; a placement without them hardly can, since requests lie anywhere.",
            rests_on=f"Chance: {1 - 1 / found.placement.devices:.0%} without replicas.",
            alt="Share of pairs that leave their device, per layer",
        )  # fmt: skip
        if len(found.labels) > 1:
            chart.show(
                figures.move_curves(steps, theme=theme), steps, key="traffic-moves",
                read="Pairs of experts of adjacent layers that one token uses and that lie on different devices: what "
                "travels if a token stays where its expert ran. Methods by affinity lower this.",
                alt="Share of pairs of adjacent layers' experts on different devices",
            )  # fmt: skip
        else:
            chart.show(
                figures.layer_curves(frame, quantity="devices", theme=theme), frame, key="traffic-devices",
                read="Devices that a token's experts lie on: fewer mean less to send.",
                alt="Devices per token, per layer",
            )  # fmt: skip


def moved(found: Placed) -> None:
    """Which experts get copies, and what is sent."""
    theme, changes, held = state.theme(), frames.movement(found), frames.replicas(found)
    if found.replicas:
        idle = int(changes["idle"].sum())
        chart.show(
            figures.replica_map(held, theme=theme), held, key="replicas",
            read="Experts with several slots share their tokens among them: the busiest ones should have most."
            + (f" {idle:,} slots hold an expert that their device has already, and serve nothing." if idle else ""),
            rests_on=f"{found.replicas:,} redundant slots per layer.", alt="Map of layers and experts: slots",
        )  # fmt: skip
    if found.verdict is None:
        _movement(changes)
        return
    with chart.pair():
        _movement(changes)
        domains(found)


def _movement(changes: pl.DataFrame) -> None:
    chart.show(
        figures.movement_bars(changes, theme=state.theme()), changes, key="movement",
        read="Slots that hold another expert than in the map that engines begin with, and experts that a device has to "
        "be sent. Engines that load the map at the start pay nothing for it; those that rebalance pay this.",
        rests_on="Against the contiguous map with as many slots.", alt="Slots that change in every layer",
    )  # fmt: skip


def domains(found: Placed) -> None:
    """Domain by domain."""
    frame = frames.domains(found)
    chart.show(
        figures.domain_bars(frame, theme=state.theme()), frame, key="placement-domains",
        read="The later text of each domain alone. Where the filled point lies left of the ring, the placement makes "
        "this domain slower. A domain has fewer requests than the mix, so its passes are smaller and less even.",
        rests_on="Placed for the mix of all domains chosen.",
        alt="Balancedness per pass of every domain before and after",
    )  # fmt: skip


def every(found: Placed) -> None:
    """All of them, in order."""
    loads(found)
    balance(found)
    if found.verdict is not None:
        st.subheader("What crosses devices", anchor=False)
        traffic(found)
    st.subheader("What has to be moved", anchor=False)
    moved(found)
