"""Exhibits of the page Tokens: one sequence, its experts and a measure along its text. Each is of one part of it."""

from __future__ import annotations

from typing import Literal

import polars as pl

import store
from app.exhibits.absent import require
from app.exhibits.exhibit import Absent, Entry, Exhibit, Frames, fresh
from app.figures import tokens as figures
from app.figures.style import Theme
from app.frames import axes, token_measures, token_misses, tokens
from app.frames.expert import importance
from app.frames.expert_trace import layer_info
from app.frames.token_measures import Measured
from app.frames.token_routes import Routes
from moescope.errors import InputError

Name = Literal["entropy", "margin", "importance", "weight", "misses"]

READ = {
    "entropy": "High where the router hesitates: many experts would do, or none fits.",
    "margin": "Near 0 the choice of an expert is a tie, which rounding or quantisation can turn.",
    "importance": "High where the text needs experts that the score says to keep.",
    "weight": "High where this expert decides what the layer puts out.",
    "misses": "Stretches near 0 run from the cache; peaks wait for experts to be loaded.",
    "flip": "Where the other run uses other experts for the same token.",
}


def experts_along(
    run: store.Run,
    *,
    frames: Frames = fresh,
    theme: Theme = "light",
    sequence: int | None = None,
    start: int = 0,
    layer: str | None = None,
) -> Exhibit:
    """Expert x position: which experts the tokens of one sequence used in one layer."""
    number, label = _sequence(run, frames, sequence), _label(run, layer)
    frame = frames(_routes, run, sequence=number, first=start, last=start + tokens.PART - 1, label=label)
    count = frame["position"].n_unique()
    return Exhibit(
        figure=figures.routing_map(
            frame, layer=label, num_experts=layer_info(run, label).num_experts, sequence=number, theme=theme
        ),
        frame=frame,
        read="Each column is a token, each mark an expert it used. Horizontal dashes are experts that stay in use over "
        "many tokens: a cache likes them.",
        rests_on=f"{count:,} tokens of sequence {number}.",
        alt=f"Map of experts and positions of layer {label}",
    )


def measure_along(
    run: store.Run,
    *,
    frames: Frames = fresh,
    theme: Theme = "light",
    sequence: int | None = None,
    start: int = 0,
    measure: Name = "entropy",
    layer: str | None = None,
    every: bool = False,
    expert: int = 0,
    score: str = "frequency",
    policy: str = "lru",
    slots: int | None = None,
) -> Exhibit:
    """A measure of the tokens of one sequence along its text."""
    number, label = _sequence(run, frames, sequence), _label(run, layer)
    found = measured(
        run, frames, sequence=number, first=start, name=measure, label=label, every=every, expert=expert, score=score,
        policy=policy, slots=slots,
    )  # fmt: skip
    return of_measured(found, sequence=number, theme=theme)


def of_measured(found: Measured, *, sequence: int, theme: Theme, noted: bool = True) -> Exhibit:
    """A measure that was taken already, along the text; ``noted``: say what it is taken from."""
    return Exhibit(
        figure=figures.measure_curve(found.frame, found.measure, sequence=sequence, theme=theme),
        frame=found.frame,
        read=READ[found.measure.name] + (f" {found.measure.note}" if noted else ""),
        rests_on=f"{len(found.frame):,} tokens of sequence {sequence}.",
        alt=f"Curve along the text: {found.measure.label}",
    )


def measured(
    run: store.Run,
    frames: Frames,
    *,
    sequence: int,
    first: int,
    name: str,
    label: str,
    every: bool = False,
    expert: int = 0,
    score: str = "frequency",
    policy: str = "lru",
    slots: int | None = None,
    routes: Routes | None = None,
) -> Measured:
    """A measure of one part of a sequence.

    Args:
        routes: the experts of the part, where they have been read already.

    Raises:
        Absent: the run does not hold what it is taken from.
    """
    last = first + tokens.PART - 1
    if routes is None:
        routes = tokens.routes(run, sequence, first, last, None if every and name != "weight" else label)
    if name == "misses":
        size = slots if slots is not None else default_slots(run, label)
        info = layer_info(run, label)
        whole = frames(token_misses.misses, run, sequence=sequence, label=label, policy=policy, slots=size)
        part = whole.filter(pl.col("position").is_between(first, last))
        frame = token_measures.of_first(routes, label).drop("value")
        value = part.select("position", pl.col("missing").cast(pl.Float64).alias("value"))
        frame = frame.join(value, on="position", how="left", maintain_order="left")
        return Measured(token_misses.measure(label, policy, size, info.top_k), frame)
    scores = frames(importance, run) if name == "importance" else None
    return token_measures.measured(
        run, routes, sequence=sequence, name=name, label=label, every=every, expert=expert, score=score, scores=scores
    )  # fmt: skip


def default_slots(run: store.Run, label: str) -> int:
    """A quarter of the layer's experts, and at least those of one token."""
    info = layer_info(run, label)
    return min(max(info.num_experts // 4, info.top_k, 1), info.num_experts)


def _sequence(run: store.Run, frames: Frames, asked: int | None) -> int:
    require("The experts of single tokens", run, "trace", "order")
    if not run.has_trace:
        raise Absent("No sequence has been recorded: this run holds counts and no trace.")
    known = frames(tokens.sequences, run)["sequence"]
    if asked is None:
        return int(known[0])
    if not len(known.filter(known == asked)):
        ends = known.to_numpy()[[0, -1]].tolist()
        raise InputError(f"run {run.name!r} has no sequence {asked}; it has {ends[0]} to {ends[1]}")
    return asked


def _label(run: store.Run, layer: str | None) -> str:
    return layer if layer is not None else axes.layer_labels(run)[0]


def _routes(run: store.Run, sequence: int, first: int, last: int, label: str) -> pl.DataFrame:
    return tokens.routes(run, sequence, first, last, label).frame(label)


EXHIBITS = (
    Entry("token-experts", experts_along, "Experts along the text", page="tokens", report=False, layers=True),
    Entry("token-measure", measure_along, "A measure along the text", page="tokens", report=False, layers=True),
)
