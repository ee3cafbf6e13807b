"""Widths of a plan, projection by projection, and where a plan's predicted cost comes from."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import polars as pl

import store
from app.frames.axes import layer_label
from compressor.plan import BITS, PARTS, Plan, QuantizeStep, bits_after, experts_after
from planner.candidates import Request
from planner.estimate.prediction import Calibration, predict
from planner.estimate.storage import stored_parts
from planner.estimate.stream import KINDS, stream_turns
from planner.task import Task

AS_IT_IS = "as it is"
WIDTHS = (*map(str, BITS), AS_IT_IS)
"""Names of widths, the narrowest first."""

CHANGES = {
    "cut": "experts that go", "merged": "experts that are merged", "slimmed": "neurons that go",
    "bits": "narrower weights",
}  # fmt: skip
"""What changes the residual stream, in words."""

_MAP = {
    "layer": pl.Int32, "step": pl.Int32, "label": pl.String, "expert": pl.Int32, "gone": pl.Boolean,
    **dict.fromkeys(PARTS, pl.String),
}  # fmt: skip
_HISTOGRAM = {
    "width": pl.String, "experts": pl.Int64, "projections": pl.Int64, "weights": pl.Int64, "share": pl.Float64,
}  # fmt: skip
_PRICE = {
    **dict.fromkeys(("kl", "low", "high", "coverage"), pl.Float64), "basis": pl.String, "plans": pl.Int64,
}  # fmt: skip
_TURNS = {"layer": pl.Int32, "change": pl.String, "turned": pl.Float64, "kl": pl.Float64}


def widths(plan: Plan) -> pl.DataFrame:
    """One row per routed expert of the source: layer, step, label, expert; gone: it does not stand any more; gate, up,
    down: the width of each projection, one of :data:`WIDTHS`, null where there is none. No row for plans that quantize
    nothing.
    """
    found, after = bits_after(plan), experts_after(plan)
    rows: list[dict[str, Any]] = []
    for shape in plan.source.layers if found else ():
        leads = {one.lead for one in after.get(shape.key, [])}
        for expert in range(shape.num_experts):
            row: dict[str, Any] = {"layer": shape.layer, "step": shape.step, "label": layer_label(*shape.key)}
            row |= {"expert": expert, "gone": expert not in leads, **dict.fromkeys(PARTS)}
            if expert in leads:
                entry = found.get((*shape.key, expert, "routed"))
                row |= {part: _name(None if entry is None else entry[0].of(part)) for part in _parts(plan)}
            rows.append(row)
    return pl.DataFrame(rows, schema=_MAP)


def differing(frame: pl.DataFrame) -> list[str]:
    """The projections that stand in :func:`widths`, where an expert's differ; one of them where none do."""
    there = [part for part in PARTS if frame[part].null_count() < len(frame)]
    alike = all(frame[there[0]].equals(frame[part]) for part in there[1:]) if there else True
    return there[:1] if alike else there


def histogram(plan: Plan) -> pl.DataFrame:
    """One row per width that occurs, the narrowest first: width, routed and shared experts with a projection of it,
    projections, weights, share of all weights of experts that stay.
    """
    steps = [one.model_copy(update={"form": "packed"}) if isinstance(one, QuantizeStep) else one for one in plan.steps]
    found = bits_after(plan)
    weights: Counter[str] = Counter()
    parts: Counter[str] = Counter()
    units: dict[str, set[tuple[Any, ...]]] = {}
    for part in stored_parts(plan.model_copy(update={"steps": tuple(steps)}), source_bits=16.0) if found else ():
        entry = found.get(part.unit)
        width = _name(None if entry is None else entry[0].of(part.part))
        weights[width] += part.weights
        parts[width] += 1
        units.setdefault(width, set()).add(part.unit)
    whole = sum(weights.values())
    rows = [(one, len(units[one]), parts[one], weights[one], weights[one] / whole) for one in WIDTHS if one in weights]
    return pl.DataFrame(rows, schema=_HISTOGRAM, orient="row")


def turns(run: store.Run, plan: Plan, *, calibration: str = "") -> pl.DataFrame:
    """Where a plan's predicted cost comes from, one row per decoder layer and change: layer, change (a key of
    :data:`CHANGES`), turned: squared change of the stream over the squared stream, mean over tokens, kl: what it is
    predicted to cost, nats per token; these add up to the plan's price. Empty where the run cannot price it.

    Args:
        run: the plan's run.
        plan: the plan.
        calibration: what prices rest on, as JSON; empty = the typical factor.
    """
    factors = Calibration.of(json.loads(calibration)) if calibration else Calibration()
    rows = []
    for layer, turned in sorted((stream_turns(plan, _task(run, plan)) or {}).items()):
        for kind in KINDS:
            change = getattr(turned, kind)
            rows.append((layer, kind, change, factors.factors.get((layer, kind), factors.typical) * change))
    return pl.DataFrame(rows, schema=_TURNS, orient="row")


def price(run: store.Run, plan: Plan, *, calibration: str = "") -> pl.DataFrame:
    """What a plan is predicted to cost, one row: kl, low and high at ``coverage``, basis, plans; empty where the run
    cannot price it. Arguments as for :func:`turns`.
    """
    factors = Calibration.of(json.loads(calibration)) if calibration else None
    found = predict(plan, _task(run, plan), factors)
    return pl.DataFrame([] if found is None else [found.model_dump()], schema=_PRICE)


def _task(run: store.Run, plan: Plan) -> Task:
    return Request(run=run, memory=0, domains=plan.provenance.domains or None).task()


def _parts(plan: Plan) -> tuple[str, ...]:
    return PARTS if plan.source.gated else PARTS[1:]


def _name(bits: object) -> str:
    return AS_IT_IS if bits is None else str(bits)
