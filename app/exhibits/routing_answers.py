"""What the sections of the page Routing say of a run: its answer in a sentence or two, in Markdown, with the figures.

An empty answer means that the run has nothing to say; the exhibits below it then say why.
"""

from __future__ import annotations

import math

import polars as pl

import store
from app.exhibits import flow, specialization
from app.exhibits.exhibit import Absent, Frames, fresh
from app.frames import confidence as frames_of_confidence
from app.frames import domains as frames_of_domains
from app.frames import flow as frames_of_flow
from app.frames import load as frames_of_load
from app.frames import specialization as frames_of_specialization
from app.markdown import plain

NEAR_NOISE = 1.5
"""A coefficient of variation below so many times what chance gives is called chance."""


def load(run: store.Run, *, frames: Frames = fresh, domain: str | None = None, phase: str | None = None) -> str:
    """Which layer is the least even, which expert leads there, and how many experts are unused."""
    even = frames(frames_of_load.balance, run, domain=domain, phase=phase).drop_nulls("max_violation")
    if even.is_empty():
        return ""
    worst, best = (even.sort("max_violation").row(place, named=True) for place in (-1, 0))
    experts = frames(frames_of_load.expert_load, run, domain=domain, phase=phase)
    top = experts.filter(pl.col("label") == worst["label"]).sort("relative").row(-1, named=True)
    words = f"Layer **{worst['label']}** is the least even: its expert {top['expert']} takes "
    words += f"**{top['relative']:.1f} times** the uniform share"
    if len(even) > 1:
        words += f"; in layer {best['label']}, the most even, the busiest takes {best['max_violation'] + 1:.1f} times"
    if worst["cv"] < NEAR_NOISE * worst["noise_cv"]:
        words += f" (a balanced router would vary about as much on so few tokens: CV {worst['cv']:.2f} against "
        words += f"{worst['noise_cv']:.2f} by chance)"
    dead, chance = int(even["dead"].sum()), float(even["expected_dead"].sum())
    total = int(even["num_experts"].sum())
    if not dead:
        return f"{words}. All {total:,} experts were used."
    where = even.filter(pl.col("dead") > 0)["label"].to_list()
    layers = f"in {len(where):,} layers" if len(where) > 1 else f"in layer {where[0]}"
    return (
        f"{words}. **{dead:,} of {total:,} experts** were never used ({layers}); a balanced router leaves {chance:.2g}."
    )


def domains(run: store.Run, *, frames: Frames = fresh, domain: str | None = None, phase: str | None = None) -> str:
    """Which domain differs most from the others, and which experts a domain prefers."""
    if len(run.domains) < 2:
        return ""
    moved = frames(frames_of_domains.specialization, run, phase=phase)
    if moved.is_empty():
        return ""
    means = frames(frames_of_domains.farthest, run, phase=phase)
    most, least = means.row(0, named=True), means.row(-1, named=True)
    layers = moved.group_by("label", maintain_order=True).agg(pl.col("moved").mean()).sort("moved").row(-1)
    named, its = f"**{plain(most['domain'])}** differs most", "its"
    if len(means) == 2:  # both lie as far from their mean
        named, its = f"**{plain(most['domain'])}** and **{plain(least['domain'])}** differ", "either's"
    words = f"{named}: over the layers, **{most['moved']:.0%}** of {its} selections would "
    words += f"have to move to turn {its} load into the mean of the domains ({most['noise']:.1%} by chance)"
    words += f"; {plain(least['domain'])} differs least ({least['moved']:.0%}). " if len(means) > 2 else ". "
    if moved["label"].n_unique() > 1:
        words += f"Domains lie furthest apart in layer {layers[0]} ({layers[1]:.0%} on average)."
    shown = domain or most["domain"]
    shares = frames(frames_of_domains.domain_shares, run, phase=phase).filter(pl.col("domain") == shown)
    if shares.is_empty():
        return words
    top = shares.sort("difference").row(-1, named=True)
    return (
        f"{words} What {plain(shown)} prefers most is expert {top['expert']} of layer {top['label']}: "
        f"{top['share']:.1%} of its selections there, {top['pooled_share']:.1%} in the mean."
    )


def purpose(run: store.Run, *, frames: Frames = fresh, kind: str | None = None, form: str = "expert") -> str:
    """How far experts are for something, against shuffled tokens, and whether such experts serve segments."""
    try:
        kind = kind or specialization.kinds_of(run, frames)[0]
    except Absent:
        return ""
    known = frames(frames_of_specialization.specialization, run).filter(
        (pl.col("kind") == kind) & (pl.col("form") == form)
    )
    known = known.filter(pl.col("at").is_null() | (pl.col("at") >= specialization.LEAST_OCCURRENCES))
    whole = known.filter(pl.col("layer").is_null())
    layers = known.drop_nulls(["layer", "value"]).sort("value")
    if whole.is_empty() or layers.is_empty():
        return ""
    row, top = whole.row(0, named=True), layers.row(-1, named=True)
    words = f"Specialization in {frames_of_specialization.KINDS[kind]}: **{row['value']:.2f}**{_range(row, '.2f')}"
    controls = [("shuffled", "with tokens shuffled"), ("shuffled_in_sequence", "shuffled inside sequences")]
    beside = [f"{row[name]:.2f} {said}" for name, said in controls if row[name] is not None]
    words += f", against {' and '.join(beside)}" if beside else ""
    words += f"; strongest in layer {top['label']} ({top['value']:.2f})." if len(layers) > 1 else "."
    found = frames(frames_of_specialization.correlations, run).filter(pl.col("kind") == kind).drop_nulls("value")
    if found.is_empty():
        return words
    one = found.row(0, named=True)
    if one["low"] is None or one["low"] <= one["value"] <= one["high"]:
        return words + " How long an expert stays in use does not depend on it beyond chance."
    more = "longer" if one["value"] > one["high"] else "more briefly"
    return words + f" Specialised experts stay in use **{more}** than chance explains (correlation {one['value']:.2f})."


