"""torchao: ``FqnToConfig``, an expression per layer, for layers whose experts all have 8 bits.

Format: torchao 0.18, as ``torchao.core.config.config_to_dict`` writes it. It reaches the fused experts of transformers
(``experts_implementation="eager"``) with one scale per row, and no other width: whatever else a plan says is left out.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict

from compressor.checkpoint.slots import TRANSPOSED
from compressor.exporters.exported import Exported, Unit, left_out, quantize_step, require_some, units, unsaid_steps
from compressor.families.module_names import module_names
from compressor.plan import Plan, QuantizeStep

_INT8 = {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}


def export(plan: Plan) -> Exported:
    """The plan as ``FqnToConfig`` in JSON; ``config_from_dict`` reads it.

    Raises:
        PlanError: no widths, a family whose names are not known, or nothing that could be said.
    """
    step, names = quantize_step(plan), module_names(plan.source.model_type)
    together: dict[tuple[int, str], list[Unit]] = defaultdict(list)
    for unit in units(plan):
        together[unit.layer, unit.role].append(unit)
    expressions: list[str] = []
    cases: list[tuple[Unit, str]] = []
    for (layer, role), members in together.items():
        reason = _reason(members, role, step, plan.source.model_type)
        if reason:
            cases += [(unit, reason) for unit in members if unit.bits is not None]
        elif any(unit.bits for unit in members):
            inside = re.escape(f"{names.layers}.{layer}.{names.block}.experts.")
            first = "gate_up" if plan.source.gated else "up"
            expressions.append(rf"re:^{inside}({first}|down)_proj$")
    missing = [*unsaid_steps(plan), *left_out(cases)]
    require_some(expressions, "torchao", left_out(cases))
    config = {"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": dict.fromkeys(expressions, _INT8)}}
    notes = ('load with experts_implementation="eager": other ways to run experts do not take its tensors',)
    return Exported(json.dumps(config, indent=1) + "\n", tuple(missing), notes)


def _reason(members: list[Unit], role: str, step: QuantizeStep, family: str) -> str:
    """Why the experts of a layer cannot be said; empty where they can, or where they all stay as they are."""
    widths = {unit.bits for unit in members}
    if widths == {None}:
        return ""
    if role == "shared":
        return "torchao's fused experts are the routed ones"
    if family in TRANSPOSED:
        return "its experts are stored transposed, so that a row is no row of the projection"
    if widths != {8}:
        return "torchao has 8 bits for all experts of a layer, and no other width"
    if step.group_size or not step.symmetric:
        return "torchao has one scale per row and no zero points for fused experts"
    return ""
