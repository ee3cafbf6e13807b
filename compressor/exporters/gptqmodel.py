"""GPTQModel: ``dynamic``, expressions and what they override; the first that matches counts.

Format: https://github.com/ModelCloud/GPTQModel. Before 7.3 it corrupts mixed widths: zero points are converted with the
width that the whole model states.
"""

from __future__ import annotations

import json

from compressor.exporters.exported import Exported
from compressor.exporters.integer import integers
from compressor.exporters.targets import targets
from compressor.plan import Plan

REST = "-:.*"
"""The last expression: whatever no other one matched stays as it is."""


def export(plan: Plan) -> Exported:
    """The plan as ``QuantizeConfig.dynamic`` in JSON.

    Raises:
        PlanError: no widths, a family whose names are not known, or nothing that could be said.
    """
    found = integers(plan, "GPTQModel")
    rest = {"group_size": found.step.group_size or -1, "sym": found.step.symmetric}
    dynamic: dict[str, dict[str, object]] = {
        f"+:{expression}": {"bits": bits, **rest}
        for bits, expressions in targets(found.names, found.said).items()
        for expression in expressions
    }
    dynamic[REST] = {}
    notes = ("needs GPTQModel 7.3 or later: earlier ones corrupt mixed widths",)
    return Exported(json.dumps(dynamic, indent=1) + "\n", tuple(found.missing), notes)
