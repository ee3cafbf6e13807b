"""Size against predicted cost: plans of every kind, those that were measured, and the advice for a budget."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

import planner
import store
from app.frames import compress_presets, evaluation
from compressor.plan import DropStep, MergeStep, Plan, QuantizeStep, RouteStep, SlimStep, Step
from compressor.plan.result import neurons_after
from moescope.errors import PlanError, StoreError
from planner.candidates import Request
from planner.curve import QUICK_SIZES, curve, quick
from planner.estimate.prediction import Calibration
from planner.estimate.storage import expert_bytes
from planner.estimate.stream import stream_seen
from planner.finalists import Measurement
from planner.recommendation import Candidate, Recommendation, mix_of
from planner.source import value_bytes

Files = tuple[tuple[str, int], ...]
"""(path, time of the last change in nanoseconds) of documents beside a run."""

_POINTS = {
    "digest": pl.String,
    "name": pl.String,
    "mix": pl.String,
    "bytes": pl.Int64,
    "share": pl.Float64,
    "bits": pl.Float64,
    "kl": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "coverage": pl.Float64,
    "basis": pl.String,
    "plans": pl.Int64,
    "measured": pl.Float64,
    "measured_low": pl.Float64,
    "measured_high": pl.Float64,
    "measured_tokens": pl.Int64,
    "elsewhere": pl.Float64,
    "pareto": pl.Boolean,
    "fits": pl.Boolean,
}


def first_look(run: store.Run, *, calibration: str = "", **asked: Any) -> list[Candidate]:
    """Plans of a few presets at a few sizes, by size: what can be priced within seconds.

    Args:
        run: a finished run.
        calibration: what prices rest on, from :func:`measured_factors`.
        asked: domains, guard, allow_invalid and engine, as ``planner.make`` takes them.

    Raises:
        PlanError: no plan can be made of the run.
    """
    request = quick(Request(run=run, memory=0, **asked))
    if not stream_seen(request.task()):
        return []
    found = curve(request, sizes=QUICK_SIZES, calibration=_calibration(calibration))
    return [one for one in found if one.prediction is not None]


def advice(run: store.Run, *, memory: int, calibration: str = "", **asked: Any) -> Recommendation:
    """The recommendation for a budget of the experts, from a few presets: within seconds, without a model.

    Args:
        run: a finished run.
        memory: bytes that the experts may take.
        calibration: what prices rest on, from :func:`measured_factors`.
        asked: as for :func:`first_look`.

    Raises:
        PlanError: no plan can be made of the run.
    """
    return planner.recommend(run, memory=memory, quick=True, calibration=_calibration(calibration), **asked)


def measured_factors(kept: Sequence[tuple[str, Recommendation]]) -> str:
    """What measured plans say of prices, by the newest recommendation that measured some; as JSON, so that it can be a
    key; empty where none did.
    """
    for _, one in kept:
        if one.calibration.count:
            return json.dumps(one.calibration.content())
    return ""


def files(run: store.Run, kind: str) -> Files:
    """The documents of a kind beside a run, the newest first, by what changes with them; a key of :func:`recommended`
    and :func:`stored_curve`.
    """
    found = []
    for path in store.list_plans(run.path, kind):
        try:
            found.append((str(path), path.stat().st_mtime_ns))
        except OSError:  # just removed
            continue
    return tuple(found)


def recommended(run: store.Run, *, files: Files) -> list[tuple[str, Recommendation]]:
    """(file name, recommendation) of those that were kept beside the run, the newest first; bytes of their candidates
    are those of the experts alone. Damaged ones, and those of other models, are left out.
    """
    found = []
    for path, _ in files:
        try:
            one = Recommendation.of(store.read_plan_document(path))
        except (PlanError, StoreError):
            continue
        if all(_of_run(run, candidate.plan) for candidate in one.candidates):
            found.append((Path(path).name, replace(one, candidates=_experts_alone(run, one.candidates))))
    return found


def stored_curve(run: store.Run, *, files: Files) -> pl.DataFrame:
    """The newest curve over all methods that was kept beside the run, as :func:`points` of which nothing was measured;
    empty where there is none that can be read.
    """
    whole = _whole(run)
    for path, _ in files:
        try:
            content = store.read_plan_document(path)
            other = int(content["bytes_before"]) - whole
            rows = [_row(one, int(one["bytes"]) - other, whole, run) for one in content["candidates"]]
            return pl.DataFrame(rows, schema=_POINTS)
        except (StoreError, KeyError, TypeError, ValueError, pl.exceptions.PolarsError):
            continue
    return pl.DataFrame(schema=_POINTS)


def evaluated(run: store.Run) -> list[Candidate]:
    """The plans beside the run with their newest evaluations, as candidates without a price of their own.

    Raises:
        StoreError: an evaluation cannot be read.
    """
    found: dict[str, Candidate] = {}
    documents = {document["plan"]: document for document in reversed(evaluation.documents(run))}
    for path in store.list_plans(run.path) if documents else ():
        try:
            plan = Plan.parse(store.read_plan(path), path.name)
        except (PlanError, StoreError):
            continue
        document = documents.get(plan.digest)
        if document is None or not _of_run(run, plan):
            continue
        row = evaluation.summary(document)
        ends = (row["kl_low"], row["kl_high"])
        low, high = (row["kl"] if end is None else end for end in ends)
        measured = Measurement(kl=row["kl"], low=low, high=high, tokens=row["tokens"])
        found[plan.digest] = Candidate(plan, mix_of(plan), _bytes(run, plan), plan.estimate.prediction, measured)
    return list(found.values())


def priced(run: store.Run, candidates: Iterable[Candidate]) -> pl.DataFrame:
    """One row per candidate, in their order: columns of :func:`points`.

    Args:
        run: the plans' run.
        candidates: their bytes are those of the experts alone.
    """
    whole, rows = _whole(run), []
    for one in candidates:
        content: dict[str, Any] = {
            "digest": one.plan.digest,
            "name": one.name,
            "mix": one.mix,
            "bits": one.plan.estimate.bits,
        }
        content["prediction"] = None if one.prediction is None else one.prediction.model_dump()
        row, seen = _row(content, one.bytes, whole, run) | {"elsewhere": one.elsewhere}, one.measurement
        if seen is not None:
            row |= {"measured": seen.kl, "measured_low": seen.low, "measured_high": seen.high}
            row["measured_tokens"] = seen.tokens
        rows.append(row)
    return pl.DataFrame(rows, schema=_POINTS).with_columns(pl.col("measured_low", "measured_high").fill_nan(None))


def points(frames: Sequence[pl.DataFrame], *, budget: int | None = None) -> pl.DataFrame:
    """One row per plan, by size: digest, name, mix; bytes of all experts afterwards, share of what they take now, bits:
    effective ones of a weight that stays; kl: predicted, with low and high at ``coverage``, basis and measured plans
    behind it; measured, with its 95 % interval and tokens, null where nobody measured; elsewhere: predicted on domains
    that the plan was not made from; pareto: no plan that is smaller is predicted to cost as little; fits the budget.

    Args:
        frames: of :func:`priced` and :func:`stored_curve`; what a later one knows of a plan counts.
        budget: bytes of the experts; None = everything fits.
    """
    rows = pl.concat([frame.select(list(_POINTS)) for frame in frames])
    known = [pl.col(name).drop_nulls().last() for name in _POINTS if name != "digest"]
    found = rows.group_by("digest", maintain_order=True).agg(known).sort("bytes", "kl", "digest", nulls_last=True)
    cheapest = pl.col("kl").fill_null(float("inf")).cum_min().shift(fill_value=float("inf"))
    fits = pl.lit(True) if budget is None else pl.col("bytes") <= budget
    return found.with_columns((pl.col("kl").fill_null(float("inf")) < cheapest).alias("pareto"), fits.alias("fits"))


def everything(
    run: store.Run,
    candidates: Sequence[Candidate],
    *,
    kept: Sequence[tuple[str, Recommendation]],
    budget: int,
    frames: Callable[..., Any],
) -> pl.DataFrame:
    """:func:`points` of all plans that are known: those given, those of recommendations and of a curve beside the run,
    and those that were measured.

    Args:
        run: their run.
        candidates: plans that were priced now.
        kept: of :func:`recommended`.
        budget: bytes of the experts.
        frames: ``frames(maker, run, ...)`` makes a frame, or takes it from a cache.

    Raises:
        StoreError: an evaluation cannot be read.
    """
    known = [*candidates, *(one for _, each in kept for one in each.candidates)]
    parts = [frames(stored_curve, run, files=files(run, "curve")), priced(run, known), priced(run, evaluated(run))]
    return points(parts, budget=budget)


def alternatives(run: store.Run, found: Recommendation) -> pl.DataFrame:
    """The candidates of a recommendation in their order: columns of :func:`points` that say something of each, and
    risks: how many sentences.
    """
    frame = priced(run, found.candidates).drop("pareto", "fits", "coverage")
    return frame.with_columns(pl.Series("risks", [len(one.risks) for one in found.candidates], pl.Int64))


def cheaper(points: pl.DataFrame, kl: float | None) -> dict[str, Any] | None:
    """The plan within the budget that is predicted to cost the least, where that is clearly less than ``kl``; it takes
    prices of all methods to find one that a first look did not try.
    """
    inside = points.filter(pl.col("fits") & pl.col("kl").is_not_null()).sort("kl")
    if inside.is_empty() or kl is None or inside["kl"][0] >= 0.9 * kl:
        return None
    return inside.row(0, named=True)


def budget_of(run: store.Run, found: Recommendation) -> int:
    """Bytes that the experts may take of a recommendation's memory: without the other weights that it counted."""
    return found.memory - (found.bytes_before - _whole(run))


