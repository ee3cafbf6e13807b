"""llama.cpp: a file for ``llama-quantize --tensor-type-file``, one expression and type per line, and no comments.

llama.cpp keeps one projection of all experts of a layer in one tensor, so a width is one of a layer and projection.
Types are llama.cpp's own: their blocks and scales are part of the type, whatever groups the plan has.
"""

from __future__ import annotations

from collections import defaultdict

from compressor.exporters.exported import Exported, Unit, left_out, quantize_step, require_some, units, unsaid_steps
from compressor.families.module_names import GGUF_KINDS, GGUF_PARTS, module_names
from compressor.plan import Bits, Plan

TYPES: dict[Bits, tuple[tuple[str, int], ...]] = {
    2: (("q2_k", 256),),
    3: (("q3_k", 256),),
    4: (("q4_k", 256), ("q4_0", 32)),
    8: (("q8_0", 32),),
}
"""Width -> types with the number of channels in a block, which has to divide a row; the first that does is taken.

For rows that it does not divide, llama-quantize would take another type by itself, of another width.
"""


def export(plan: Plan) -> Exported:
    """The plan as types of tensors.

    Raises:
        PlanError: no widths, a family whose names are not known, or nothing that could be said.
    """
    quantize_step(plan)
    module_names(plan.source.model_type)  # what llama.cpp converts is named alike; others are refused
    together: dict[tuple[int, str, str], list[Unit]] = defaultdict(list)
    for unit in units(plan):
        together[unit.layer, unit.role, unit.part].append(unit)
    lines: list[str] = []
    cases: list[tuple[Unit, str]] = []
    for (layer, _, part), members in together.items():
        kind = _type(members)
        if kind:
            lines.append(rf"blk\.{layer}\.{GGUF_PARTS[part].format(GGUF_KINDS[members[0].role])}={kind}")
        else:
            reason = _reason(members)
            cases += [(unit, reason) for unit in members if unit.bits is not None]
    cases.sort(key=lambda case: (case[0].source[0], case[0].role, case[0].source[1]))
    missing = [*unsaid_steps(plan), *left_out(cases)]
    require_some(lines, "llama.cpp", left_out(cases))
    notes = ("groups, zero points and clipping are those of llama.cpp's types, not the plan's",)
    return Exported("\n".join(lines) + "\n", tuple(missing), notes)


def _type(members: list[Unit]) -> str:
    """The type of a tensor; empty where none says it."""
    bits = members[0].bits
    if bits is None or any(unit.bits != bits for unit in members):
        return ""
    fitting = (name for name, block in TYPES.get(bits, ()) if members[0].inputs % block == 0)
    return next(fitting, "")


def _reason(members: list[Unit]) -> str:
    widths = {unit.bits for unit in members}
    if len(widths) > 1:
        return "the experts of the layer have several widths, and llama.cpp keeps them in one tensor"
    bits = members[0].bits
    if bits not in TYPES:
        return "llama.cpp has no type of this width for weights that are not on such a grid already"
    return f"no type of this width for rows of {members[0].inputs}"
