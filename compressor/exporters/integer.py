"""What the formats for grids of whole numbers (AutoRound, llm-compressor, GPTQModel) have in common."""

from __future__ import annotations

from dataclasses import dataclass

from compressor.exporters.exported import (
    Unit,
    left_out,
    quantize_step,
    require_some,
    units,
    unsaid_steps,
)
from compressor.exporters.targets import name_of
from compressor.families.module_names import ModuleNames, module_names
from compressor.plan import Plan, QuantizeStep

WIDTHS = (2, 3, 4, 8)
"""Widths that the formats pack."""


@dataclass(frozen=True)
class Integers:
    """A plan's widths, as far as grids of whole numbers say them.

    Attributes:
        names: of the family.
        step: what the widths mean.
        said: projections that get a width.
        stay: projections that stay as they are, those that are left out included.
        missing: what is left out, in sentences.
    """

    names: ModuleNames
    step: QuantizeStep
    said: list[Unit]
    stay: list[Unit]
    missing: list[str]


def integers(plan: Plan, engine: str, *, multiple: int = 1) -> Integers:
    """The widths of a plan for an engine with grids of whole numbers.

    Args:
        plan: what to export.
        engine: its name for messages.
        multiple: rows and columns of a matrix have to be whole multiples of it.

    Raises:
        PlanError: the plan has no widths, the family's names are not known, or nothing could be said.
    """
    step, names = quantize_step(plan), module_names(plan.source.model_type)
    said, stay, cases = [], [], []
    for unit in units(plan):
        reason = _reason(unit, names, engine, multiple)
        if unit.bits is None or reason:
            stay.append(unit)
            if unit.bits is not None:
                cases.append((unit, reason))
        else:
            said.append(unit)
    missing = [*unsaid_steps(plan), *left_out(cases)]
    require_some(said, engine, left_out(cases))
    return Integers(names, step, said, stay, missing)


def _reason(unit: Unit, names: ModuleNames, engine: str, multiple: int) -> str:
    """Why a projection cannot be said; empty where it can."""
    if unit.source[0][1]:
        return "the experts of a further call have no modules whose names are known"
    if not name_of(names, unit):
        return "its gate and up projections are no modules of their own"
    if unit.bits not in WIDTHS:
        return f"{engine} has no such width"
    if unit.inputs % multiple or unit.outputs % multiple:
        return f"{engine} leaves {unit.outputs} x {unit.inputs} as it is: no multiples of {multiple}"
    return ""