def confidence(
    run: store.Run,
    *,
    frames: Frames = fresh,
    domain: str | None = None,
    phase: str | None = None,
    quantity: str = "entropy",
) -> str:
    """In which layers the router is most and least decided, by one quantity."""
    frame = frames(frames_of_confidence.confidence, run, domain=domain, phase=phase)
    frame = frame.filter(pl.col("quantity") == quantity).drop_nulls("p50").sort("p50")
    if frame.is_empty():
        return ""
    low, high = frame.row(0, named=True), frame.row(-1, named=True)
    name, unit = _QUANTITIES[quantity]
    decided, undecided = (low, high) if quantity == "entropy" else (high, low)
    if len(frame) == 1:
        words = f"The router's median {name} is **{decided['p50']:.3g}{unit}**"
    else:
        words = f"The router is most decided in layer **{decided['label']}** (median {name} "
        words += f"**{decided['p50']:.3g}{unit}**) and least in layer **{undecided['label']}** "
        words += f"({undecided['p50']:.3g}{unit})"
    if quantity != "entropy":
        return words + "."
    return words + f"; between all experts alike it would be {math.log(undecided['num_experts']):.3g} nats."


def pairs(run: store.Run, *, frames: Frames = fresh, layer: str | None = None, domain: str | None = None) -> str:
    """Which two experts of a layer attract each other most, and how far pairs are more than popularity."""
    parts = []
    try:
        frame = flow.pairs_of(run, frames, layer, domain)
    except Absent:
        return ""
    best = frames_of_flow.strongest(frame).head(1)
    if len(best):
        row = best.row(0, named=True)
        parts.append(
            f"Experts **{row['expert']} and {row['other']}** of layer {flow.first_layer(run, layer)} meet "
            f"**{row['attraction']:.1f} times** as often as their popularity explains ({row['joint_tokens']:,} tokens)."
        )
    over = frames(frames_of_flow.excess, run).drop_nulls("excess").sort("excess")
    if len(over):
        low, high = over.row(0, named=True), over.row(-1, named=True)
        noise = f", where noise gives {high['noise']:.1%}" if high["noise"] is not None else ""
        nearest = f"; layer {low['label']} is nearest ({low['excess']:.0%})" if len(over) > 1 else ""
        furthest = "is furthest from" if len(over) > 1 else "differs from"
        parts.append(
            f"Layer {high['label']} {furthest} independent experts: **{high['excess']:.0%}** of its pairs would "
            f"have to be others{noise}{nearest}."
        )
    return " ".join(parts)


def foresight(run: store.Run, *, frames: Frames = fresh, domain: str | None = None, phase: str | None = None) -> str:
    """What k fetched experts hold of the next layer's choices: by transitions, popularity, routers run early."""
    held_out = frames(frames_of_flow.predictability, run)
    early = frames(frames_of_flow.lookaheads, run, domain=domain, phase=phase)
    return foreseen(held_out, early, part=domain is not None or phase is not None)


def foreseen(held_out: pl.DataFrame, early: pl.DataFrame, *, part: bool = False) -> str:
    """:func:`foresight` of its frames; ``part``: ``early`` is of a part of the text, which ``held_out`` never is."""
    overall = held_out.filter((pl.col("label") == "all") & (pl.col("extra") == 0) & (pl.col("control") == "observed"))
    where = " in all text" if part else ""
    parts = [
        f"**{row['value']:.1%}**{_range(row, '.1%')} by {_BY[row['predictor']]}{where}"
        for row in overall.to_dicts()[::-1]
    ]
    near = early.filter((pl.col("distance") == 1) & (pl.col("extra") == 0))
    parts += [
        f"**{mean:.1%}** by {_BY[name]}"
        for name, mean in near.group_by("input", maintain_order=True).agg(pl.col("value").mean()).sort("input").rows()
    ]
    if not parts:
        return ""
    if len(overall):
        parts.append(f"{overall['chance'][0]:.1%} by chance")
    return "Of the next layer's choices, k fetched experts hold " + ", ".join(parts) + "."


_BY = {
    "transition": "the experts of the layer before",
    "popularity": "popularity alone",
    "router": "its router run early",
    "residual": "its router run early through its own norm",
}
_QUANTITIES = {
    "entropy": ("entropy", " nats"),
    "top_probability": ("largest probability", ""),
    "selected_probability": ("probability of the selection", ""),
    "first_margin": ("lead of the first choice", " logits"),
    "boundary_margin": ("lead of the last expert taken", " logits"),
}


def _range(row: dict[str, float | None], form: str) -> str:
    return "" if row["low"] is None else f" ({row['low']:{form}} to {row['high']:{form}})"
