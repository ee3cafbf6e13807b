"""Local consistency: do neighbouring tokens need the same experts, and does a cache of experts pay?"""

from __future__ import annotations

import polars as pl
import streamlit as st

from app import data, state
from app.components import chart, header
from app.components.page import render
from app.figures import consistency as figures
from app.figures import hit_rates
from app.frames import consistency as frames
from app.frames.axes import most
from profiler.metrics.published import SOURCE
from store import Run

_SCOPES = {"shared": "one cache for all layers", "layers": "one cache per layer, mean"}
_RATIOS = ("1", "2", "3")


def page(run: Run) -> None:
    """Draw the page."""
    header.title(
        "Local consistency", run, what="Do neighbouring tokens need the same experts, and does caching experts pay?"
    )
    srp = data.frame(frames.srp_model, run)
    if header.omitted("Local consistency (SRP and hit rates)", run, "trace", "order"):
        return
    if srp.is_empty():
        header.not_yet("Local consistency (SRP and hit rates)", run)
        return
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        domain = state.choose_domain(run.domains)
        lengths = [f"{length:g}" for length in sorted(srp["segment_length"].unique())]
        length = state.choose("Segment length (tokens)", lengths, key="segment", default="16", segmented=True)
        beside = st.toggle(
            "Published models", value=True, key="published", bind="query-params", help=f"20 models; {SOURCE}"
        )
    _numbers(data.frame(frames.key_numbers, run, segment_length=float(length)))
    _srp(run, srp, domain=domain, length=float(length), beside=beside)
    _hit_rates(run, length=float(length), beside=beside)


def _numbers(frame: pl.DataFrame) -> None:
    with st.grid(4, min_column_width=170, gap="small"):
        for row in frame.iter_rows(named=True):
            interval = f"{row['low']:.1%} to {row['high']:.1%}" if row["low"] is not None else "no interval"
            against = (
                f"popularity alone {row['control']:.1%}" if row["control"] is not None else "needs to know the future"
            )
            st.metric(
                row["name"],
                f"{row['value']:.1%}",
                against,
                delta_color="off",
                delta_arrow="off",
                border=True,
                height="stretch",
                help=f"{row['detail']}; 95 % interval over sequences: {interval}",
            )


def _srp(run: Run, srp: pl.DataFrame, *, domain: str | None, length: float, beside: bool) -> None:
    theme = state.theme()
    of_domain = srp.filter(pl.col("domain").is_null() if domain is None else pl.col("domain") == domain)
    published = data.reference(frames.published_srp)
    drawn = published if beside else None
    if domain is not None:
        # Controls are computed over all text; a domain has its own values only.
        of_domain = of_domain.filter(pl.col("control") == "observed")
    tokens = most(of_domain["tokens"])
    interval = f"{tokens:,.0f} tokens; bars are 95 % intervals over sequences."
    chart.show(
        figures.srp_curve(of_domain, drawn, theme=theme),
        of_domain,
        key="srp",
        read="How well the best fixed set of experts for a whole segment stands in for the router's choice token by "
        "token. Only what lies above the shuffled lines is consistency in time; the rest is popularity.",
        rests_on=interval,
        alt="SRP against segment length with intervals, controls and published models",
    )
    with chart.pair():
        chart.show(
            figures.router_size_curve(of_domain, drawn, theme=theme),
            of_domain,
            key="router-size",
            read="How many experts that fixed set holds, relative to what a token uses. A small SRP that needs a "
            "large set means that nothing is saved.",
            alt="Router size that reaches the SRP against segment length",
        )
        layers = data.frame(frames.srp_layers, run)
        chart.show(
            figures.srp_layer_curves(layers, theme=theme),
            layers,
            key="srp-layers",
            read="Layers with a high SRP can share a small set of experts over many tokens: cache them first.",
            rests_on="All text.",
            alt="SRP of every layer for each segment length",
        )
    experts = data.frame(frames.srp_experts, run).filter(pl.col("segment_length") == length)
    with chart.pair():
        chart.show(
            figures.srp_expert_scatter(experts, theme=theme),
            experts,
            key=f"srp-experts-{length:g}",
            read=f"Segments of {length:g} tokens. Experts far above the dotted curve come in bursts: they are needed "
            "for a stretch of text and then not.",
            rests_on="All text.",
            alt="SRP of every expert against its activation frequency",
        )
        if beside:
            _among(
                run,
                of_domain.filter(pl.col("segment_length") == length),
                published.filter(pl.col("segment_length") == length),
                title=f"SRP over {length:g} tokens among 20 published models",
                x="SRP (0 to 1)",
                key=f"srp-published-{length:g}",
            )


