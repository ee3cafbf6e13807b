"""Exhibits of the page Placement: balance of devices, what crosses them, and what has to be moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import store
from app.exhibits.exhibit import Absent, Entry, Exhibit, Frames, fresh
from app.exhibits.listed import domains_of
from app.figures import placement as figures
from app.figures.style import Theme
from app.frames import placement as frames_of
from app.frames.placement import Placed
from moescope.errors import PlanError
from planner.place.methods import find
from planner.placing import BATCH, placeable

METHOD = "eplb"
TOKENS, SELECTIONS = 200_000, 10_000_000
"""Of a trace that are read at most, so that pages and reports stay quick; the command takes all."""
ATTENTION_MS, BANDWIDTH_GB, FREE_SLOTS = 0.5, 50.0, 1
"""Of methods that copy experts while attention runs, where nobody says."""

Side = Literal["before", "after"]


def asked(
    run: store.Run,
    *,
    method: str = METHOD,
    devices: int | None = None,
    nodes: int = 1,
    redundant: int = 0,
    requests: int = BATCH,
    domains: str | None = None,
    attention: float = ATTENTION_MS,
    bandwidth: float = BANDWIDTH_GB,
    free_slots: int = FREE_SLOTS,
    allow_invalid: bool = False,
) -> dict[str, Any]:
    """The choices of these exhibits as :func:`app.frames.placement.placed` takes them.

    Args:
        run: a run.
        method: by its name.
        devices: of the expert-parallel group; None = the most, up to 8, that the experts can be divided among.
        nodes: among which devices are divided evenly.
        redundant: slots of every layer beyond one per expert; for methods that replicate.
        requests: that are decoded together, over all devices.
        domains: comma list of those whose text counts; None = all.
        attention: milliseconds that attention of a layer runs; bandwidth: GB/s between devices; free_slots: experts of
            each layer that a device has memory for beside its own. For methods that copy meanwhile.
        allow_invalid: take a run whose checks failed.

    Raises:
        InputError: no such method or domain.
    """
    known = find(method)
    found: dict[str, Any] = {"method": method, "nodes": nodes}
    found["devices"] = frames_of.first_devices(run) if devices is None else devices
    found |= {"max_tokens": tokens_of(run), "batch": requests} if run.has_trace else {}
    found |= {"redundant": redundant} if known.replicates and redundant else {}
    if known.required == ("attention", "bandwidth"):
        found["options"] = (("attention", attention / 1e3), ("bandwidth", bandwidth * 1e9), ("free_slots", free_slots))
    names = domains_of(run, domains)
    return found | ({"domains": names} if names else {}) | ({"allow_invalid": True} if allow_invalid else {})


def tokens_of(run: store.Run) -> int:
    """Tokens of a trace that are read at most: fewer of a model of many layers."""
    each = sum(layer.top_k for layer in run.layers)
    return max(min(TOKENS, SELECTIONS // max(each, 1)), 1)


def _of_placement(draw: Callable[..., Exhibit]) -> Callable[..., Exhibit]:
    """An exhibit of a placement: what it can be told is the same for all of them, see :func:`asked`."""

    def make(
        run: store.Run,
        *,
        frames: Frames = fresh,
        theme: Theme = "light",
        method: str = METHOD,
        devices: int | None = None,
        nodes: int = 1,
        redundant: int = 0,
        requests: int = BATCH,
        domains: str | None = None,
        attention: float = ATTENTION_MS,
        bandwidth: float = BANDWIDTH_GB,
        free_slots: int = FREE_SLOTS,
        allow_invalid: bool = False,
    ) -> Exhibit:
        require_placeable(run)
        wanted = asked(
            run, method=method, devices=devices, nodes=nodes, redundant=redundant, requests=requests, domains=domains,
            attention=attention, bandwidth=bandwidth, free_slots=free_slots, allow_invalid=allow_invalid,
        )  # fmt: skip
        try:
            found = frames(frames_of.placed, run, **wanted)
        except PlanError as error:
            raise Absent(f"There is no such placement: {error}") from error
        return draw(found, theme)

    make.__name__, make.__qualname__, make.__doc__ = draw.__name__, draw.__qualname__, draw.__doc__
    return make


def require_placeable(run: store.Run) -> None:
    """Refuse runs from which nothing can be placed.

    Raises:
        Absent: with the reason.
    """
    if run.live:
        raise Absent("Placements rest on the whole run: they can be made when the collection ends.")
    try:
        placeable(run, allow_invalid=True)
    except PlanError as error:
        raise Absent(f"Nothing can be placed: {error}") from error


def _require_later_text(found: Placed) -> None:
    if found.verdict is None:
        raise Absent("This run holds counts and no trace: what crosses devices, and passes, are not known.")


def _loads(found: Placed, side: Side, theme: Theme) -> Exhibit:
    frame = frames_of.device_loads(found)
    read = {
        "before": "Near the background: as much to do as the mean. Orange devices have more than the mean, and all "
        "others wait for them.",
        "after": "The same experts, moved, on the same scale of colours. What stays orange could not be foreseen, or "
        "is too popular for one device.",
    }
    return Exhibit(
        figure=figures.load_map(frame, name=side, bound=figures.bound_of(frame), theme=theme),
        frame=frame,
        read=read[side],
        rests_on="Later text than the placement was made from."
        if found.verdict
        else "The counts that it was made from.",
        alt=f"Map of layers and devices: load over the mean, {frames_of.WORDS[side]}",
    )


@_of_placement
def loads_before(found: Placed, theme: Theme) -> Exhibit:
    """Load of every device as experts lie."""
    return _loads(found, "before", theme)


@_of_placement
def loads_after(found: Placed, theme: Theme) -> Exhibit:
    """Load of every device in the placement."""
    return _loads(found, "after", theme)


@_of_placement
def windows(found: Placed, theme: Theme) -> Exhibit:
    """Balancedness of every layer, over windows of text."""
    frame = frames_of.layers(found)
    if found.verdict is None:
        read, rests_on = (
            "Mean over largest load of a device; 1 = all carry as much. Layers where the lines meet gain nothing.",
            "The counts that the placement was made from.",
        )
    else:
        read, rests_on = (
            f"Loads added up over {found.verdict.after.load.shape[0]} windows of later text, then mean over largest. "
            "Long windows flatter: an engine waits in every pass.",
            "LPT, later text: it knew what comes.",
        )
    return Exhibit(
        figure=figures.layer_curves(frame, quantity="balancedness", theme=theme),
        frame=frame,
        read=read,
        rests_on=rests_on,
        alt="Balancedness of every layer, for the placements beside each other",
    )


@_of_placement
def balance(found: Placed, theme: Theme) -> Exhibit:
    """Balancedness of every layer, over forward passes."""
    _require_later_text(found)
    frame = frames_of.layers(found)
    return Exhibit(
        figure=figures.layer_curves(frame, quantity="per_pass", theme=theme),
        frame=frame,
        read=f"How evenly single passes of {found.batch} requests keep devices busy, which is what costs time. Near "
        "the dotted line only chance is left: more requests at once help then, and no placement does.",
        alt="Balancedness of every layer by forward passes, for the placements beside each other",
    )


@_of_placement
def passes(found: Placed, theme: Theme) -> Exhibit:
    """How the balancedness of forward passes spreads."""
    _require_later_text(found)
    frame = frames_of.by_pass(found)
    return Exhibit(
        figure=figures.pass_histogram(frame, theme=theme),
        frame=frame,
        read="How many passes use which part of the devices' time. A placement pays where it moves the hill to the "
        "right; the dotted hill is about as far as chance lets it.",
        rests_on=f"{found.passes['after'].tokens.size:,} passes, all layers of a pass together.",
        alt="Distribution of balancedness over forward passes",
    )


@_of_placement
def pass_sizes(found: Placed, theme: Theme) -> Exhibit:
    """Balancedness of passes by how many tokens run together."""
    _require_later_text(found)
    frame = frames_of.by_size(found)
    return Exhibit(
        figure=figures.size_curves(frame, theme=theme),
        frame=frame,
        read="Few tokens cannot keep all devices busy, however experts lie: passes get emptier as requests end.",
        rests_on="Passes with as many tokens are added up; large points are many passes.",
        alt="Balancedness of passes against the number of tokens in them",
    )


@_of_placement
def traffic(found: Placed, theme: Theme) -> Exhibit:
    """Token-expert pairs that leave their device."""
    _require_later_text(found)
    frame = frames_of.layers(found)
    return Exhibit(
        figure=figures.layer_curves(frame, quantity="remote", theme=theme),
        frame=frame,
        read="Share of token-expert pairs that are computed on another device than the token's own. Replicas lower it; "
        "a placement without them hardly can, since requests lie anywhere.",
        rests_on=f"Chance: {1 - 1 / found.placement.devices:.0%} without replicas.",
        alt="Share of pairs that leave their device, per layer",
    )


@_of_placement
def spread(found: Placed, theme: Theme) -> Exhibit:
    """Devices that a token's experts lie on."""
    _require_later_text(found)
    frame = frames_of.layers(found)
    return Exhibit(
        figure=figures.layer_curves(frame, quantity="devices", theme=theme),
        frame=frame,
        read="Devices that a token's experts lie on: fewer mean less to send.",
        alt="Devices per token, per layer",
    )


