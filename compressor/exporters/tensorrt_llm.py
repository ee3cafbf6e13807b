"""TensorRT-LLM: ``moe_load_balancer.yaml``, slots of every MoE layer.

Format: examples/wide_ep/ep_load_balancer of NVIDIA/TensorRT-LLM at 2a595f8. Layers are the model's, dense ones counted;
slots are divided among ranks one behind the other. ``layer_updates_per_iter: 0`` leaves experts where they are.
"""

from __future__ import annotations

from compressor.exporters.exported import Exported
from compressor.exporters.serving import placement, unsaid_others, unsaid_place
from compressor.plan import PlaceStep, Plan


def export(plan: Plan) -> Exported:
    """The plan as a static assignment.

    Raises:
        PlanError: no place step, or a checkpoint that TensorRT-LLM could not load.
    """
    step, where, _, slots = placement(plan, "TensorRT-LLM")
    lines = [f"num_slots: {step.slots}", "initial_global_assignments:"]
    lines += [f"  {layer}: [{', '.join(map(str, experts))}]" for layer, experts in slots.items()]
    lines.append("layer_updates_per_iter: 0")
    notes = (
        "name the file in the options of the server: moe_config: {load_balancer: FILE}, with"
        f" moe_expert_parallel_size: {step.devices}",
    )
    left_out = (*unsaid_others(plan, PlaceStep), *unsaid_place(step, where))
    return Exported("\n".join(lines) + "\n", left_out, notes)
