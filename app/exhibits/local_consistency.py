"""Exhibits of the page Local consistency: SRP, caches of experts, repetition, and this run among published models."""

from __future__ import annotations

from typing import Literal

import polars as pl

import store
from app.exhibits.absent import not_yet, require
from app.exhibits.exhibit import Absent, Entry, Exhibit, Frames, fresh
from app.figures import consistency as figures
from app.figures import hit_rates as figures_of_caches
from app.figures.style import Theme
from app.frames import consistency as frames_of_consistency
from app.frames.axes import most
from app.markdown import plain
from profiler.metrics.published import SOURCE

Scope = Literal["shared", "layers"]
Policy = Literal["sch", "lru", "lfu", "belady"]

SCOPES = {"shared": "one cache for all layers", "layers": "one cache per layer, mean"}
SEGMENT = 16
"""Segment length that figures take where none is chosen, tokens."""
_WHAT = "Local consistency (SRP and hit rates)"


def srp(
    run: store.Run,
    *,
    frames: Frames = fresh,
    theme: Theme = "light",
    domain: str | None = None,
    published: bool = True,
) -> Exhibit:
    """SRP against segment length, beside its controls and 20 published models."""
    frame = _srp(run, frames, domain)
    return Exhibit(
        figure=figures.srp_curve(frame, _published(published), theme=theme),
        frame=frame,
        read="How well the best fixed set of experts for a whole segment stands in for the router's choice token by "
        "token. Tokens shuffled over all text leave popularity alone; shuffled in their sequences, they leave its "
        "topic. Only what lies above is consistency in time.",
        rests_on=f"{_tokens(frame, domain)}; bars are 95 % intervals over sequences.",
        alt="SRP against segment length with intervals, controls and published models",
    )


def router_size(
    run: store.Run,
    *,
    frames: Frames = fresh,
    theme: Theme = "light",
    domain: str | None = None,
    published: bool = True,
) -> Exhibit:
    """How many experts the fixed set of a segment holds, against segment length."""
    frame = _srp(run, frames, domain)
    return Exhibit(
        figure=figures.router_size_curve(frame, _published(published), theme=theme),
        frame=frame,
        read="How many experts that fixed set holds, relative to what a token uses. A small SRP that needs a large set "
        "means that nothing is saved.",
        rests_on=f"{_tokens(frame, domain)}.",
        alt="Router size that reaches the SRP against segment length",
    )


