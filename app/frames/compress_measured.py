"""The plans beside a run, and what following them did to the model, from the evaluations beside it."""

from __future__ import annotations

from typing import Any

import polars as pl

import store
from app.frames import evaluation
from app.frames.compress import kept, title
from app.text import size
from compressor.plan import Plan, ServingStep
from moescope.errors import PlanError, StoreError

_PLANS = {
    "plan": pl.String,
    "digest": pl.String,
    "experts": pl.Int64,
    "experts_after": pl.Int64,
    "saved": pl.String,
    "weighed_error": pl.Float64,
    "kl": pl.Float64,
    "ratio": pl.Float64,
    "tokens": pl.Int64,
    "file": pl.String,
}


def documents(run: store.Run) -> dict[str, dict[str, Any]]:
    """The evaluations of this run's plans by a title of their own, the newest first; those of others are left out.

    Raises:
        StoreError: one cannot be read.
    """
    plans = plan_titles(run)
    found: dict[str, dict[str, Any]] = {}
    for document in evaluation.documents(run):
        digest = document["plan"]
        if digest in plans:
            words = f"{plans[digest]} ({digest[:6]}{'' if document['held_out'] else ', not held out'})"
            found[words if words not in found else f"{words} {len(found)}"] = document
    return found


def plan_titles(run: store.Run) -> dict[str, str]:
    """Digest -> title of the plans beside a run, the newest first; files that are none are left out."""
    return {plan.digest: title(plan) for _, plan in _plans(run)}


def plans(run: store.Run) -> pl.DataFrame:
    """One row per plan beside a run, the newest first: plan, digest, experts before and after, saved, predicted
    weighed_error; kl, perplexity ratio and predicted tokens of its newest evaluation, null where there is none; file.
    """
    measured: dict[str, dict[str, Any]] = {}
    for document in evaluation.documents(run):
        measured.setdefault(document["plan"], evaluation.summary(document))
    rows = []
    for file, plan in _plans(run):
        found = measured.get(plan.digest, {})
        rows.append(
            {
                "plan": title(plan),
                "digest": plan.digest,
                "experts": sum(shape.num_experts for shape in plan.source.layers),
                "experts_after": kept(plan),
                "saved": size(plan.estimate.bytes_saved),
                "weighed_error": plan.estimate.weighed_error,
                **{name: found.get(name) for name in ("kl", "ratio", "tokens")},
                "file": file,
            }
        )
    return pl.DataFrame(rows, schema=_PLANS)


def _plans(run: store.Run) -> list[tuple[str, Plan]]:
    found = []
    for path in store.list_plans(run.path):
        try:
            plan = Plan.parse(store.read_plan(path), path.name)
        except (PlanError, StoreError):
            continue
        if not all(isinstance(step, ServingStep) for step in plan.steps):  # those change no checkpoint
            found.append((path.name, plan))
    return found
