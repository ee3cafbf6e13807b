"""Recommendations beside a run: their candidates as a table, and the list of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import polars as pl

import store
from app.text import size
from compressor.plan import Prediction
from moescope.errors import PlanError, StoreError
from planner.finalists import Measurement
from planner.recommendation import Candidate, Recommendation

NOT_MEASURED = "not measured"

_CANDIDATES = {
    "place": pl.Int32, "plan": pl.String, "steps": pl.String, "size": pl.String, "bits": pl.Float64,
    "predicted": pl.String, "measured": pl.String, "elsewhere": pl.Float64,
}  # fmt: skip
_CURVE = {"size": pl.String, "plan": pl.String, "steps": pl.String, "bits": pl.Float64, "predicted": pl.String}
_LIST = {
    "verdict": pl.String, "memory": pl.String, "plan": pl.String, "steps": pl.String, "size": pl.String,
    "predicted": pl.String, "measured": pl.String, "candidates": pl.Int32, "file": pl.String,
}  # fmt: skip


def documents(run: store.Run) -> list[tuple[Path, Recommendation]]:
    """The recommendations beside a run, the newest first; files that are none are left out."""
    found = []
    for path in store.list_plans(run.path, "recommendation"):
        try:
            found.append((path, Recommendation.of(store.read_plan_document(path))))
        except (PlanError, StoreError):
            continue
    return found


def recommendations(run: store.Run) -> pl.DataFrame:
    """One row per recommendation beside a run, the newest first: verdict, the memory that was asked for, and the best
    plan, where there is one; candidates: how many there were; file.
    """
    rows = []
    for path, found in documents(run):
        best = found.candidates[0] if found.candidates else None
        rows.append((found.verdict, size(found.memory), *(_row(best) if best else [None] * 5), len(found), path.name))
    return pl.DataFrame(rows, schema=_LIST, orient="row")


def candidates(found: Iterable[Candidate]) -> pl.DataFrame:
    """One row per candidate, in their order.

    Columns: place, from 1; plan; steps; size: of all weights that the budget counts; bits: of an expert's weight as it
    is stored, null where nothing is quantized; predicted and measured: KL divergence in nats per token with its
    interval, in words; elsewhere: predicted on text that the plan was not made from, null where it was not worked out.
    """
    rows = []
    for place, one in enumerate(found, 1):
        name, steps, bytes_, predicted, measured = _row(one)
        rows.append((place, name, steps, bytes_, one.plan.estimate.bits, predicted, measured, one.elsewhere))
    return pl.DataFrame(rows, schema=_CANDIDATES, orient="row")


def curve(found: Iterable[Candidate]) -> pl.DataFrame:
    """One row per candidate of :func:`planner.curve.curve`: size, plan, steps, bits, predicted."""
    rows = [(size(one.bytes), one.name, one.mix, one.plan.estimate.bits, predicted(one.prediction)) for one in found]
    return pl.DataFrame(rows, schema=_CURVE, orient="row")


def predicted(price: Prediction | None) -> str:
    """``0.0212 (0.0091 to 0.0492)``."""
    return "unknown" if price is None else f"{price.kl:.3g} ({price.low:.3g} to {price.high:.3g})"


def measured(found: Measurement | None) -> str:
    """``0.0212 (0.0205 to 0.0219)``; the interval is left out where there is one sequence."""
    if found is None:
        return NOT_MEASURED
    return f"{found.kl:.3g}" + (f" ({found.low:.3g} to {found.high:.3g})" if found.low == found.low else "")


def _row(one: Candidate) -> tuple[str, str, str, str, str]:
    name = f"{one.name}, found by search" if "factors" in one.recipe else one.name
    return name, one.mix, size(one.bytes), predicted(one.prediction), measured(one.measurement)
