"""llm-compressor: a recipe in YAML whose groups match the linearised experts by anchored expressions.

Format: https://github.com/vllm-project/llm-compressor (0.14), ``QuantizationModifier``. Names are those in memory after
``linearize_moe``; only modules that an expression matches are quantized.
"""

from __future__ import annotations

import json
import re
from typing import Any

from compressor.exporters.exported import Exported
from compressor.exporters.integer import integers
from compressor.exporters.targets import targets
from compressor.plan import Plan


def export(plan: Plan) -> Exported:
    """The plan as a recipe with one group per width.

    Raises:
        PlanError: no widths, a family whose names are not known, or nothing that could be said.
    """
    found = integers(plan, "llm-compressor")
    step = found.step
    groups: dict[str, Any] = {}
    for number, (bits, expressions) in enumerate(sorted(targets(found.names, found.said).items(), key=_width)):
        weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": step.symmetric}
        weights |= {"strategy": "group", "group_size": step.group_size} if step.group_size else {"strategy": "channel"}
        groups[f"group_{number}"] = {"targets": [f"re:{one}" for one in expressions], "weights": weights}
    modifier = {"ignore": ["lm_head", f"re:.*{re.escape('.' + found.names.router)}$"], "config_groups": groups}
    text = _yaml({"quant_stage": {"quant_modifiers": {"QuantizationModifier": modifier}}})
    notes = (
        "transformers reads mixed widths of experts wrongly, without a word: load the result with compressor.load",
    )
    return Exported(text, tuple(found.missing), notes)


def _width(entry: tuple[Any, list[str]]) -> int:
    return int(entry[0])


def _yaml(value: Any, indent: str = "") -> str:
    """Mappings, lists and scalars as YAML; scalars are written as JSON, which YAML contains."""
    lines = []
    if isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(inner, (dict, list)):
                lines.append(f"{indent}{key}:\n{_yaml(inner, indent + '  ')}")
            else:
                lines.append(f"{indent}{key}: {json.dumps(inner)}\n")
    else:
        lines = [f"{indent}- {json.dumps(inner)}\n" for inner in value]
    return "".join(lines)