@_of_placement
def moves(found: Placed, theme: Theme) -> Exhibit:
    """Pairs of adjacent layers' experts on different devices."""
    _require_later_text(found)
    if len(found.labels) < 2:
        raise Absent("The run has one MoE layer, and moves are from layer to layer.")
    frame = frames_of.moves(found)
    return Exhibit(
        figure=figures.move_curves(frame, theme=theme),
        frame=frame,
        read="Pairs of experts of adjacent layers that one token uses and that lie on different devices: what travels "
        "if a token stays where its expert ran. Methods by affinity lower this.",
        alt="Share of pairs of adjacent layers' experts on different devices",
    )


@_of_placement
def slots(found: Placed, theme: Theme) -> Exhibit:
    """Slots of every expert, where some have several."""
    if not found.replicas:
        raise Absent("Every expert has one slot: choose redundant slots, with a method that replicates.")
    frame, idle = frames_of.replicas(found), int(frames_of.movement(found)["idle"].sum())
    return Exhibit(
        figure=figures.replica_map(frame, theme=theme),
        frame=frame,
        read="Experts with several slots share their tokens among them: the busiest ones should have most."
        + (f" {idle:,} slots hold an expert that their device has already, and serve nothing." if idle else ""),
        rests_on=f"{found.replicas:,} redundant slots per layer.",
        alt="Map of layers and experts: slots",
    )


