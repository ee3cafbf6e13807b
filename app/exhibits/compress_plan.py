"""Exhibits of one plan: what becomes of every expert, widths, and where the predicted cost comes from.

The page draws them of the plan that it shows (``of_...``); by name they are drawn of a preset's plan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import planner
import store
from app.exhibits.absent import needs_level
from app.exhibits.exhibit import Absent, Entry, Exhibit, Frames, fresh
from app.exhibits.listed import domains_of
from app.figures import compress as figures
from app.figures import compress_bits as bits_figures
from app.figures.style import Theme, safe
from app.frames import compress as frames_of
from app.frames import compress_bits as bits_frames
from app.frames import compress_presets
from app.markdown import plain
from compressor.plan import Plan, SlimStep
from moescope.errors import PlanError

OfPlan = Callable[..., Exhibit]
"""Draws ``(run, plan, *, theme, ...)``."""
QUANTIZER, BITS = "error_bits", 4.0
"""What is shown of widths where nobody names a preset."""


def of_map(run: store.Run, plan: Plan, *, theme: Theme = "light") -> Exhibit:
    """Layers by experts: what becomes of each."""
    found = frames_of.units(plan)
    return Exhibit(
        figure=figures.plan_map(found, title=f"What becomes of every expert: {_name(plan)}", theme=theme),
        frame=found,
        read="Blue experts stay, orange ones go, purple ones are merged into another; the further from the background, "
        "the higher in its layer by the score. Strong orange: the plan lets an expert go that the score holds dear. "
        "Rings: protected super experts.",
        rests_on=f"{len(found):,} experts; {plan.provenance.tokens:,} tokens. {_scored_by(plan)}",
        alt="Map of layers and experts: what stays, what goes, what is merged and what is protected",
    )


def of_neurons(run: store.Run, plan: Plan, *, theme: Theme = "light") -> Exhibit:
    """Layers by experts: the share of its neurons that each keeps."""
    if not any(isinstance(step, SlimStep) for step in plan.steps):
        raise Absent("The plan takes no neurons away.")
    found = frames_of.units(plan)
    return Exhibit(
        figure=figures.neuron_map(found, title=f"Neurons that stay: {_name(plan)}", theme=theme),
        frame=found,
        read="The share of its neurons that each expert keeps: those near the background lose most. One colour all "
        "over means that the form asks for the same width everywhere.",
        rests_on=f"{len(found):,} experts. {_scored_by(plan)}",
        alt="Map of layers and experts: share of neurons kept",
    )


def of_bits(run: store.Run, plan: Plan, *, part: str = "", theme: Theme = "light") -> Exhibit:
    """Layers by experts: the width of one projection (``part``; empty = the first)."""
    found = bits_frames.widths(plan)
    if found.is_empty():
        raise Absent("The plan gives no expert a width.")
    parts = bits_frames.differing(found)
    shown = part if part in parts else parts[0]
    of = f" of {shown} projections" if len(parts) > 1 else ""
    return Exhibit(
        figure=bits_figures.bits_map(found, part=shown, title=f"Bits{of}: {_name(plan)}", theme=theme),
        frame=found,
        read="The stronger the colour, the narrower the weights: strong cells save most. "
        + ("Crosses: experts that go. " if found["gone"].any() else "")
        + ("The projections of an expert differ." if len(parts) > 1 else ""),
        rests_on=f"{len(found):,} experts; scales and zero points come on top.",
        alt="Map of layers and experts: bits of a weight",
    )


def of_cost(run: store.Run, plan: Plan, *, calibration: str = "", theme: Theme = "light") -> Exhibit:
    """Where the predicted cost comes from, layer by layer; ``calibration`` as of ``app.frames.compress_bits.turns``."""
    turned = bits_frames.turns(run, plan, calibration=calibration)
    if turned.is_empty():
        raise needs_level("Where the predicted cost comes from", "activations", run)
    return Exhibit(
        figure=bits_figures.cost_by_layer(turned, title="Where the predicted cost comes from", theme=theme),
        frame=turned,
        read="The bars add up to the plan's predicted divergence: high ones are layers whose experts the plan should "
        "spare first.",
        rests_on=f"{turned['kl'].sum():.3g} nats in all, "
        f"{'corrected by measured plans' if calibration else 'from sums'}.",
        alt="Stacked bars: predicted divergence by decoder layer and kind of change",
    )


def of_widths(run: store.Run, plan: Plan, *, theme: Theme = "light") -> Exhibit:
    """How many of the experts' weights have which width."""
    share = bits_frames.histogram(plan)
    if share.is_empty():
        raise Absent("The plan gives no expert a width.")
    return Exhibit(
        figure=bits_figures.histogram(share, title="Weights by width", theme=theme),
        frame=share,
        read="How many of the experts' weights are stored in how many bits.",
        rests_on=f"{share['weights'].sum():,} weights of experts that stay.",
        alt="Bars: share of weights by width",
    )


def _of_preset(draw: Callable[..., Exhibit], name: str, *, quantizes: bool = False) -> Callable[..., Exhibit]:
    """The exhibit of a preset's plan; ``bits`` in place of ``share`` for presets that quantize."""

    def make(
        run: store.Run,
        *,
        frames: Frames = fresh,
        theme: Theme = "light",
        preset: str | None = None,
        share: float | None = None,
        bits: float | None = None,
        domains: str | None = None,
        guard: bool = True,
    ) -> Exhibit:
        asked: dict[str, Any] = {"guard": guard}
        named = domains_of(run, domains)
        asked |= {"domains": named} if named else {}
        bits = BITS if bits is None and share is None and quantizes else bits
        asked |= {"bits": bits} if bits is not None else {"share": 0.25 if share is None else share}
        try:
            known = frames(compress_presets.presets, run).filter("here")["preset"].to_list()
            if preset is None and not known:
                raise Absent("No plan can be made of this run.")
            first = QUANTIZER if quantizes else compress_presets.first_choice(known)
            plan = frames(planner.make, run, preset=preset or first, **asked)
        except PlanError as error:
            raise Absent(f"There is no such plan: {error}") from error
        return draw(run, plan, theme=theme)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = draw.__doc__
    return make


def _name(plan: Plan) -> str:
    return safe(frames_of.title(plan))


def _scored_by(plan: Plan) -> str:
    evidence = frames_of.evidence_of(plan)
    return f"Scores: {plain(evidence.score)}, {plain(evidence.source or 'own')}." if evidence else ""


plan_map = _of_preset(of_map, "plan_map")
plan_cost = _of_preset(of_cost, "plan_cost")
plan_bits = _of_preset(of_bits, "plan_bits", quantizes=True)

EXHIBITS = (
    Entry("plan-map", plan_map, "What becomes of every expert in a preset's plan", page="compress", report=False),
    Entry("plan-cost", plan_cost, "Where a plan's predicted cost comes from", page="compress", report=False),
    Entry("plan-bits", plan_bits, "Widths of a plan that quantizes", page="compress", report=False),
)
