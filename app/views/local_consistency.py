"""Local consistency: do neighbouring tokens need the same experts, and does a cache of experts pay?"""

from __future__ import annotations

import polars as pl
import streamlit as st

from app import data, state
from app.components import chart, header
from app.components.answer import answer
from app.components.page import render
from app.components.sections import sections
from app.exhibits import local_consistency as exhibits
from app.exhibits import local_consistency_answers as answers
from app.exhibits.exhibit import Absent
from app.figures.hit_rates import POLICY_WORDS
from app.frames import consistency as frames
from profiler.metrics.published import SOURCE
from store import Run

_RATIOS = ("1", "2", "3")


def page(run: Run) -> None:
    """Draw the page."""
    header.title(
        "Local consistency", run, what="Do neighbouring tokens need the same experts, and does caching experts pay?"
    )
    try:
        srp = exhibits.known(run, data.frame)
    except Absent as missing:
        chart.absent(missing)
        return
    lengths = [f"{length:g}" for length in sorted(srp["segment_length"].unique())]
    sections(
        {
            "SRP": lambda: _srp(run, lengths),
            "Layers and experts": lambda: _places(run, lengths),
            "Hit rates": lambda: _hit_rates(run, lengths),
            "Repetition": lambda: _repetition(run),
            "Published models": lambda: _published(run, lengths),
        }
    )


def _srp(run: Run, lengths: list[str]) -> None:
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        segment = _segment(lengths)
        domain = state.choose_domain(run.domains)
        published = state.choose_flag(
            "Published models", key="published", default=True, help=f"20 models; {SOURCE}"
        )  # fmt: skip
    answer(answers.srp, run, segment=segment, domain=domain)
    _numbers(data.frame(frames.key_numbers, run, segment_length=float(segment)))
    with chart.pair():
        chart.exhibit(exhibits.srp, run, key="srp", domain=domain, published=published)
        chart.exhibit(exhibits.router_size, run, key="router-size", domain=domain, published=published)


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
                help=f"All text; {row['detail']}; 95 % interval over sequences: {interval}",
            )


def _places(run: Run, lengths: list[str]) -> None:
    segment = _segment(lengths)
    answer(answers.places, run, segment=segment)
    chart.exhibit(exhibits.srp_map, run, key=f"srp-map-{segment}", segment=segment)
    with chart.pair():
        chart.exhibit(exhibits.srp_layers, run, key="srp-layers")
        chart.exhibit(exhibits.srp_experts, run, key=f"srp-experts-{segment}", segment=segment)


def _hit_rates(run: Run, lengths: list[str]) -> None:
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        segment = _segment(lengths)
        scope = state.choose(
            "Cache", list(exhibits.SCOPES), key="cache", words=exhibits.SCOPES.__getitem__, segmented=True
        )
        policy = _policy("Policy, per layer")
    answer(answers.caches, run, segment=segment)
    chart.exhibit(exhibits.hit_rates, run, key=f"hit-rates-{scope}", scope=scope, segment=segment)
    chart.exhibit(exhibits.hit_rate_layers, run, key=f"hit-layers-{policy}", policy=policy, segment=segment)


def _repetition(run: Run) -> None:
    answer(answers.repetition, run)
    chart.exhibit(exhibits.repetition, run, key="repetition")
    chart.exhibit(exhibits.overlap, run, key="overlap")


def _published(run: Run, lengths: list[str]) -> None:
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        segment = _segment(lengths)
        policy = _policy("Policy")
        ratio = float(state.choose("Cache size ρ", _RATIOS, key="rho", default="2", segmented=True))
    answer(answers.published, run, segment=segment, policy=policy, ratio=ratio)
    with chart.pair():
        chart.exhibit(exhibits.srp_published, run, key=f"srp-published-{segment}", segment=segment)
        key = f"hit-published-{policy}-{ratio:g}"
        chart.exhibit(exhibits.hit_rates_published, run, key=key, policy=policy, ratio=ratio, segment=segment)


def _segment(lengths: list[str]) -> int:
    default = str(exhibits.SEGMENT)
    return int(state.choose("Segment length (tokens)", lengths, key="segment", default=default, segmented=True))


def _policy(label: str) -> str:
    words = POLICY_WORDS.__getitem__
    return state.choose(label, list(POLICY_WORDS), key="policy", default="lru", words=words, segmented=True)


if __name__ == "__main__":
    render(page)
