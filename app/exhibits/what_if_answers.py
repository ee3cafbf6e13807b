"""What the sections of the page What-if routing say of a run: their answer in a sentence or two, with the figures."""

from __future__ import annotations

import store
from app.exhibits import what_if as exhibits
from app.exhibits.exhibit import Frames, fresh
from app.frames import what_if as frames_of
from app.markdown import plain

HARDLY = 0.75
"""Of the load's coefficient of variation: what leaves more than that is called hardly worth it; ours."""

WORTH = 0.005
"""Kept mass that a number of experts that varies must gain over a fixed one to be called worth it; ours."""


def curves(
    run: store.Run, *, frames: Frames = fresh, method: str | None = None, weights: str = "renormalized",
    domain: str | None = None, value: float | None = None, whole: bool = False,
) -> str:  # fmt: skip
    """How many experts a value leaves, what they keep, and whether a number that varies is worth it."""
    result = exhibits.looked(run, frames, method=method, weights=weights, domain=domain, whole=whole)
    chosen, about = exhibits.value_in(result, value), frames_of.about(method or result.method)
    frame = frames_of.curve(result)
    row = frame.row(frames_of.place_of(result, chosen), named=True)
    if row["mean_active"] is None or row["kept_mass"] is None:
        return ""
    words = f"{about.title} at {chosen:.3g} leaves **{row['mean_active']:.2f} experts** per token on average instead "
    words += f"of {row['before_active']:.2f}, {row['p95']:.0f} or fewer for 95 % of the tokens, and keeps "
    words += f"**{row['kept_mass']:.1%}** of {plain(result.mass_of)}"
    words += f" ({row['before_mass']:.1%} as it is)" if row["before_mass"] < 0.9995 else ""
    if row["flops_share"] is not None:
        words += f" at **{row['flops_share']:.0%}** of the experts' operations"
    words += f"; {row['changed_tokens']:.0%} of the tokens get other experts. "
    beside = exhibits.fixed_beside(run, frames, result, domain, whole, method=method)
    if beside is None:
        return words
    same = frames_of.at_mean(beside, row["mean_active"])
    if same is None:
        return words
    gain = row["kept_mass"] - same
    if gain > WORTH:
        told = f"letting it vary is worth {gain * 100:.1f} points"
        return f"{words}A fixed number at the same mean keeps {same:.1%}: {told}."
    told = "as much" if gain > -WORTH else f"{-gain * 100:.1f} points more"
    return words + f"**No** gain from a number that varies: a fixed one at the same mean keeps {told} ({same:.1%})."


def layers(
    run: store.Run, *, frames: Frames = fresh, method: str | None = None, weights: str = "renormalized",
    domain: str | None = None, value: float | None = None, whole: bool = False,
) -> str:  # fmt: skip
    """Which layers need most and fewest experts at a value, and what becomes of the balance of load."""
    result = exhibits.looked(run, frames, method=method, weights=weights, domain=domain, whole=whole)
    chosen = exhibits.value_in(result, value)
    frame = frames_of.layers(result, chosen).drop_nulls("mean_active").sort("mean_active")
    if frame.is_empty():
        return ""
    low, high = frame.row(0, named=True), frame.row(-1, named=True)
    words = f"At {chosen:.3g} layer **{high['label']}** needs most experts per token, {high['mean_active']:.2f}"
    if high["mean_active"] - low["mean_active"] < 0.01:
        words = f"At {chosen:.3g} all layers use {high['mean_active']:.2f} experts per token"
    else:
        words += f", and layer **{low['label']}** fewest, {low['mean_active']:.2f}"
    before, after = (float(frame[name].drop_nulls().mean() or 0.0) for name in ("before_cv", "load_cv"))  # type: ignore[arg-type]
    trend = "less even" if after > before + 0.005 else "more even" if after < before - 0.005 else "as even as before"
    spread = f"its coefficient of variation is {after:.3f} instead of {before:.3f}, mean over layers"
    return f"{words}. Load becomes **{trend}**: {spread}."


def even(run: store.Run, *, frames: Frames = fresh, domain: str | None = None, whole: bool = False) -> str:
    """The price of balance."""
    result = exhibits.looked(run, frames, method="sinkhorn", domain=domain, whole=whole)
    row = frames_of.curve(result).row(0, named=True)
    if row["load_cv"] is None:
        return ""
    lost, hardly = row["before_mass"] - row["kept_mass"], row["load_cv"] > HARDLY * row["before_cv"]
    words = "**Hardly worth it**: " if hardly else ""
    words += (
        f"Sinkhorn's balance costs **{lost * 100:.1f} points** of router probability ({row['kept_mass']:.1%} instead "
    )
    words += (
        f"of {row['before_mass']:.1%}) and moves **{row['changed_tokens']:.0%}** of the tokens to other experts: the "
    )
    words += f"coefficient of variation of the load goes from {row['before_cv']:.3f} to **{row['load_cv']:.3f}**, the "
    words += f"busiest expert from {row['before_peak']:.2f} to {row['load_peak']:.2f} times the mean."
    if row["before_cv"] < 0.1:
        words += " There is little to even out."
    return words


def smoothing(run: store.Run, *, frames: Frames = fresh, domain: str | None = None, whole: bool = False) -> str:
    """Whether listening to like tokens makes neighbours share experts."""
    result = exhibits.looked(run, frames, method="smoothing", domain=domain, whole=whole)
    frame = frames_of.curve(result).drop_nulls("same_expert").sort("value")
    if frame.is_empty():
        return ""
    row = frame.row(0, named=True)
    gain = row["same_expert"] - row["same_expert_before"]
    first = "**No**: smoothing does not make" if gain < 0.005 else "Smoothing makes"
    return (
        f"{first} neighbours share more experts: with lambda {row['value']:.2g} a token uses "
        f"**{row['same_expert']:.0%}** of its experts after the token before it did, "
        f"{row['same_expert_before']:.0%} as it is, and {row['changed_tokens']:.0%} of the tokens get other experts. "
        f"The router's entropy goes from {row['entropy_before']:.2f} to {row['entropy']:.2f} nats."
    )


def tiers(
    run: store.Run, *, frames: Frames = fresh, domain: str | None = None, whole: bool = False, value: float = 0.6,
    skip_above: float = 0.9,
) -> str:  # fmt: skip
    """How much comes in low precision, or not at all; HOBBIT's thresholds unless others are given."""
    result = exhibits.looked(run, frames, method="tiers", domain=domain, whole=whole, skip_above=skip_above)
    at = frames_of.place_of(result, value)
    row = frames_of.curve(result).row(at, named=True)
    if row["high_share"] is None:
        return ""
    return (
        f"With T1 = {row['value']:.2g} and T2 = {skip_above:.2g}, **{row['high_share']:.0%}** of the selections come "
        f"in high precision, {row['low_share']:.0%} in low and **{row['skipped_share']:.0%}** are left out: "
        f"{row['bits_traffic']:.1f} bits per weight that is loaded (16 in high precision, 4 in low), "
        f"{row['bits_seen']:.1f} by gate weight, and "
        f"{row['kept_mass']:.1%} of the gate weight kept."
    )
