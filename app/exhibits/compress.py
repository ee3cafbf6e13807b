"""Exhibits of the page Compress: size against cost, presets beside each other, room to cut, what was measured."""

from __future__ import annotations

import shlex
from typing import Any, Literal

import polars as pl

import store
from app.exhibits.absent import needs_level
from app.exhibits.exhibit import Absent, Entry, Exhibit, Frames, fresh
from app.exhibits.listed import domains_of
from app.figures import compress as figures
from app.figures import compress_curve as curve_figures
from app.figures import compress_measured as measured_figures
from app.figures import room as room_figures
from app.figures.style import Theme
from app.frames import compress_curve as curve_frames
from app.frames import compress_measured as measured_frames
from app.frames import compress_presets as preset_frames
from app.frames import evaluation, room
from moescope.errors import PlanError
from planner.recommendation import Candidate

Quantity = Literal["kl", "ratio"]


def curve(
    run: store.Run,
    *,
    frames: Frames = fresh,
    theme: Theme = "light",
    budget: int = 25,
    domains: str | None = None,
    engine: str | None = None,
    guard: bool = True,
) -> Exhibit:
    """Size of all experts against predicted cost; ``budget``: what the experts may take, per cent of now."""
    asked: dict[str, Any] = {"guard": guard} | ({"engine": engine} if engine else {})
    named = domains_of(run, domains)
    asked |= {"domains": named} if named else {}
    try:
        kept = frames(curve_frames.recommended, run, files=curve_frames.files(run, "recommendation"))
        asked["calibration"] = curve_frames.measured_factors(kept)
        whole = preset_frames.expert_bytes(run)
        memory = int(whole * budget / 100)
        tried = frames(curve_frames.first_look, run, **asked)
        found = frames(curve_frames.advice, run, memory=memory, **asked)
    except PlanError as error:
        raise Absent(f"Nothing can be advised: {error}") from error
    points = curve_frames.everything(run, [*tried, *found.candidates], kept=kept, budget=memory, frames=frames)
    return curve_of(run, points, budget=memory, best=next(iter(found.candidates), None), theme=theme)


def curve_of(run: store.Run, points: pl.DataFrame, *, budget: int, best: Candidate | None, theme: Theme) -> Exhibit:
    """The exhibit :func:`curve` of points that were gathered already (``app.frames.compress_curve.everything``)."""
    if points.filter(pl.col("kl").is_not_null() | pl.col("measured").is_not_null()).is_empty():
        raise needs_level("The predicted cost of plans", "activations", run)
    measured = len(points["measured"].drop_nulls())
    return Exhibit(
        figure=curve_figures.cost_by_size(points, budget=budget, chosen=best.plan.digest if best else "", theme=theme),
        frame=points,
        read="Left is smaller, lower costs less: at the dashed budget, the best plan is the lowest point at its left. "
        "Hollow points are predicted, and most were not measured; filled ones were, and a filled point far from its "
        "hollow one says how wrong the prediction was. Intervals stand in the hover.",
        rests_on=f"{len(points):,} plans, {measured} of them measured; {run.info.tokens:,} tokens of the run.",
        alt="Points: size of all experts against predicted divergence for plans of every kind, with the budget",
    )


def presets(
    run: store.Run,
    *,
    frames: Frames = fresh,
    theme: Theme = "light",
    preset: str | None = None,
    share: float | None = None,
    memory: int | None = None,
    form: str | None = None,
    domains: str | None = None,
    engine: str | None = None,
    guard: bool = True,
    allow_invalid: bool = False,
) -> Exhibit:
    """Predicted error of every preset at one size: a share to remove (a quarter), or bytes of the experts.

    ``preset``: the one that stands out.
    """
    asked: dict[str, Any] = {"guard": guard}
    asked |= {"memory": memory} if memory is not None else {"share": 0.25 if share is None else share}
    given = {"form": form, "engine": engine, "domains": domains_of(run, domains)}
    asked |= {name: value for name, value in given.items() if value} | (
        {"allow_invalid": True} if allow_invalid else {}
    )
    known = frames(preset_frames.presets, run).filter("here")
    if known.is_empty():
        raise Absent("No plan can be made of this run.")
    frame = frames(preset_frames.comparison, run, **asked)
    made, priced = frame.filter(pl.col("refused").is_null()), len(frame["weighed_error"].drop_nulls())
    if made.is_empty():
        raise Absent(f"No preset can be planned so: {frame['refused'][0]}")
    if not priced and "activations" not in run.info.levels:
        raise needs_level("The predicted error of presets", "activations", run)
    if not priced:
        raise Absent("Presets that can be planned so merge or slim, and no error is predicted for those.")
    chosen = preset or preset_frames.first_choice(known["preset"].to_list())
    return Exhibit(
        figure=figures.preset_errors(frame, title="Predicted error by preset", chosen=chosen, theme=theme),
        frame=frame,
        read="Shorter is better, among plans that cut as much: what each choice is expected to change in the outputs "
        "of the MoE layers before tokens are routed anew, layers weighed by how far they turn the residual stream. It "
        "is an estimate from the run; measured damage can differ.",
        rests_on=f"{len(made)} of {len(frame)} presets can be planned so, {priced} are priced: merges and slimming are "
        f"not. {run.info.tokens:,} tokens.",
        alt="Bars: predicted error of every preset",
    )


