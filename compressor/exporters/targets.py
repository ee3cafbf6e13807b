"""Regular expressions for groups of projections, in the names that engines use."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from compressor.exporters.exported import Unit
from compressor.families.module_names import ModuleNames
from compressor.plan import Bits, Role


def name_of(names: ModuleNames, unit: Unit) -> str:
    """The module of one projection; empty where the family has no module for it."""
    if unit.role == "shared":
        return names.shared_expert(unit.layer, unit.part)
    return names.expert(unit.layer, unit.expert, unit.part)


def targets(names: ModuleNames, wanted: Iterable[Unit]) -> dict[Bits, list[str]]:
    """Width -> anchored expressions that match the projections of that width, layer by layer.

    Experts of a layer whose projections have the same widths stand in one expression.

    Args:
        names: of the family.
        wanted: projections that have a width and a module.
    """
    parts: dict[tuple[Bits, int, Role, int], list[str]] = defaultdict(list)
    for unit in wanted:
        if unit.bits is not None:
            parts[unit.bits, unit.layer, unit.role, unit.expert].append(unit.part)
    alike: dict[tuple[Bits, int, Role, tuple[str, ...]], list[int]] = defaultdict(list)
    for (bits, layer, role, expert), found in parts.items():
        alike[bits, layer, role, tuple(found)].append(expert)
    result: dict[Bits, list[str]] = defaultdict(list)
    for (bits, layer, role, which), experts in alike.items():
        result[bits].append(_expression(names, layer, role, which, sorted(experts)))
    return dict(result)


def _expression(names: ModuleNames, layer: int, role: Role, parts: tuple[str, ...], experts: list[int]) -> str:
    ending = rf"\.{_either(parts)}_proj$"
    if role == "shared":
        return "^" + re.escape(f"{names.layers}.{layer}.{names.shared}") + ending
    return "^" + re.escape(f"{names.layers}.{layer}.{names.block}.experts.") + _either(map(str, experts)) + ending


def _either(words: Iterable[str]) -> str:
    found = list(words)
    return found[0] if len(found) == 1 else f"({'|'.join(found)})"
