"""SGLang: how often experts are chosen, as JSON for ``--init-expert-location``; the server places them itself.

Format: python/sglang/srt/eplb/expert_location.py at 01fec5c. ``logical_count`` is one number per decoder layer, dense
ones included, and expert; the server runs EPLB on it.
"""

from __future__ import annotations

import json

from compressor.exporters.exported import Exported
from compressor.exporters.residents import count_table
from compressor.exporters.serving import place_step, served, unsaid_others, unsaid_place
from compressor.plan import PlaceStep, Plan


def export(plan: Plan) -> Exported:
    """The counts that the plan was made from.

    Raises:
        PlanError: no place step, no counts, or a checkpoint that SGLang could not load.
    """
    step, where = place_step(plan)
    known = served(plan, "SGLang")
    rows = count_table(plan, known)
    redundant = step.slots - known.num_experts
    notes = (
        f"serve with --init-expert-location FILE --ep-size {step.devices} --ep-num-redundant-experts {redundant}",
        "SGLang places by its own EPLB: hierarchical where the groups of experts divide among nodes, else global",
    )
    left_out = [*unsaid_others(plan, PlaceStep), *unsaid_place(step, where)]
    left_out.append(
        f"{where}: slots by {step.method}; the server makes its own from the counts (--to sglang says them)"
    )
    return Exported(json.dumps({"logical_count": rows}) + "\n", tuple(left_out), notes)