def rests_on(candidate: Candidate) -> str:
    """On what a prediction rests, in a few words."""
    price = candidate.prediction
    if price is None:
        return "nobody can say what it costs: the run has not what it takes"
    if price.basis == "sums":
        return "from the run's sums, with a factor that is typical of models; no plan of this model was measured for it"
    return f"corrected by {price.plans} measured plans of this model"


def mixture(plan: Plan) -> str:
    """What a plan does, step by step, in words: ``drop 24 of 96 experts, then store what is left in 4.2 bits``."""
    return ", then ".join(dict.fromkeys(_words(plan, step, place) for place, step in enumerate(plan.steps)))


def _words(plan: Plan, step: Step, place: int) -> str:
    if isinstance(step, QuantizeStep):
        return f"store {'what is left' if place else 'the experts'} in {plan.estimate.bits or 0:.3g} bits a weight"
    experts = sum(shape.num_experts for shape in plan.source.layers)
    if isinstance(step, DropStep):
        if step.blocks or step.decoder_layers:
            return f"drop {len(step.blocks) + len(step.decoder_layers)} layers"
        return f"drop {sum(len(layer.experts) for layer in step.layers):,} of {experts:,} experts"
    if isinstance(step, MergeStep):
        left = sum(len(layer.groups) for layer in step.layers)
        whole = sum(plan.source.by_key[layer.layer, layer.step].num_experts for layer in step.layers)
        return f"merge {whole:,} experts into {left:,}"
    if isinstance(step, SlimStep):
        masks = [mask.mean() for (*_, role), mask in neurons_after(plan).items() if role == "routed"]
        return f"keep {(sum(masks) + experts - len(masks)) / experts:.0%} of the neurons".replace("%", " %")
    if isinstance(step, RouteStep):
        return f"choose experts by {step.rule} in {len(step.layers)} layers"
    return "keep in factors what experts differ by"


