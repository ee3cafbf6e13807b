"""The presets beside each other: what they need, whether a run has it, and what each would do at one budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

import planner
import store
from app.frames import compress
from app.text import size
from compressor.plan import Plan
from moescope.errors import PlanError
from planner.estimate.parameters import expert_parameters, sizes_before
from planner.presets import DEFAULT, DEFAULT_UNIFORM, PRESETS, Preset
from planner.source import source_of, value_bytes

_PRESETS = {
    "preset": pl.String,
    "title": pl.String,
    "step": pl.String,
    "level": pl.String,
    "here": pl.Boolean,
    "forms": pl.String,
    "source": pl.String,
    "missing": pl.String,
}
_COMPARISON = {
    "preset": pl.String,
    "title": pl.String,
    "step": pl.String,
    "form": pl.String,
    "score": pl.String,
    "experts_after": pl.Int64,
    "parameters_after": pl.Int64,
    "saved": pl.String,
    "layer_error": pl.Float64,
    "weighed_error": pl.Float64,
    "kept_mass": pl.Float64,
    "refused": pl.String,
}
_TRIED: tuple[dict[str, Any], ...] = ({"share": 0.25}, {"share": 0.5})
_TRIED_BITS: tuple[dict[str, Any], ...] = ({"bits": 4.5}, {"bits": 9.0})


def presets(run: store.Run) -> pl.DataFrame:
    """One row per preset: preset, title, step, level that it needs, here: this run can give it, forms, source, missing:
    why not, null where it can.
    """
    rows = []
    nothing = _no_plan_at_all(run)
    for preset in PRESETS:
        missing = nothing or _missing(run, preset)
        rows.append(
            (preset.name, preset.title, preset.step, preset.level, missing is None, ", ".join(preset.forms),
             preset.source, missing)
        )  # fmt: skip
    return pl.DataFrame(rows, schema=_PRESETS, orient="row")


def comparison(run: store.Run, *, form: Any = None, **asked: Any) -> pl.DataFrame:
    """One row per preset that the run can give, at what was asked for: preset, title, step, form, score, experts_after,
    parameters_after, saved, layer_error, weighed_error, kept_mass; refused: why there is no such plan, else null.

    Args:
        run: a run.
        form: how the result is stored, for the presets that can; the others take their own.
        asked: what else ``planner.make`` takes, without ``preset``.
    """
    here = set(presets(run).filter("here")["preset"])
    rows, worked_out = [], dict[Any, Any]()  # what presets have in common
    for preset in PRESETS:
        if preset.name not in here:
            continue
        row: dict[str, Any] = dict.fromkeys(_COMPARISON)
        row |= {"preset": preset.name, "title": preset.title, "step": preset.step}
        try:
            taken = form if form in preset.forms else None
            row |= _figures(planner.make(run, preset=preset.name, form=taken, kept=worked_out, **asked))
        except PlanError as error:
            row["refused"] = str(error)
        rows.append(row)
    return pl.DataFrame(rows, schema=_COMPARISON)


def first_choice(names: Sequence[str]) -> str:
    """The preset that is shown first: the planner's default where the run can give it."""
    return next((name for name in (DEFAULT, DEFAULT_UNIFORM) if name in names), names[0])


def expert_bytes(run: store.Run) -> int:
    """Bytes of all experts' weights in the run's type; in 16 bits where the run does not say which.

    Raises:
        PlanError: the run does not know its experts.
    """
    source = source_of(run)
    return expert_parameters(source, sizes_before(source)) * (value_bytes(run) or 2)


def _figures(plan: Plan) -> dict[str, Any]:
    estimate, evidence = plan.estimate, compress.evidence_of(plan)
    return {
        "form": ", ".join(dict.fromkeys(step.form for step in plan.for_checkpoint)),
        "score": evidence.score if evidence is not None else "",
        "experts_after": compress.kept(plan),
        "parameters_after": estimate.expert_parameters_after,
        "saved": size(estimate.bytes_saved),
        "layer_error": estimate.layer_error,
        "weighed_error": estimate.weighed_error,
        "kept_mass": estimate.kept_mass,
    }


def _no_plan_at_all(run: store.Run) -> str | None:
    try:
        source_of(run)
    except PlanError as error:
        return str(error)
    return None


def _missing(run: store.Run, preset: Preset) -> str | None:
    """Why this run cannot give a preset; None where it can."""
    lacking = preset.lacking(run.info.levels)
    if lacking and not run.omissions:
        return (
            f"run {run.name!r} was recorded without level {', '.join(lacking)}: collect it with --level {preset.wanted}"
        )
    return _tried(run, preset) if run.omissions else None


def _tried(run: store.Run, preset: Preset) -> str | None:
    """An import may lack any sum, whatever its level says: only trying tells."""
    first: str | None = None
    for asked in _TRIED_BITS if preset.step == "quantize" else _TRIED:
        try:
            planner.make(run, preset=preset.name, **asked)
        except PlanError as error:
            first = first or str(error)
        else:
            return None
    return first
