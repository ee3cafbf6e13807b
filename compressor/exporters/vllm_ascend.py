"""vLLM on Ascend: the map of experts that its model runner V1 reads.

Format: vllm_adaptor.py of vllm-project/vllm-ascend at 0011ce3. Layers are MoE layers, counted from 0; every device
lists its experts in the order of its slots. The model runner V2 refuses it.
"""

from __future__ import annotations

import json

from compressor.exporters.exported import Exported
from compressor.exporters.serving import placement, unsaid_others, unsaid_place
from compressor.plan import PlaceStep, Plan


def export(plan: Plan) -> Exported:
    """The plan as a map.

    Raises:
        PlanError: no place step, or a checkpoint that vLLM could not load.
    """
    step, where, known, slots = placement(plan, "vLLM on Ascend")
    size = step.slots_per_device
    layers = [
        {
            "layer_id": number,
            "device_count": step.devices,
            "device_list": [
                {"device_id": device, "device_expert": row[device * size : (device + 1) * size]}
                for device in range(step.devices)
            ],
        }
        for number, row in enumerate(slots.values())
    ]
    options = {"eplb_config": {"expert_map_path": "FILE", "num_redundant_experts": step.slots - known.num_experts}}
    notes = (
        f"serve with --enable-expert-parallel --additional-config '{json.dumps(options)}' with the path for FILE",
        "for its model runner V1 alone; V2 refuses a map",
    )
    left_out = (*unsaid_others(plan, PlaceStep), *unsaid_place(step, where))
    return Exported(json.dumps({"moe_layer_count": len(layers), "layer_list": layers}) + "\n", left_out, notes)
