"""What presets that quantize take alike: widths, what has one of its own, and the grids. Checked here, once."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from compressor.plan import BITS, Bits, QuantizeStep, group_size_for
from moescope.errors import PlanError
from planner.task import Task

Granularity = Literal["matrix", "expert", "layer", "projection"]
Widths = Sequence[Bits]
PACKED: tuple[Bits, ...] = (2, 3, 4, 8)
"""Widths that form packed holds."""

SHARED_BITS: Bits = 8
"""Of shared experts: every token uses them, and they lose more than routed ones at 2 bits (QuantMoE-Bench)."""


class Grid(TypedDict, total=False):
    """What all presets that quantize take beside their own parameters.

    Attributes:
        group_size: input channels that share a scale; 0 = a row, None = the largest of 128, 64, 32 and 16 that
            divides all.
        symmetric: grids around zero, without zero points.
        scales: ``clipped`` or ``range``, see :class:`compressor.plan.QuantizeStep`.
        shared_bits: width of shared experts; None = as they are.
    """

    group_size: int | None
    symmetric: bool
    scales: Literal["range", "clipped"]
    shared_bits: Bits | None


def widths_of(widths: Any) -> tuple[Bits, ...]:
    """Widths, the narrowest first, each once.

    Raises:
        PlanError: none, or one that is not known.
    """
    given = [widths] if isinstance(widths, (int, str)) else list(widths)
    if not given:
        raise PlanError(f"no width is left: name some of {', '.join(map(str, BITS))}")
    for one in given:
        if isinstance(one, bool) or one not in BITS:
            raise PlanError(f"width {one!r} is not known: there are {', '.join(map(str, BITS))}")
    return tuple(one for one in BITS if one in given)


def require_known(grid: Mapping[str, Any]) -> None:
    """Refuse parameters that are not in :class:`Grid`.

    Raises:
        PlanError: one is not; the nearest is named.
    """
    names = tuple(Grid.__annotations__)
    for name in grid:
        if name not in names:
            near = difflib.get_close_matches(name, [*names, "widths", "granularity"], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"beside its own it takes {', '.join(names)}"
            raise PlanError(f"no preset that quantizes has a parameter {name!r}: {hint}")


def require_form(task: Task, widths: set[Bits], nested: int | None) -> None:
    """Refuse widths that the task's form cannot hold.

    Raises:
        PlanError: form packed, and widths 1 or ternary, or nested ones.
    """
    wrong = [str(one) for one in BITS if one in widths and one not in PACKED]
    if task.form == "packed" and (wrong or nested):
        what = "nested widths" if nested else f"width {', '.join(wrong)}"
        raise PlanError(f"form packed holds widths 2, 3, 4 and 8, not {what}: use form dense")


def template(
    task: Task, granularity: Granularity, nested: Literal[2, 3, 4] | None, lengths: set[int], grid: Mapping[str, Any]
) -> QuantizeStep:
    """The step without its layers: granularity, form, and how grids are.

    Args:
        task: what is planned.
        granularity: what has a width of its own.
        nested: the narrowest of widths that one file serves.
        lengths: inputs of the rows that groups have to fill.
        grid: see :class:`Grid`.

    Raises:
        PlanError: a group size that does not divide, or scales that are not known.
    """
    scales = grid.get("scales", "clipped")
    if scales not in ("range", "clipped"):
        raise PlanError(f"scales {scales!r} are not known: use range or clipped")
    return QuantizeStep(
        method="", granularity=granularity, form=task.form, group_size=_group_size(grid.get("group_size"), lengths),  # type: ignore[arg-type]
        symmetric=bool(grid.get("symmetric", False)), scales=scales, nested=nested, layers=(),
    )  # fmt: skip


def _group_size(wanted: int | None, lengths: set[int]) -> int:
    if wanted is None:
        return group_size_for(*lengths)
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 0:
        raise PlanError(f"group size {wanted!r} is no number of channels: give one such as 128, or 0 for whole rows")
    odd = sorted(length for length in lengths if wanted and length % wanted)
    if odd:
        raise PlanError(f"groups of {wanted} do not divide rows of {odd[0]}: use {group_size_for(*lengths)}")
    return wanted


def groups_in_words(size: int) -> str:
    """``groups of 128``, or ``whole rows``."""
    return f"groups of {size}" if size else "whole rows"


def nominal_bits(bits: Bits | None) -> float:
    """Bits of a width itself; a ternary value holds log2(3), what stays as it is 16."""
    return 16.0 if bits is None else math.log2(3) if bits == "ternary" else float(bits)
