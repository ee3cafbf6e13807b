"""More exhibits of the page What-if routing: even load by Sinkhorn's plan, smoothing, precision tiers."""

from __future__ import annotations

import polars as pl

import store
from app.exhibits import what_if as shared
from app.exhibits.exhibit import Entry, Exhibit, Frames, fresh
from app.figures import what_if as figures
from app.figures.style import Theme
from app.frames import what_if as frames_of
from app.markdown import plain
from planner.simulate.what_if import WhatIf, method_named


def even_balance(
    run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", domain: str | None = None, whole: bool = False
) -> Exhibit:
    """Evenness of the load per layer, as it is and by Sinkhorn's plan."""
    result = shared.looked(run, frames, method="sinkhorn", domain=domain, whole=whole)
    return shared.balance_exhibit(frames_of.layers(result, float(result.values[0])), result, theme)


def even_price(
    run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", domain: str | None = None, whole: bool = False
) -> Exhibit:
    """What even load costs, layer by layer."""
    result = shared.looked(run, frames, method="sinkhorn", domain=domain, whole=whole)
    frame = frames_of.layers(result, float(result.values[0]))
    return mass_exhibit(frame, result, theme)


def even_change(
    run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", domain: str | None = None, whole: bool = False
) -> Exhibit:
    """Layer x expert: how the load changes under Sinkhorn's plan."""
    result = shared.looked(run, frames, method="sinkhorn", domain=domain, whole=whole)
    return shared.change_exhibit(result, float(result.values[0]), theme)


def smoothing(
    run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", domain: str | None = None, whole: bool = False
) -> Exhibit:
    """What smoothing over like tokens changes."""
    result = shared.looked(run, frames, method="smoothing", domain=domain, whole=whole)
    frame = frames_of.curve(result)
    words = {
        "changed_tokens": "tokens with other experts", "same_expert": "experts shared with the token before",
        "same_expert_before": "shared, as the model is", "kept_mass": "kept router probability",
    }  # fmt: skip
    return Exhibit(
        figure=figures.shares_over_values(
            frame, words, title="Smoothing over like tokens", axis="lambda: share of the token's own", theme=theme
        ),
        frame=frame, read="To the left a token's router listens more to like tokens before it. It pays for caches and "
        "prefetching if the experts of neighbours agree more while few tokens change.",
        rests_on=shared.rests_on(result),
        alt="Curves over lambda: changed tokens, experts shared with the token before",
    )  # fmt: skip


def entropy(
    run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", domain: str | None = None, whole: bool = False
) -> Exhibit:
    """Entropy of smoothed router probabilities."""
    result = shared.looked(run, frames, method="smoothing", domain=domain, whole=whole)
    frame = frames_of.curve(result)
    words = {"entropy": "smoothed", "entropy_before": "as the model is"}
    return Exhibit(
        figure=figures.shares_over_values(
            frame, words, title="Entropy of router probabilities", axis="lambda: share of the token's own",
            unit="nats", percent=False, theme=theme,
        ),
        frame=frame, read="Mixing with others spreads probability, unless like tokens agree with each other.",
        rests_on=shared.rests_on(result), alt="Curves over lambda: entropy, smoothed and as it is",
    )  # fmt: skip


def tiers(
    run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", domain: str | None = None, whole: bool = False,
    value: float = 0.6, skip_above: float = 0.9,
) -> Exhibit:  # fmt: skip
    """Selections in high and low precision, and left out; ``value``: T1, ``skip_above``: T2."""
    result = shared.looked(run, frames, method="tiers", domain=domain, whole=whole, skip_above=skip_above)
    frame = frames_of.curve(result)
    words = {"high_share": "high precision", "low_share": "low precision", "skipped_share": "left out"}
    return Exhibit(
        figure=figures.shares_over_values(
            frame, words, title="Precision tiers: shares of the selections", axis=method_named("tiers").value,
            value=value, theme=theme,
        ),
        frame=frame, read="Gate weights of a token are added up from the largest on: an expert comes in high precision "
        f"while those before it add up to T1 at most, in low precision up to T2 = {skip_above:.2g}, and not at all "
        "beyond. The line marks T1.",
        rests_on=shared.rests_on(result),
        alt="Curves over T1: shares of selections in high and low precision, and left out",
    )  # fmt: skip


def tier_bits(
    run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", domain: str | None = None, whole: bool = False,
    value: float = 0.6, skip_above: float = 0.9,
) -> Exhibit:  # fmt: skip
    """Bits per weight: loaded, and weighted by gate weight; ``value``: T1, ``skip_above``: T2."""
    result = shared.looked(run, frames, method="tiers", domain=domain, whole=whole, skip_above=skip_above)
    frame = frames_of.curve(result)
    words = {"bits_traffic": "loaded, mean", "bits_seen": "by gate weight", "bits_stored": "stored (both copies)"}
    return Exhibit(
        figure=figures.shares_over_values(
            frame, words, title="Bits per weight: 16 high, 4 low", axis=method_named("tiers").value, unit="bits",
            value=value, percent=False, theme=theme,
        ),
        frame=frame, read="What a token sees counts more bits than what is loaded, since the experts with most gate "
        "weight come in high precision; memory holds both copies.",
        rests_on=shared.rests_on(result), alt="Curves over T1: bits loaded, bits by gate weight, bits stored",
    )  # fmt: skip


def mass_exhibit(frame: pl.DataFrame, result: WhatIf, theme: Theme) -> Exhibit:
    """Kept mass and changed tokens per layer, of a method without values to choose."""
    return Exhibit(
        figure=figures.layer_mass(frame, mass_of=result.mass_of, theme=theme), frame=frame,
        read=f"Kept is {plain(result.mass_of)}, before and after the same number of experts per token.",
        rests_on=shared.rests_on(result), alt="Curves over the layers: kept mass and changed tokens",
    )  # fmt: skip


EXHIBITS = (
    Entry("even-balance", even_balance, "Sinkhorn: balance of the load", page="what-if", report=False),
    Entry("even-price", even_price, "Sinkhorn: the price of balance", page="what-if", report=False),
    Entry("even-change", even_change, "Sinkhorn: how load changes", page="what-if", report=False),
    Entry("smoothing", smoothing, "Smoothing over like tokens", page="what-if", report=False),
    Entry("smoothing-entropy", entropy, "Entropy of smoothed probabilities", page="what-if", report=False),
    Entry("precision-tiers", tiers, "Precision tiers: shares of the selections", page="what-if", report=False),
    Entry("tier-bits", tier_bits, "Precision tiers: bits per weight", page="what-if", report=False),
)
