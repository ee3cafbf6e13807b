"""What the sections of the page Local consistency say of a run: the answer in a sentence or two, in Markdown."""

from __future__ import annotations

import polars as pl

import store
from app.exhibits.exhibit import Frames, fresh
from app.exhibits.local_consistency import SEGMENT, known, known_rates, looked_ahead, rates_among
from app.figures.hit_rates import POLICY_WORDS
from app.frames import consistency
from app.markdown import plain


def srp(run: store.Run, *, frames: Frames = fresh, segment: int = SEGMENT, domain: str | None = None) -> str:
    """How well fixed sets of experts do over segments, and how much of it is order in the text."""
    at = known(run, frames).filter(pl.col("segment_length") == segment)
    of_all = pl.col("domain").is_null()
    mine = of_all if domain is None else pl.col("domain") == domain
    seen = at.filter(mine & (pl.col("control") == "observed"))
    if seen.is_empty():
        return ""
    row = seen.row(0, named=True)
    text = f"Over segments of {segment} tokens{f' of {plain(domain)}' if domain else ''}, a fixed set of experts"
    size = f" with {row['router_size']:.1f} times a token's experts" if row["router_size"] is not None else ""
    words = f"{text}{size} stands in for **{row['value']:.1%}** of the router's choices (SRP{_range(row)})."
    shuffled = at.filter(of_all & (pl.col("control") == "shuffled"))
    if domain is not None or shuffled.is_empty():
        return words
    control = shuffled["value"][0]
    return (
        f"{words} Popularity alone gives {control:.1%}, so **{100 * (row['value'] - control):.1f} points** are "
        "consistency in time."
    )


def places(run: store.Run, *, frames: Frames = fresh, segment: int = SEGMENT) -> str:
    """Which layers are the most and least consistent, and which expert comes in bursts."""
    layers = frames(consistency.srp_layers, run).filter(pl.col("segment_length") == segment).sort("value")
    if layers.is_empty():
        return ""
    low, high = layers.row(0, named=True), layers.row(-1, named=True)
    words = f"Layer **{high['label']}** is the most consistent (SRP **{high['value']:.1%}** over {segment} tokens)"
    words += f", layer **{low['label']}** the least ({low['value']:.1%})." if len(layers) > 1 else "."
    experts = frames(consistency.srp_experts, run)
    experts = experts.filter((pl.col("segment_length") == segment) & (pl.col("frequency") > 0))
    if experts.is_empty():
        return words
    gain = experts.with_columns((pl.col("value") - pl.col("lower_bound")).alias("gain")).drop_nulls("gain")
    gain = gain.filter(pl.col("gain") > 0)
    if gain.is_empty():
        return words
    top = gain.sort("gain").row(-1, named=True)
    return (
        f"{words} Expert {top['expert']} of layer {top['label']} comes most in bursts: used by {top['frequency']:.1%} "
        f"of the tokens, its SRP is {top['value']:.1%}, where always keeping it would give {top['lower_bound']:.1%}."
    )


def caches(run: store.Run, *, frames: Frames = fresh, ratio: float = 2.0, segment: int = SEGMENT) -> str:
    """What an LRU cache hits, how much of it is order in the text, and what knowing the future would hit."""
    rates = known_rates(run, frames).filter(pl.col("scope") == "shared")
    lru = _nearest(rates, "lru", ratio)
    if not lru:
        return ""
    one = lru["observed"]
    words = f"With room for {one['ratio']:.2g} times a token's experts ({one['slots']:,} slots), an LRU cache hits "
    words += f"**{one['value']:.1%}** of requests"
    if "shuffled" in lru:
        words += f", of which popularity alone gives {lru['shuffled']['value']:.1%}"
    best = _nearest(rates, "belady", ratio)
    if best:
        words += f"; no cache of that size can hit more than **{best['observed']['value']:.1%}** (Belady)"
    length = looked_ahead(rates, segment)
    ahead = _nearest(rates.filter(pl.col("segment_length") == length), "sch", ratio) if length else {}
    if ahead:
        words += f", one that is filled once per {length} tokens {ahead['observed']['value']:.1%} (SCH)"
    return words + "."


def repetition(run: store.Run, *, frames: Frames = fresh) -> str:
    """Which part of its experts a token shares with the one before it."""
    frame = frames(consistency.repetition, run).filter(pl.col("metric") == "mean_overlap")
    far = frame.filter((pl.col("control") == "observed") & (pl.col("lag") > 1)).sort("lag")
    frame = frame.filter(pl.col("lag") == 1)
    seen = frame.filter(pl.col("control") == "observed").sort("value")
    if seen.is_empty():
        return ""
    words = f"A token shares **{_mean(seen):.0%}** of its experts with the token before it"
    shuffled = frame.filter(pl.col("control") == "shuffled")
    if len(shuffled) and _mean(shuffled) > 0:
        words += f", **{_mean(seen) / _mean(shuffled):.1f} times** what popularity gives ({_mean(shuffled):.0%})"
    top = seen.row(-1, named=True)
    words += f"; most in layer {top['label']} ({top['value']:.0%})." if len(seen) > 1 else "."
    if far.is_empty():
        return words
    last = far.filter(pl.col("lag") == pl.col("lag").max())
    return f"{words} At a distance of {last['lag'][0]:g} tokens {_mean(last):.0%} are left."


def published(
    run: store.Run,
    *,
    frames: Frames = fresh,
    segment: int = SEGMENT,
    domain: str | None = None,
    policy: str = "lru",
    ratio: float = 2.0,
) -> str:
    """The run's rank among the published models, by SRP and by hit rate."""
    at = pl.col("segment_length") == segment
    mine = pl.col("domain").is_null() if domain is None else pl.col("domain") == domain
    parts = []
    seen = known(run, frames).filter(at & mine & (pl.col("control") == "observed"))
    others = consistency.published_srp().filter(at)
    if len(seen) and len(others):
        parts.append(f"by SRP over {segment} tokens **{_rank(seen, others)}**")
    own, others = rates_among(known_rates(run, frames), policy=policy, ratio=ratio, segment=segment)
    if len(own) and len(others):
        parts.append(f"by {POLICY_WORDS[policy]} hit rate at ρ = {ratio:g} **{_rank(own, others)}**")
    return (
        f"Among this run and 20 published models (encoders and decoders apart), it stands {', '.join(parts)}."
        if parts
        else ""
    )


def _rank(mine: pl.DataFrame, others: pl.DataFrame) -> str:
    above = int((others["value"] > mine["value"][0]).sum())
    return f"{above + 1} of {len(others) + 1}"


def _nearest(rates: pl.DataFrame, policy: str, ratio: float) -> dict[str, dict[str, float]]:
    """Of one policy, the rows by control at the cache size nearest to ``ratio``; empty without an observed one."""
    part = rates.filter(pl.col("policy") == policy).with_columns((pl.col("ratio") - ratio).abs().alias("off"))
    rows = {row["control"]: row for row in part.filter(pl.col("off") == pl.col("off").min()).to_dicts()}
    return rows if "observed" in rows else {}


def _mean(frame: pl.DataFrame) -> float:
    return float(frame["value"].mean() or 0.0)  # type: ignore[arg-type]


def _range(row: dict[str, float | None]) -> str:
    return "" if row["low"] is None else f", 95 % interval {row['low']:.1%} to {row['high']:.1%}"
