"""What the sections of the page Architecture say of a run: its answer in a sentence or two, in Markdown.

An empty answer means that the run has nothing to say; the exhibits below it then say why.
"""

from __future__ import annotations

import polars as pl

import store
from app.exhibits import architecture, axes
from app.exhibits.exhibit import Frames, fresh
from app.findings.finding import listed
from app.frames import kinds as frames_of_kinds
from app.frames import layer_memory as frames_of_memory
from app.frames import neighbours as frames_of_neighbours
from app.frames import steps as frames_of_steps
from app.markdown import plain

LEAST_TOKENS = 100
"""Tokens of a class from which a sentence names it."""


def probability(run: store.Run, *, frames: Frames = fresh) -> str:
    """Whether a layer is unbalanced in a way that the balance loss does not see."""
    frame = architecture.spreads_of(run, frames)
    hidden = frame.filter(pl.col("unseen_imbalance")).sort("load_cv", descending=True)
    if len(hidden):
        worst = hidden.row(0, named=True)
        return (
            f"**The loss is satisfied, and the load is not balanced**, in {_layers(hidden)}: in layer "
            f"{worst['label']} the load's coefficient of variation is {worst['load_cv']:.2f} "
            f"({worst['noise_cv']:.2f} by chance), that of probability {worst['probability_cv']:.2f}; the loss reads "
            f"{worst['loss']:.3f}, where 1 is balance, and sees {max(worst['seen'], 0.0):.0%} of the imbalance."
        )
    worst = frame.sort("load_cv").row(-1, named=True)
    words = f"In no layer does flat probability hide an uneven load. Layer {worst['label']} is the least even: "
    words += f"the load's coefficient of variation is **{worst['load_cv']:.2f}** ({worst['noise_cv']:.2f} by chance), "
    words += f"that of probability **{worst['probability_cv']:.2f}**"
    return words + (f"; the balance loss sees {worst['seen']:.0%} of it." if worst["seen"] is not None else ".")


def shared(run: store.Run, *, frames: Frames = fresh, domain: str | None = None) -> str:
    """How large shared output is beside the routed one, and for which domain."""
    frame = architecture.shared_of(run, frames, domain)
    mine = frame.filter(pl.col("domain").is_null() if domain is None else pl.col("domain") == domain)
    mine = mine.drop_nulls("ratio").sort("ratio")
    if mine.is_empty():
        return ""
    low, high = mine.row(0, named=True), mine.row(-1, named=True)
    words = f"The shared experts add **{_times(high['ratio'])}** what the routed ones add in layer {high['label']}"
    words += f", and {_times(low['ratio'])} in layer {low['label']}." if len(mine) > 1 else "."
    means = frame.drop_nulls("domain").group_by("domain").agg(pl.col("ratio").mean()).drop_nulls().sort("ratio")
    if len(means) > 1:
        first, last = means.row(0, named=True), means.row(-1, named=True)
        words += f" Over the layers they carry most of {plain(last['domain'])} ({_times(last['ratio'])}), least of "
        words += f"{plain(first['domain'])} ({_times(first['ratio'])})."
    return words


def kinds(run: store.Run, *, frames: Frames = fresh, domain: str | None = None, phase: str | None = None) -> str:
    """What experts without a network take, and how many with one a token uses."""
    axes.require_kinds(run)
    frame = frames(frames_of_kinds.shares, run, domain=domain, phase=phase)
    if frame.is_empty():
        return ""
    totals = frame.group_by("kind").agg(pl.col("selections", "experts").sum())
    free = totals.filter(pl.col("kind") != "routed")
    share, even = (_total(free, name) / max(_total(totals, name), 1.0) for name in ("selections", "experts"))
    layers = frame.filter(pl.col("kind") == "routed").sort("computed")
    words = f"**{share:.1%}** of the selections fall on experts that compute nothing, which are {even:.1%} of the "
    words += f"experts. A token uses **{mean(layers['computed']):.2f}** experts with a network per layer"
    if len(layers) > 1:
        low, high = layers.row(0, named=True), layers.row(-1, named=True)
        words += f", fewest in layer {low['label']} ({low['computed']:.2f}), most in layer {high['label']} "
        words += f"({high['computed']:.2f})"
    classes = frames(frames_of_kinds.by_token, run).classes.filter(pl.col("label") == "all").unique("token_class")
    classes = classes.filter(pl.col("tokens") >= LEAST_TOKENS).sort("computed")
    if len(classes) > 1:
        words += f". By class of tokens, *{classes['token_class'][-1]}* costs most ({classes['computed'][-1]:.2f}), "
        words += f"*{classes['token_class'][0]}* least ({classes['computed'][0]:.2f})"
    return words + "."


def steps(run: store.Run, *, frames: Frames = fresh) -> str:
    """Whether further steps run the same experts again."""
    axes.require_steps(run)
    frame = frames(frames_of_steps.repeats, run)
    if frame.is_empty():
        return ""
    above = frame.filter(pl.coalesce("low", "repeat") > pl.col("popularity"))
    below = frame.filter(pl.coalesce("high", "repeat") < pl.col("popularity"))
    top = frame.sort("repeat").row(-1, named=True)
    words = (
        f"In **{len(above)} of {len(frame)}** further steps tokens choose the experts of the step before more often "
    )
    words += f"than popularity explains, in {len(below)} less often. Most often in {top['label']}: "
    return words + f"**{top['repeat']:.1%}** of the choices ({top['popularity']:.1%} by popularity)."