def srp_layers(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light") -> Exhibit:
    """SRP over the layers, a curve per segment length."""
    known(run, frames)
    frame = frames(frames_of_consistency.srp_layers, run)
    return Exhibit(
        figure=figures.srp_layer_curves(frame, theme=theme),
        frame=frame,
        read="Layers with a high SRP can share a small set of experts over many tokens: cache them first.",
        rests_on="All text.",
        alt="SRP of every layer for each segment length",
    )


def srp_map(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", segment: int = SEGMENT) -> Exhibit:
    """Layer x expert: SRP of each expert at one segment length."""
    frame = _srp_experts(run, frames, segment)
    return Exhibit(
        figure=figures.srp_map(frame, length=segment, theme=theme),
        frame=frame,
        read="The darker (in dark mode: the brighter), the better it is foreseen by whole segments whether a token "
        "uses the expert: it is used throughout them, or in bursts. Empty cells were never used.",
        rests_on=f"Segments of {segment} tokens; all text.",
        alt=f"Map of layers and experts: SRP over segments of {segment} tokens",
    )


def srp_experts(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", segment: int = SEGMENT) -> Exhibit:
    """SRP of every expert against how often it is used."""
    frame = _srp_experts(run, frames, segment)
    return Exhibit(
        figure=figures.srp_expert_scatter(frame, theme=theme),
        frame=frame,
        read="Experts far above the dotted curve come in bursts: they are needed for a stretch of text and then not.",
        rests_on=f"Segments of {segment} tokens; all text.",
        alt="SRP of every expert against its activation frequency",
    )


def hit_rates(
    run: store.Run,
    *,
    frames: Frames = fresh,
    theme: Theme = "light",
    scope: Scope = "shared",
    segment: int = SEGMENT,
) -> Exhibit:
    """Hit rate against cache size: LRU, LFU, and the bounds SCH and Belady."""
    rates = known_rates(run, frames)
    frame = rates.filter(pl.col("scope") == scope)
    rests = f"{most(frame['tokens']):,.0f} tokens; every sequence starts with an empty cache"
    return Exhibit(
        figure=figures_of_caches.hit_rate_curves(
            frame, segment_length=looked_ahead(frame, segment), scope_words=SCOPES[scope], theme=theme
        ),
        frame=frame,
        read="ρ = 1 is room for exactly what one token uses. LRU and LFU can be built; SCH looks ahead over a segment "
        "and Belady knows the whole future, so they bound what a predictor could win. Grey lines are LRU on shuffled "
        "tokens and on random experts: where LRU lies on them, order in the text does not help a cache.",
        rests_on=rests + ("; bands are 95 % intervals over sequences." if scope == "shared" else "."),
        alt="Hit rate of SCH, LRU, LFU and Belady against cache size, with controls",
    )


def hit_rate_layers(
    run: store.Run,
    *,
    frames: Frames = fresh,
    theme: Theme = "light",
    policy: Policy = "lru",
    segment: int = SEGMENT,
) -> Exhibit:
    """Hit rate of every layer's own cache, over the layers."""
    rates = known_rates(run, frames)
    own = _of_policy(rates, policy, segment).filter(~pl.col("scope").is_in(list(SCOPES)))
    return Exhibit(
        figure=figures_of_caches.hit_rate_layers(own, policy=policy, theme=theme),
        frame=own,
        read="Layers with a low hit rate want more slots, or none. ρ is slots over what one token uses of the layer.",
        rests_on=f"{most(own['tokens']):,.0f} tokens; bands are 95 % intervals over sequences, where there are any.",
        alt="Hit rate of every layer's own cache",
    )


def repetition(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light") -> Exhibit:
    """How often neighbouring tokens repeat experts, over the layers."""
    require("Repetition of experts", run, "trace", "order")
    frame = frames(frames_of_consistency.repetition, run)
    if frame.is_empty():
        raise not_yet("Repetition of experts", run)
    return Exhibit(
        figure=figures.repetition_curves(frame, theme=theme),
        frame=frame,
        read="How often the next token has the same first choice, and which part of its experts it shares. Shuffled "
        "tokens say what popularity alone gives; only what lies above is order in the text.",
        rests_on="All text, one token ahead.",
        alt="Curves over the layers: repetition of experts between neighbouring tokens",
    )


def overlap(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light") -> Exhibit:
    """Layer x distance: which part of their experts two tokens share."""
    require("Repetition of experts", run, "trace", "order")
    frame = frames(frames_of_consistency.repetition, run).filter(pl.col("metric") == "mean_overlap")
    if frame.is_empty():
        raise not_yet("Repetition of experts", run)
    if frame["lag"].n_unique() < 2:
        raise Absent("Experts in common were computed for neighbouring tokens only.")
    return Exhibit(
        figure=figures.overlap_map(frame, theme=theme),
        frame=frame,
        read="Where a row stays dark to the right (in dark mode: bright), the layer keeps its experts over a stretch "
        "of text; where it fades at once, it follows single tokens.",
        rests_on="All text.",
        alt="Map of layers and distances: share of the experts that two tokens have in common",
    )


def srp_published(
    run: store.Run,
    *,
    frames: Frames = fresh,
    theme: Theme = "light",
    segment: int = SEGMENT,
    domain: str | None = None,
) -> Exhibit:
    """SRP of this run among 20 published models."""
    at = pl.col("segment_length") == segment
    mine, others = _srp(run, frames, domain).filter(at), frames_of_consistency.published_srp().filter(at)
    title = f"SRP over {segment} tokens among 20 published models"
    return _among(run, mine, others, title=title, x="SRP", theme=theme)


def hit_rates_published(
    run: store.Run,
    *,
    frames: Frames = fresh,
    theme: Theme = "light",
    policy: Policy = "lru",
    ratio: float = 2.0,
    segment: int = SEGMENT,
) -> Exhibit:
    """Hit rate of this run among 20 published models, one cache shared by all layers."""
    mine, others = rates_among(known_rates(run, frames), policy=policy, ratio=ratio, segment=segment)
    title = f"{figures_of_caches.POLICY_WORDS[policy]} hit rate at ρ = {ratio:g} among 20 published models"
    return _among(run, mine, others, title=title, x="hit rate", theme=theme)


def rates_among(rates: pl.DataFrame, *, policy: str, ratio: float, segment: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """This run's hit rate nearest to a cache size, one row, and the published ones at that size."""
    of_policy = _of_policy(rates, policy, segment).filter(pl.col("scope") == "shared")
    mine = of_policy.with_columns((pl.col("ratio") - ratio).abs().alias("off")).sort("off").head(1)
    others = frames_of_consistency.published_hit_rates()
    others = others.filter((pl.col("policy") == policy) & (pl.col("ratio") == ratio))
    if policy == "sch":
        others = others.filter(pl.col("segment_length") == segment)
    return mine, others


def known(run: store.Run, frames: Frames = fresh) -> pl.DataFrame:
    """SRP of the model, all text and domains (``frames.consistency.srp_model``).

    Raises:
        Absent: the run cannot say it, or it was not computed.
    """
    require(_WHAT, run, "trace", "order")
    frame = frames(frames_of_consistency.srp_model, run)
    if frame.is_empty():
        raise not_yet(_WHAT, run)
    return frame


def known_rates(run: store.Run, frames: Frames = fresh) -> pl.DataFrame:
    """Hit rates of expert caches (``frames.consistency.hit_rates``).

    Raises:
        Absent: the run cannot say it, or they were not computed.
    """
    require("The hit rate of expert caches", run, "trace", "order")
    rates = frames(frames_of_consistency.hit_rates, run)
    if rates.is_empty():
        raise not_yet("The hit rate of expert caches", run)
    return rates


def looked_ahead(rates: pl.DataFrame, segment: int) -> int | None:
    """The segment length that SCH is shown at: the chosen one, or the shortest that there is."""
    lengths = sorted(rates["segment_length"].drop_nulls().unique())
    return segment if segment in lengths else (lengths[0] if lengths else None)


def _srp(run: store.Run, frames: Frames, domain: str | None) -> pl.DataFrame:
    frame = known(run, frames)
    if domain is None:
        return frame.filter(pl.col("domain").is_null())
    # Controls are computed over all text; a domain has its own values only.
    frame = frame.filter((pl.col("domain") == domain) & (pl.col("control") == "observed"))
    if frame.is_empty():
        raise Absent(f"SRP of the domain {domain} alone was not computed for this run.")
    return frame


def _srp_experts(run: store.Run, frames: Frames, segment: int) -> pl.DataFrame:
    known(run, frames)
    frame = frames(frames_of_consistency.srp_experts, run)
    lengths = sorted(frame["segment_length"].unique())
    if segment not in lengths:
        there = ", ".join(f"{length:g}" for length in lengths) or "none"
        raise Absent(f"SRP of single experts was not computed over segments of {segment} tokens; there are {there}.")
    return frame.filter(pl.col("segment_length") == segment)


def _of_policy(rates: pl.DataFrame, policy: str, segment: int) -> pl.DataFrame:
    """The observed rows of one policy; of SCH, at one segment length."""
    rows = rates.filter((pl.col("policy") == policy) & (pl.col("control") == "observed"))
    return rows.filter(pl.col("segment_length") == looked_ahead(rates, segment)) if policy == "sch" else rows


def _published(shown: bool) -> pl.DataFrame | None:
    return frames_of_consistency.published_srp() if shown else None


def _tokens(frame: pl.DataFrame, domain: str | None) -> str:
    return f"{most(frame['tokens']):,.0f} tokens{f' of {plain(domain)}' if domain else ''}"


def _among(run: store.Run, mine: pl.DataFrame, others: pl.DataFrame, *, title: str, x: str, theme: Theme) -> Exhibit:
    if others.is_empty():
        raise Absent("No figures of published models are known for this choice.")
    frame = frames_of_consistency.among_published(mine, others, name=run.name)
    return Exhibit(
        figure=figures_of_caches.beside_published(frame, this=f"this run: {run.name}", title=title, x=x, theme=theme),
        frame=frame,
        read="Published values rest on 11 domains and 22,528 sequences; another text shifts a model by some points. "
        "A small model whose domains differ by script reads higher than a large one would.",
        rests_on=f"{SOURCE}.",
        alt=f"Bars: this run among 20 published models, {title}",
    )


EXHIBITS = (
    Entry("srp", srp, "SRP against segment length", page="local-consistency"),
    Entry("router-size", router_size, "Router size that reaches the SRP", page="local-consistency"),
    Entry("srp-layers", srp_layers, "SRP of every layer", page="local-consistency"),
    Entry("srp-map", srp_map, "SRP of every expert", page="local-consistency"),
    Entry("srp-experts", srp_experts, "SRP of every expert against its use", page="local-consistency"),
    Entry("hit-rates", hit_rates, "Hit rate by cache size", page="local-consistency"),
    Entry("hit-rate-layers", hit_rate_layers, "Hit rate of every layer's own cache", page="local-consistency"),
    Entry("repetition", repetition, "Repetition of experts", page="local-consistency"),
    Entry("overlap", overlap, "Experts in common, by distance", page="local-consistency"),
    Entry("srp-published", srp_published, "SRP among published models", page="local-consistency"),
    Entry("hit-rates-published", hit_rates_published, "Hit rate among published models", page="local-consistency"),
)
