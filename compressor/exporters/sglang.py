"""SGLang: where experts lie at the start, as JSON for ``--init-expert-location``.

Format: python/sglang/srt/eplb/expert_location.py at 01fec5c. One key and no other, ``physical_to_logical_map``: a row
of P experts for every decoder layer, dense ones included, whose rows are trivial. Rank r of R holds the columns
r * P / R to (r + 1) * P / R - 1, and every expert has to occur in every row.
"""

from __future__ import annotations

import json

from compressor.exporters.exported import Exported
from compressor.exporters.serving import placement, unsaid_others, unsaid_place
from compressor.plan import PlaceStep, Plan


def export(plan: Plan) -> Exported:
    """The plan as an initial map.

    Raises:
        PlanError: no place step, or a checkpoint that SGLang could not load.
    """
    step, where, known, slots = placement(plan, "SGLang")
    trivial = [slot % known.num_experts for slot in range(step.slots)]
    rows = [slots.get(layer, trivial) for layer in range(known.num_layers)]
    redundant = step.slots - known.num_experts
    notes = (
        f"serve with --init-expert-location FILE --ep-size {step.devices} --ep-num-redundant-experts {redundant}",
        "with a map of its own, SGLang takes --ep-dispatch-algorithm static unless told otherwise; with --enable-eplb"
        " it moves experts while it runs, and the map is where it begins",
    )
    left_out = (*unsaid_others(plan, PlaceStep), *unsaid_place(step, where))
    return Exported(json.dumps({"physical_to_logical_map": rows}) + "\n", left_out, notes)