def _hit_rates(run: Run, *, length: float, beside: bool) -> None:
    st.subheader("Does caching experts pay?", anchor=False)
    rates = data.frame(frames.hit_rates, run)
    if rates.is_empty():
        header.not_yet("The hit rate of expert caches", run)
        return
    theme = state.theme()
    scope = state.choose("Cache", list(_SCOPES), key="cache", words=_SCOPES.__getitem__, segmented=True)
    shown = rates.filter(pl.col("scope") == scope)
    segments = sorted(shown["segment_length"].drop_nulls().unique())
    segment = int(length) if int(length) in segments else (segments[0] if segments else None)
    chart.show(
        hit_rates.hit_rate_curves(shown, segment_length=segment, scope_words=_SCOPES[scope], theme=theme),
        shown,
        key=f"hit-rates-{scope}",
        read="ρ = 1 is room for exactly what one token uses. LRU and LFU can be built; SCH looks ahead over a "
        "segment and Belady knows the whole future, so they bound what a predictor could win. Where LRU lies on its "
        "shuffled line, order in the text does not help a cache.",
        rests_on=f"{most(shown['tokens']):,.0f} tokens; every sequence starts with an empty cache"
        + ("; bands are 95 % intervals over sequences." if scope == "shared" else "."),
        alt="Hit rate of SCH, LRU, LFU and Belady against cache size, with controls",
    )
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        policy = state.choose(
            "Policy",
            list(hit_rates.POLICY_WORDS),
            key="policy",
            default="lru",
            words=hit_rates.POLICY_WORDS.__getitem__,
            segmented=True,
        )
        ratio = state.choose("Cache size ρ", _RATIOS, key="rho", default="2", segmented=True)
    of_policy = rates.filter((pl.col("policy") == policy) & (pl.col("control") == "observed"))
    if policy == "sch":
        of_policy = of_policy.filter(pl.col("segment_length") == segment)
    with chart.pair():
        own = of_policy.filter(~pl.col("scope").is_in(list(_SCOPES)))
        chart.show(
            hit_rates.hit_rate_layers(own, policy=policy, theme=theme),
            own,
            key=f"hit-layers-{policy}",
            read="Layers with a low hit rate want more slots, or none.",
            alt="Hit rate of every layer's own cache",
        )
        if beside:
            _published_rates(run, of_policy, policy=policy, segment=segment, ratio=float(ratio))


def _published_rates(run: Run, of_policy: pl.DataFrame, *, policy: str, segment: int | None, ratio: float) -> None:
    published = data.reference(frames.published_hit_rates).filter(
        (pl.col("policy") == policy) & (pl.col("ratio") == ratio)
    )
    if policy == "sch":
        published = published.filter(pl.col("segment_length") == segment)
    mine = (
        of_policy.filter(pl.col("scope") == "shared")
        .with_columns((pl.col("ratio") - ratio).abs().alias("off"))
        .sort("off")
        .head(1)
    )
    words = hit_rates.POLICY_WORDS[policy]
    _among(
        run,
        mine,
        published,
        title=f"{words} hit rate at ρ = {ratio:g} among 20 published models",
        x="hit rate (0 to 1)",
        key=f"hit-published-{policy}-{ratio:g}",
    )


def _among(run: Run, mine: pl.DataFrame, published: pl.DataFrame, *, title: str, x: str, key: str) -> None:
    frame = frames.among_published(mine, published, name=run.name)
    chart.show(
        hit_rates.beside_published(frame, this=f"this run: {run.name}", title=title, x=x, theme=state.theme()),
        frame,
        key=key,
        read="Published values rest on 11 domains and 22,528 sequences; another text shifts a model by some points. "
        "A small model whose domains differ by script reads higher than a large one would.",
        rests_on=f"{SOURCE}.",
        alt=f"Bars: this run among 20 published models, {title}",
    )


if __name__ == "__main__":
    render(page)