def _calibration(text: str) -> Calibration | None:
    return Calibration.of(json.loads(text)) if text else None


def _bytes(run: store.Run, plan: Plan) -> int:
    return expert_bytes(plan, source_bits=8.0 * (value_bytes(run) or 2))


def _experts_alone(run: store.Run, candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """With bytes of the experts, whatever else was counted when they were kept."""
    return tuple(replace(one, bytes=_bytes(run, one.plan)) for one in candidates)


def _row(one: Mapping[str, Any], size: int, whole: int, run: store.Run) -> dict[str, Any]:
    price, bits = one["prediction"] or {}, one["bits"]
    row: dict[str, Any] = dict.fromkeys(_POINTS) | {name: str(one[name]) for name in ("digest", "name", "mix")}
    row |= {"bytes": size, "share": size / whole, "bits": 8.0 * (value_bytes(run) or 2) if bits is None else bits}
    return row | {name: price.get(name) for name in ("kl", "low", "high", "coverage", "basis", "plans")}


def _whole(run: store.Run) -> int:
    return max(compress_presets.expert_bytes(run), 1)


def _of_run(run: store.Run, plan: Plan) -> bool:
    """A plan for the run's model."""
    return not run.info.model_fingerprint or plan.source.fingerprint in ("", run.info.model_fingerprint)
