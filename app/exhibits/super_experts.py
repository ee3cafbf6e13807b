"""Exhibits of the page Super experts: largest outputs, the residual stream, and attention on the first position."""

from __future__ import annotations

from typing import Literal

import polars as pl

import store
from app.exhibits.absent import needs_level
from app.exhibits.exhibit import Absent, Entry, Exhibit, Frames, fresh
from app.figures import ablation, outliers
from app.figures.style import Theme
from app.frames import super_experts as frames_of_super_experts

Over = Literal["all", "first_routed"]
SHOWN = 200
"""Experts in the figure of ranks."""


def outputs(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", over: Over = "all") -> Exhibit:
    """Layer x expert: the largest output of each expert."""
    maxima = recorded(run, frames, over)
    return Exhibit(
        figure=outliers.output_map(maxima, tokens=over, theme=theme),
        frame=maxima,
        read="Largest absolute value that each expert's down_proj put out, before the gate weight. Rings mark super "
        "experts by the paper's rule: above the 99.5th percentile, above a tenth of the largest, in a layer where "
        "massive activations form.",
        rests_on=f"{len(maxima):,} experts that were used.",
        alt="Map of layers and experts: largest output, log scale",
    )


def ranked_outputs(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", over: Over = "all") -> Exhibit:
    """Experts by their largest output, beside what two rules ask for."""
    maxima, limits = recorded(run, frames, over), frames(frames_of_super_experts.thresholds, run)
    return Exhibit(
        figure=outliers.ranked_outputs(maxima, limits, tokens=over, theme=theme),
        frame=maxima,
        read="Super experts stand far above the curve that the other experts make. A smooth curve means that there are "
        "none.",
        rests_on=f"The {min(SHOWN, len(maxima)):,} largest.",
        alt="Experts ranked by their largest output against the thresholds of two rules",
    )


def residual(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light") -> Exhibit:
    """The residual stream's largest value after each layer."""
    if "activations" not in run.info.levels:
        raise needs_level("The residual stream", "activations", run)
    frame = frames(frames_of_super_experts.residual, run)
    if frame.is_empty():
        raise Absent("The residual stream has not been recorded.")
    return Exhibit(
        figure=outliers.residual_curve(frame, theme=theme),
        frame=frame,
        read="A jump by orders of magnitude over the median is a massive activation; rings mark layers above 100 and "
        "1,000 times the median, filled ones those in which it grows: there super experts stand. They usually sit at "
        "the first position, in few channels.",
        rests_on=_forming(frame),
        alt="Curves over the layers: largest, later and median absolute hidden state",
    )


def attention_sinks(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light") -> Exhibit:
    """Attention on the first position in each layer."""
    if "attention" not in run.info.levels:
        raise needs_level("Attention on the first position", "attention", run)
    frame = frames(frames_of_super_experts.attention_sinks, run)
    if frame.is_empty():
        raise Absent("No layer of this model has softmax attention, or none has been recorded yet.")
    return Exhibit(
        figure=ablation.sink_curve(frame, theme=theme),
        frame=frame,
        read="How much attention falls on position 0, whatever token stands there. Massive activations make it an "
        "attention sink: heads that have nothing to say look there.",
        rests_on="Queries after position 0; layers without softmax attention have no point.",
        alt="Attention on the first position over the layers, mean and range of the heads",
    )


def recorded(run: store.Run, frames: Frames, over: Over) -> pl.DataFrame:
    """``app.frames.super_experts.output_maxima``, which has rows.

    Raises:
        Absent: no output was recorded.
    """
    if "activations" not in run.info.levels:
        raise needs_level("What experts put out", "activations", run)
    maxima = frames(frames_of_super_experts.output_maxima, run, tokens=over)
    if maxima.is_empty():
        raise Absent("No expert output has been recorded yet.")
    return maxima


def _forming(residual: pl.DataFrame) -> str:
    layers = residual.filter(pl.col("forming"))["layer"].to_list()
    if not layers:
        return "No massive activation forms in any layer, so by the paper's rule no expert is a super expert."
    return f"Massive activations form in layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}."


EXHIBITS = (
    Entry("outputs", outputs, "Largest output of each expert", page="super-experts"),
    Entry("ranked-outputs", ranked_outputs, "Experts by their largest output", page="super-experts"),
    Entry("residual", residual, "Massive activations", page="super-experts"),
    Entry("attention-sinks", attention_sinks, "Attention sinks", page="super-experts"),
)