def axis(run: store.Run, *, frames: Frames = fresh, axis: str | None = None) -> str:
    """How much routing goes with an axis, against shuffled values, and which value is routed most differently."""
    name = axes.axis_in(run, frames, axis)
    frame = axes.distances_of(run, frames, name)
    whole = frame.filter(pl.col("value") == "")
    above = whole.filter(pl.coalesce("low", "distance") > pl.coalesce("chance_high", "chance"))
    if above.is_empty():
        top = whole.sort("distance").row(-1, named=True)
        return (
            f"Routing does **not** go with {plain(name)} beyond chance: at most {top['distance']:.1%} of the "
            f"selections differ, in layer {top['label']} ({top['chance']:.1%} with values shuffled)."
        )
    top = above.sort(pl.col("distance") - pl.col("chance")).row(-1, named=True)
    words = (
        f"Routing goes with **{plain(name)}** in {len(above)} of {len(whole)} layers, most in layer {top['label']}: "
    )
    words += f"**{top['distance']:.1%}** of the selections would have to go elsewhere ({top['chance']:.1%} with values "
    words += "shuffled)."
    values = frame.filter((pl.col("value") != "") & (pl.col("label") == top["label"])).drop_nulls("chance")
    if values.is_empty():
        return words
    far = values.sort(pl.col("distance") - pl.col("chance")).row(-1, named=True)
    return (
        words + f" There, {plain(name)} {plain(far['value'])} lies furthest from the average ({far['distance']:.1%})."
    )


def memory(run: store.Run, *, frames: Frames = fresh) -> str:
    """How much of a choice follows from the layer before, and what a second one adds."""
    frame = architecture.entropies_of(run, frames)
    observed = frame.filter(pl.col("control") == "observed")
    known = observed.pivot(on="known", index="label", values="bits", maintain_order=True)
    lost = frame.filter((pl.col("control") == "shuffled") & (pl.col("known") == "layer before"))
    known = known.join(lost.select("label", pl.col("bits").alias("shuffled")), on="label", how="left")
    if not {"nothing", "layer before"} <= set(known.columns):
        return ""
    known = known.drop_nulls(["nothing", "layer before"]).with_columns(
        (pl.col("shuffled") - pl.col("layer before")).alias("gain")
    )
    known = known.drop_nulls("gain").sort("gain")
    if known.is_empty():
        return ""
    top = known.row(-1, named=True)
    words = f"The layer before says most about layer {top['label']}: of {top['nothing']:.2f} bits, "
    words += f"**{top['layer before']:.2f}** stay open ({top['shuffled']:.2f} when another token's choice is known)"
    if len(known) > 1:
        words += f"; on average it says {mean(known['gain']):.2f} bits"
    more = frames(frames_of_memory.memory, run).drop_nulls("gain")
    if more.is_empty():
        return words + "."
    best = more.sort("gain").row(-1, named=True)
    clear = more.filter(pl.coalesce("low", "bits") > pl.col("chance"))
    words += f". A second layer back adds to first choices in {len(clear)} of {len(more)} layers beyond chance: up to "
    return words + f"**{best['gain']:.2f} bits**, in layer {best['label']}."


def neighbours(run: store.Run, *, frames: Frames = fresh) -> str:
    """Where a router does well on its neighbour's input, and how near experts of neighbouring layers come."""
    words = ""
    early = frames(frames_of_neighbours.recalls, run).sort("recall")
    if len(early):
        top, low = early.row(-1, named=True), early.row(0, named=True)
        beside = f" (popularity {top['popularity']:.0%})" if top["popularity"] is not None else ""
        words = (
            f"On the input of the layer before, the router of layer {top['label']} finds **{top['recall']:.0%}** of "
        )
        words += f"its choices{beside}"
        words += f", that of layer {low['label']} {low['recall']:.0%}. " if len(early) > 1 else ". "
    alike = frames(frames_of_neighbours.similarity, run).pivot(on="control", index="label", values="cosine")
    if {"observed", "shuffled", "within"} <= set(alike.columns):
        means = alike.select(pl.col("observed", "within", "shuffled").mean()).row(0, named=True)
        words += f"By mean output, the nearest expert of the layer before has cosine **{means['observed']:.2f}** on "
        words += f"average, the nearest of the own layer {means['within']:.2f} ({means['shuffled']:.2f} with channels "
        words += "shuffled)."
    return words.strip()


def rows(run: store.Run, *, frames: Frames = fresh) -> str:
    """Whether the routers' rows look random."""
    frame = architecture.rows_of(run, frames).drop_nulls("spread").sort("spread")
    if frame.is_empty():
        return ""
    low, high = frame.row(0, named=True), frame.row(-1, named=True)
    near = frame.filter(pl.col("near_copies") > 0)
    far = "look random" if high["spread"] < 1.2 else "are not random vectors"
    words = f"The routers' rows **{far}**: the spread of their cosines is {low['spread']:.2f}"
    words += f" to {high['spread']:.2f} times" if len(frame) > 1 else " times"
    words += " that of random rows. "
    if near.is_empty():
        return words + "No two rows are nearly the same."
    return words + f"**{near['near_copies'].sum():,} pairs** of rows are nearly the same, in {_layers(near)}."


def mean(values: pl.Series) -> float:
    """The mean of the known values; 0 of none."""
    known = values.drop_nulls().to_list()
    return float(sum(known) / len(known)) if known else 0.0


def _total(frame: pl.DataFrame, name: str) -> float:
    return float(frame[name].sum())


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f} times"


def _layers(frame: pl.DataFrame) -> str:
    names = frame["label"].to_list()
    return f"layer{'s' if len(names) > 1 else ''} {listed(names)}"
