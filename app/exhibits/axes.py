"""Exhibits of the page Architecture on kinds of experts, chained steps, and free axes."""

from __future__ import annotations

from typing import Literal

import polars as pl

import store
from app.exhibits.absent import not_yet, require
from app.exhibits.exhibit import Absent, Entry, Exhibit, Frames, fresh
from app.exhibits.flow import first_layer
from app.exhibits.routing import where_of
from app.figures import architecture as curves
from app.figures import axis as figures
from app.figures import heatmap
from app.figures.style import Theme, safe
from app.frames import axis as frames_of_axis
from app.frames import kinds as frames_of_kinds
from app.frames import load as frames_of_load
from app.frames import steps as frames_of_steps
from app.frames.axes import most
from app.markdown import plain
from moescope.errors import InputError

Of = Literal["load", "router"]


def kinds(
    run: store.Run,
    *,
    frames: Frames = fresh,
    theme: Theme = "light",
    domain: str | None = None,
    phase: str | None = None,
) -> Exhibit:
    """What each kind of expert takes of the selections, over the layers."""
    require_kinds(run)
    frame = frames(frames_of_kinds.shares, run, domain=domain, phase=phase)
    where = where_of(domain, phase)
    return Exhibit(
        figure=figures.kind_bars(frame, words=frames_of_kinds.WORDS, where=safe(where), theme=theme),
        frame=frame,
        read="Selections of experts that compute nothing cost nothing. The mark is what experts with a network would "
        "take if all experts were alike.",
        rests_on=f"{frame['selections'].sum():,} selections, {plain(where)}.",
        alt=f"Stacked bars over the layers: selections by kind of expert, {where}",
    )


def kind_classes(
    run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", layer: str | None = None
) -> Exhibit:
    """What each kind takes of the selections of each class of tokens; of one layer, or of all together."""
    require_kinds(run)
    every = frames(frames_of_kinds.by_token, run).classes
    if every.is_empty():
        raise Absent("Classes of tokens take the token ids of the text and the trace; this run does not keep both.")
    frame = every.filter(pl.col("label") == (layer or "all"))
    where = f"layer {safe(layer)}" if layer else "all layers"
    return Exhibit(
        figure=figures.class_bars(frame, words=frames_of_kinds.WORDS, where=where, theme=theme),
        frame=frame,
        read="Which tokens cost more. A word begins behind a space; a fragment goes on without one, as do the letters "
        "of scripts that write no spaces and the first word of a line.",
        rests_on=f"{frame.unique('token_class')['tokens'].sum():,} tokens.",
        alt=f"Stacked bars by class of tokens: selections by kind of expert, {where}",
    )