def depth(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light") -> Exhibit:
    """How far the routed experts of each layer turn the residual stream, by domain."""
    frame = frames(room.depth, run)
    if frame["moe_influence"].null_count() == len(frame):
        raise needs_level("How far each layer turns the residual stream", "activations", run)
    return Exhibit(
        figure=room_figures.influence(frame, theme=theme),
        frame=frame,
        read="Layers near the background hardly turn the residual stream: their experts can be spared first. Where "
        "domains differ, a cut that one of them does not feel may cost another.",
        rests_on=f"1 - mean cos(r, r + y), y the routed experts' sum. {run.info.tokens:,} tokens.",
        alt="Map of layers and domains: how far the routed experts turn the residual stream",
    )


def width(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light") -> Exhibit:
    """What part of each layer's width score its strongest neurons hold."""
    frame = frames(room.width, run)
    if frame.is_empty():
        raise needs_level("How much of a layer its strongest neurons hold", "activations", run)
    return Exhibit(
        figure=room_figures.width(frame, theme=theme),
        frame=frame,
        read="Where a quarter of the neurons holds nearly all, experts can be slimmed; where it holds about a quarter, "
        "all neurons do alike.",
        rests_on=f"Sum of |a| times |w| over all experts of a layer (SparseUnifiedModel). {run.info.tokens:,} tokens.",
        alt="Map of layers and parts of the width: part of the width score that the strongest neurons hold",
    )


def measured(
    run: store.Run,
    *,
    frames: Frames = fresh,
    theme: Theme = "light",
    quantity: Quantity = "kl",
    chosen: str | None = None,
) -> Exhibit:
    """What was measured on models that plans of the run made, by domain; ``chosen``: a plan that must be among them."""
    documents = measured_frames.documents(run)
    if not documents:
        raise Absent(
            "No plan of this run was measured: apply one, and evaluate the result.",
            remedy="moescope evaluate SMALLER --against MODEL --data HELD-OUT --beside"
            f" {shlex.quote(store.shown(run.path))}",
        )
    names = list(documents)
    chosen = chosen if chosen in documents else names[0]
    most = measured_figures.MOST
    shown = names[:most] if chosen in names[:most] else [*names[: most - 1], chosen]
    damages = {name: evaluation.domains(documents[name]) for name in shown}
    read = {
        "kl": "How far the edited model's next-token probabilities lie from the original's; 0 = the same. Domains far "
        "to the right lost most.",
        "ratio": "Above 1 the edited model is more surprised by the text than the original was.",
    }
    return Exhibit(
        figure=measured_figures.damage(damages, quantity=quantity, theme=theme),
        frame=pl.concat([frame.with_columns(plan=pl.lit(name)) for name, frame in damages.items()]),
        read=read[quantity],
        rests_on=f"{damages[chosen]['tokens'][0]:,} predicted tokens for the chosen plan; 95 % intervals of pairs of "
        "sequences.",
        alt=f"Measured {quantity} by domain, for every measured plan",
    )


EXHIBITS = (
    Entry("compress-curve", curve, "Size against predicted cost", page="compress", report=False),
    Entry("compress-presets", presets, "Predicted error of every preset", page="compress", report=False),
    Entry("room-depth", depth, "How far each layer turns the residual stream", page="compress"),
    Entry("room-width", width, "What the strongest neurons hold", page="compress"),
    Entry("compress-measured", measured, "Measured damage by domain", page="compress"),
)