@_of_placement
def movement(found: Placed, theme: Theme) -> Exhibit:
    """Slots that change, and experts that are sent."""
    frame = frames_of.movement(found)
    return Exhibit(
        figure=figures.movement_bars(frame, theme=theme),
        frame=frame,
        read="Slots that hold another expert than in the map that engines begin with, and experts that a device has to "
        "be sent. Engines that load the map at the start pay nothing for it; those that rebalance pay this.",
        rests_on="Against the contiguous map with as many slots.",
        alt="Slots that change in every layer",
    )


@_of_placement
def domain_balance(found: Placed, theme: Theme) -> Exhibit:
    """Balancedness per pass of each domain, before and after."""
    _require_later_text(found)
    frame = frames_of.domains(found)
    return Exhibit(
        figure=figures.domain_bars(frame, theme=theme),
        frame=frame,
        read="The later text of each domain alone. Where the filled point lies left of the ring, the placement makes "
        "this domain slower. A domain has fewer requests than the mix, so its passes are smaller and less even.",
        rests_on="Placed for the mix of all domains chosen.",
        alt="Balancedness per pass of every domain before and after",
    )


EXHIBITS = (
    Entry("placement-balance", balance, "Balancedness per layer, forward passes", page="placement"),
    Entry("placement-passes", passes, "How the balancedness of passes spreads", page="placement"),
    Entry("placement-windows", windows, "Balancedness per layer, windows of text", page="placement", report=False),
    Entry("placement-pass-sizes", pass_sizes, "Balancedness by tokens in a pass", page="placement", report=False),
    Entry("placement-loads-before", loads_before, "Load per device as experts lie", page="placement"),
    Entry("placement-loads", loads_after, "Load per device in the placement", page="placement"),
    Entry("placement-domains", domain_balance, "Balancedness per pass by domain", page="placement"),
    Entry("placement-traffic", traffic, "Pairs that leave their device", page="placement", report=False),
    Entry("placement-spread", spread, "Devices per token", page="placement", report=False),
    Entry("placement-moves", moves, "Moves from layer to layer", page="placement", report=False),
    Entry("placement-slots", slots, "Slots of each expert", page="placement", report=False),
    Entry("placement-movement", movement, "What has to be moved", page="placement", report=False),
)