def step_load(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", step: int = 0) -> Exhibit:
    """Layer x expert: load in one step of the layers."""
    require_steps(run)
    known = frames_of_steps.steps_of(run)
    if step not in known:
        raise InputError(f"step {step} is none of {', '.join(map(str, known))}")
    frame = frames(frames_of_load.expert_load, run).filter(pl.col("step") == step)
    return Exhibit(
        figure=heatmap.load_map(frame, where=f"step {step}", theme=theme),
        frame=frame,
        read="Orange experts get less than their uniform share in this step, blue ones more, in factors of two.",
        rests_on=f"{frame['tokens'].sum():,} selections.",
        alt=f"Map of layers and experts: load in step {step}",
    )


def step_repeat(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light") -> Exhibit:
    """How often a step runs the experts of the step before again, over the steps."""
    require_steps(run)
    frame = frames(frames_of_steps.repeats, run)
    if frame.is_empty():
        require("How often steps repeat experts", run, "trace")
        raise not_yet("How often steps repeat experts", run)
    return Exhibit(
        figure=curves.repeat_curves(frame, theme=theme),
        frame=frame,
        read="Above popularity, a further step runs the same experts again on what they just changed; below it, steps "
        "share the work among different ones.",
        rests_on=f"{most(frame['tokens']):,.0f} tokens; 95 % intervals leave out each sixteenth of the sequences.",
        alt="Curves over the steps: share of choices that the step before made too, and by popularity",
    )


def step_entropy(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", of: Of = "load") -> Exhibit:
    """Entropy of each step over the layers."""
    require_steps(run)
    frame = frames(frames_of_steps.entropies, run, of=of)
    if frame.is_empty():
        require("Entropy per step", run, "logits")
        raise Absent("The router's logits were not seen in this run.")
    return Exhibit(
        figure=curves.step_entropy_curves(frame, of=frames_of_steps.ENTROPIES[of], theme=theme),
        frame=frame,
        read={
            "load": "Whether a further step uses as many experts as the first one: 100 % is an even load.",
            "router": "Whether the router of a further step decides as clearly: 100 % is one that does not care.",
        }[of],
        rests_on=f"{most(frame['tokens']):,.0f} tokens per step.",
        alt=f"Curves over the layers, one per step: entropy of the {frames_of_steps.ENTROPIES[of]}",
    )


def axis_shares(
    run: store.Run,
    *,
    frames: Frames = fresh,
    theme: Theme = "light",
    axis: str | None = None,
    layer: str | None = None,
) -> Exhibit:
    """Value of an axis x expert of one layer: share of selections against all text."""
    name, label = axis_in(run, frames, axis), first_layer(run, layer)
    frame = frames(frames_of_axis.shares, run, axis=name, label=label)
    return Exhibit(
        figure=figures.share_map(frame, axis=name, label=label, theme=theme),
        frame=frame,
        read="Blue experts take more of the value's selections than of all, orange ones less, in factors of two. "
        "Columns that change colour downwards are experts for a part of the axis.",
        rests_on=f"{frame['tokens'].sum():,} selections.",
        alt=f"Map of {plain(name)} by experts of layer {label}: share against all text",
    )


def axis_spread(
    run: store.Run,
    *,
    frames: Frames = fresh,
    theme: Theme = "light",
    axis: str | None = None,
    layer: str | None = None,
) -> Exhibit:
    """Effective experts and experts per token by value of an axis, in one layer."""
    name, label = axis_in(run, frames, axis), first_layer(run, layer)
    frame = frames(frames_of_axis.values, run, axis=name, label=label)
    return Exhibit(
        figure=figures.value_spread(frame, axis=name, label=label, theme=theme),
        frame=frame,
        read="As many equally loaded experts have the entropy of the value's load. Where few are active, a schedule "
        "over the axis could load or compute fewer; few tokens alone also read as few experts.",
        rests_on=f"{frame['tokens'].sum():,} tokens, {least_tokens(frame):,} or more per value.",
        alt=f"Curves over {plain(name)}: effective experts and experts per token, layer {label}",
    )


def axis_distance(
    run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", axis: str | None = None
) -> Exhibit:
    """How much routing depends on an axis, over the layers."""
    name = axis_in(run, frames, axis)
    frame = distances_of(run, frames, name).filter(pl.col("value") == "")
    return Exhibit(
        figure=figures.distance_curves(frame, axis=name, theme=theme),
        frame=frame,
        read="The part of a value's selections that would have to go to other experts to route like all text, averaged "
        "over the values. For the dotted line values are shuffled: what lies above it goes with the axis.",
        rests_on=f"{most(frame['tokens']):,.0f} tokens of {most(frame['sequences']):,.0f} sequences; 95 % intervals "
        "leave out each sixteenth of them.",
        alt=f"Curves over the layers: distance of routing along {plain(name)}, and with values shuffled",
    )


def axis_values(
    run: store.Run,
    *,
    frames: Frames = fresh,
    theme: Theme = "light",
    axis: str | None = None,
    layer: str | None = None,
) -> Exhibit:
    """How far the routing of each value of an axis lies from the average, in one layer."""
    name, label = axis_in(run, frames, axis), first_layer(run, layer)
    frame = distances_of(run, frames, name).filter((pl.col("value") != "") & (pl.col("label") == label))
    return Exhibit(
        figure=figures.value_distances(frame, axis=name, label=label, theme=theme),
        frame=frame,
        read="Values with bars far above their marks are routed in a way of their own; a bar at its mark is what as "
        "few tokens give of nothing.",
        rests_on=f"{frame['tokens'].sum():,} tokens.",
        alt=f"Bars over {plain(name)}: distance from the average routing in layer {label}, and with values shuffled",
    )


def axis_in(run: store.Run, frames: Frames, axis: str | None) -> str:
    """The axis, or the run's first.

    Raises:
        Absent: the run has no trace.
        InputError: it has no such axis.
    """
    if not run.layers or not run.has_trace:
        require("Routing along axes", run, "trace", "order")
        raise Absent("Axes are looked at in the trace, which this run does not have.")
    known = frames(frames_of_axis.names, run)
    if axis is not None and axis not in known:
        raise InputError(f"axis {axis!r} is none of {', '.join(known[:20])}")
    return axis or known[0]


def distances_of(run: store.Run, frames: Frames, axis: str) -> pl.DataFrame:
    """``frames.axis.distances`` of one axis.

    Raises:
        Absent: it was not computed, or the axis has a single value.
    """
    every = frames(frames_of_axis.distances, run)
    frame = every.filter(pl.col("axis") == axis)
    if not frame.is_empty():
        return frame
    if every.is_empty():
        raise not_yet("How far routing goes with axes", run)
    raise Absent(f"Axis {axis} has a single value in this run: nothing to compare.")


def require_kinds(run: store.Run) -> None:
    """Refuse a run whose experts all have a network.

    Raises:
        Absent: it is one.
    """
    if not frames_of_kinds.has_kinds(run):
        raise Absent("Every expert of this model has a network: none is a zero, copying or constant one.")


def require_steps(run: store.Run) -> None:
    """Refuse a run whose layers call their experts once.

    Raises:
        Absent: it is one.
    """
    if len(frames_of_steps.steps_of(run)) < 2:
        raise Absent("Every layer of this model calls its experts once: there are no steps.")


def least_tokens(frame: pl.DataFrame) -> int:
    """The fewest tokens of a row."""
    return int(frame["tokens"].min() or 0)  # type: ignore[arg-type]


EXHIBITS = (
    Entry("kinds", kinds, "Kinds of experts", page="architecture"),
    Entry("kind-classes", kind_classes, "Kinds by class of tokens", page="architecture"),
    Entry("step-load", step_load, "Load in one step", page="architecture"),
    Entry("step-repeat", step_repeat, "The same expert again in the next step", page="architecture"),
    Entry("step-entropy", step_entropy, "Entropy per step", page="architecture"),
    Entry("axis-distance", axis_distance, "How much routing goes with an axis", page="architecture"),
    Entry("axis-values", axis_values, "Distance by value of an axis", page="architecture", layers=True),
    Entry("axis-shares", axis_shares, "Experts by value of an axis", page="architecture", layers=True),
    Entry("axis-spread", axis_spread, "Active experts by value of an axis", page="architecture", layers=True),
)
