"""AutoRound: ``layer_config``, one entry per projection, with the names of its unfused experts.

Format: https://github.com/intel/auto-round (0.16). Every projection of every expert is named, those that stay with 16
bits, so that AutoRound's own scheme decides about none of them.
"""

from __future__ import annotations

import json
from typing import Any

from compressor.exporters.exported import Exported
from compressor.exporters.integer import integers
from compressor.exporters.targets import name_of
from compressor.plan import Plan

STAYS: dict[str, Any] = {"bits": 16, "data_type": "fp"}
"""The entry of a projection that stays as it is."""

MULTIPLE = 32
"""AutoRound leaves matrices at 16 bits whose rows or columns are no multiples of it."""

WIDE_NOTE = "8 bits with zero points: set AR_ALLOW_W8_ASYM=1, or AutoRound 0.16 refuses them"


def export(plan: Plan) -> Exported:
    """The plan as AutoRound's ``layer_config`` in JSON.

    Raises:
        PlanError: no widths, a family whose names are not known, or nothing that could be said.
    """
    config, missing = layer_config(plan)
    notes = ["layers that are not named get AutoRound's scheme: name them with 16 bits, as moescope apply does"]
    if plan.source.model_type == "gpt_oss":
        notes.append("AutoRound 0.16 writes right matrices for GPT-OSS, and runs its experts wrongly")
    if any(entry["bits"] == 8 and not entry["sym"] for entry in config.values() if "sym" in entry):
        notes.append(WIDE_NOTE)
    return Exported(json.dumps(config, indent=1) + "\n", tuple(missing), tuple(notes))


def layer_config(plan: Plan) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The entries by module name, and what is left out.

    Raises:
        PlanError: as :func:`export`.
    """
    found = integers(plan, "AutoRound", multiple=MULTIPLE)
    size, symmetric = found.step.group_size or -1, found.step.symmetric
    config: dict[str, dict[str, Any]] = {
        name_of(found.names, unit): {"bits": unit.bits, "group_size": size, "sym": symmetric} for unit in found.said
    }
    config |= {name: dict(STAYS) for unit in found.stay if (name := name_of(found.names, unit))}
    return config, found.missing
