"""Exhibits of the page Routing: load, balance, domains, and how decided the router is."""

from __future__ import annotations

from typing import Literal

import polars as pl

import store
from app.exhibits.absent import require
from app.exhibits.exhibit import Absent, Entry, Exhibit, Frames, fresh
from app.figures import curves, heatmap
from app.figures.style import Theme, safe
from app.frames import confidence as frames_of_confidence
from app.frames import domains as frames_of_domains
from app.frames import load as frames_of_load
from app.frames.axes import most
from app.markdown import plain

Scale = Literal["relative", "share"]
Quantity = Literal["entropy", "top_probability", "selected_probability", "first_margin", "boundary_margin"]

_READ_LOAD = {
    "relative": "Orange experts get less than their uniform share, blue ones more, in factors of two.",
    "share": "The darker (in dark mode: the brighter), the larger the expert's part of its layer's selections.",
}
_READ_CONFIDENCE = {
    "entropy": "Low entropy: the router prefers few experts clearly. The band holds the middle 80 % of the tokens.",
    "top_probability": "Near 1 a single expert decides; near 1/E the router hardly tells the experts apart.",
    "selected_probability": "Probability that falls on the selected experts: what is missing to 1 is what top-k "
    "throws away.",
    "first_margin": "How far the first choice leads. Small values mean that the order of the first two hardly matters.",
    "boundary_margin": "Small values mean that rounding or quantisation can flip which expert is taken last.",
}


def load(
    run: store.Run,
    *,
    frames: Frames = fresh,
    theme: Theme = "light",
    domain: str | None = None,
    phase: str | None = None,
    scale: Scale = "relative",
) -> Exhibit:
    """Layer x expert: each expert's load."""
    frame = frames(frames_of_load.expert_load, run, domain=domain, phase=phase)
    where = where_of(domain, phase)
    return Exhibit(
        figure=heatmap.load_map(frame, value=scale, where=safe(where), theme=theme),
        frame=frame,
        read=_READ_LOAD[scale],
        rests_on=f"{frame['tokens'].sum():,} selections.",
        alt=f"Map of layers and experts: load, {where}",
    )


def balance(
    run: store.Run,
    *,
    frames: Frames = fresh,
    theme: Theme = "light",
    domain: str | None = None,
    phase: str | None = None,
) -> Exhibit:
    """Four measures of evenness over the layers."""
    frame = frames(frames_of_load.balance, run, domain=domain, phase=phase)
    return Exhibit(
        figure=curves.balance_curves(frame, where=safe(where_of(domain, phase)), theme=theme),
        frame=frame,
        read="An even load has entropy 1 and the others 0. The dotted line is the coefficient of variation that a "
        "balanced router shows on so few tokens by chance; MaxVio 3 means that the busiest expert takes four times "
        "the mean.",
        rests_on=f"{most(frame['tokens']):,.0f} tokens per layer.",
        alt="Curves over the layers: normalised entropy, Gini, coefficient of variation, MaxVio",
    )


def domain_distance(
    run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", phase: str | None = None
) -> Exhibit:
    """How far each domain's load lies from the mean of the domains, over the layers."""
    _several_domains(run)
    frame = frames(frames_of_domains.specialization, run, phase=phase)
    return Exhibit(
        figure=curves.specialization_curves(frame, domains=run.domains, theme=theme),
        frame=frame,
        read="0 % means that the domain uses the experts like the mean of all domains; 30 % means that 30 % of its "
        "selections would have to go elsewhere. Every domain counts alike in the mean. The dotted line is what domains "
        "that do not differ would show on so few selections, each drawn for itself.",
        rests_on=f"{least(frame['selections']):,.0f} selections or more per domain and layer.",
        alt="Curves over the layers: distance of each domain's load from the mean of the domains",
    )


def domain_difference(
    run: store.Run,
    *,
    frames: Frames = fresh,
    theme: Theme = "light",
    domain: str | None = None,
    phase: str | None = None,
) -> Exhibit:
    """Layer x expert: how one domain's load differs from the mean of the domains."""
    _several_domains(run)
    shown = domain or farthest_domain(run, frames, phase)
    frame = frames(frames_of_domains.domain_shares, run, phase=phase).filter(pl.col("domain") == shown)
    return Exhibit(
        figure=heatmap.difference_map(frame, domain=shown, theme=theme),
        frame=frame,
        read="Blue experts take more of this domain's selections than of the mean of the domains, orange ones less."
        + ("" if domain else " Shown is the domain that differs most."),
        rests_on=f"{frame['tokens'].sum():,} selections of {plain(shown)}.",
        alt=f"Map of layers and experts: load of {shown} minus the mean of the domains",
    )


def confidence(
    run: store.Run,
    *,
    frames: Frames = fresh,
    theme: Theme = "light",
    domain: str | None = None,
    phase: str | None = None,
    quantity: Quantity = "entropy",
) -> Exhibit:
    """How decided the router was, over the layers."""
    require("How decided the router was", run, "logits")
    frame = frames(frames_of_confidence.confidence, run, domain=domain, phase=phase)
    if frame.is_empty():
        raise Absent("The router's logits were not seen in this run.")
    frame = frame.filter(pl.col("quantity") == quantity)
    words = curves.CONFIDENCE_WORDS[quantity][0]
    return Exhibit(
        figure=curves.confidence_band(
            frame, quantity=quantity, where=safe(where_of(domain, phase)), theme=theme
        ),
        frame=frame,
        read=_READ_CONFIDENCE[quantity],
        rests_on=f"{most(frame['tokens']):,.0f} tokens per layer; percentiles from histograms.",
        alt=f"Band over the layers: {words}",
    )  # fmt: skip


def least(values: pl.Series) -> float:
    """The smallest value; 0 where there is none."""
    smallest = values.drop_nulls().min()
    return float(smallest) if isinstance(smallest, int | float) else 0.0


def where_of(domain: str | None, phase: str | None) -> str:
    """Which text: "german, decode", or "all text"."""
    return ", ".join(part for part in (domain, phase) if part) or "all text"


def farthest_domain(run: store.Run, frames: Frames = fresh, phase: str | None = None) -> str:
    """The domain that differs most from the mean of the domains; the first where none has load."""
    found = frames(frames_of_domains.farthest, run, phase=phase)
    return str(found["domain"][0]) if len(found) else run.domains[0]


def _several_domains(run: store.Run) -> None:
    if len(run.domains) < 2:
        raise Absent(
            "This run has one domain. Collect text of several (folders or labels) to see what tells them apart."
        )


EXHIBITS = (
    Entry("load", load, "Load of each expert", page="routing"),
    Entry("balance", balance, "Balance of every layer", page="routing"),
    Entry("domain-distance", domain_distance, "How far domains lie apart", page="routing"),
    Entry("domain-difference", domain_difference, "Load of a domain against the mean of the domains", page="routing"),
    Entry("confidence", confidence, "How decided the router is", page="routing"),
)
