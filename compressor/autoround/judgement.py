"""Whether AutoRound's result is what the plan says, from what its process saw of it when it was loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compressor.autoround.backend import Report
from compressor.checkpoint.widths import PUBLISHED, Verdict, WidthReport, WidthRow
from compressor.exporters.exported import units
from compressor.exporters.targets import name_of
from compressor.families.module_names import module_names
from compressor.plan import Bits, Plan
from compressor.selfcheck import SelfCheck, reference_difference

if TYPE_CHECKING:
    from torch import nn

TUNED: dict[Bits, tuple[float, float]] = {8: (1e-4, 0.15), 4: (0.06, 0.25), 3: (0.13, 0.45), 2: (0.28, 0.8)}
"""Bands of tuned rounding, which moves weights further where that keeps the outputs: 200 steps on the bundled model
gave 0.012 to 0.088 at 8 bits, 0.091 to 0.147 at 4, 0.19 to 0.30 at 3, and 0.40 to 0.59 at 2."""

_NOTHING = 1e-4


def judged(plan: Plan, report: Report, source_model: nn.Module | None = None) -> SelfCheck:
    """The self-check of a result that this process must not load: AutoRound changes how others are loaded.

    Errors are held to the bands of :data:`compressor.checkpoint.widths.PUBLISHED`, those of tuned rounding to
    :data:`TUNED`; ``expected`` is the middle of the band.

    Args:
        plan: what was done.
        report: what was seen.
        source_model: for the reference's logits; without, they are not compared.
    """
    missed = ["routers: the result is loaded in a process of its own"]
    weights, logits = None, None
    if report.errors:
        weights = _weights(plan, report)
        if any(unit.role == "shared" and unit.bits is not None for unit in units(plan)):
            missed.append("errors of shared experts: they are not computed in that process")
    else:
        missed.append("errors of weights: pydantic is not installed for that Python")
    if source_model is None:
        missed.append("logits: the source was not loaded")
    else:
        ids = report.ids[None]
        logits = reference_difference(source_model, report.logits[None], plan, ids)
    return SelfCheck(
        missing=report.missing, mismatched=report.mismatched, weights=weights, logits=logits, exact=False,
        not_checked=tuple(missed),
    )  # fmt: skip


def _weights(plan: Plan, report: Report) -> WidthReport:
    names, rows, missing = module_names(plan.source.model_type), [], []
    for unit in units(plan):
        name = name_of(names, unit)
        if unit.bits is None or unit.role == "shared":
            continue
        error = report.errors.get(name)
        if error is None:
            missing.append(f"{name}: no such module")
            continue
        low, high = (TUNED if report.tuned else PUBLISHED)[unit.bits]
        verdict: Verdict = "ok"
        if not error <= 1:
            verdict = "wrong decode"
        elif error < _NOTHING:
            verdict = "skipped"
        elif not low <= error <= high:
            verdict = "outside band"
        (layer, _), expert = unit.source
        row = WidthRow(layer, expert, "routed", unit.part, unit.bits, (low + high) / 2, low, high, error, verdict)
        rows.append(row)
    return WidthReport.of(tuple(rows), tuple(missing))
