"""vLLM: arguments for expert parallelism. vLLM takes no map: it makes its own, and can be told how many replicas.

Format: vllm/config/parallel.py at 00193b8. ``--expert-placement-strategy`` knows two maps without replicas: linear,
experts one behind the other, and round_robin, expert e on device e mod D, which vLLM falls back from unless the
model routes within groups. With ``--enable-eplb`` it counts while it serves, and moves experts after the first window.
"""

from __future__ import annotations

import json

from compressor.exporters.exported import Exported
from compressor.exporters.serving import placement, unsaid_others, unsaid_place
from compressor.plan import PlaceStep, Plan

WINDOW, INTERVAL = 1000, 3000
"""vLLM's own: passes whose loads are added up, and passes from one move to the next."""


def export(plan: Plan) -> Exported:
    """The plan as arguments for ``vllm serve``, on one line.

    Raises:
        PlanError: no place step, or a checkpoint that vLLM could not load.
    """
    step, where, known, slots = placement(plan, "vLLM")
    left_out = [*unsaid_others(plan, PlaceStep), *unsaid_place(step, where)]
    notes = [f"expert parallelism is over tensor times data parallel ranks: make them {step.devices}"]
    strategy = _strategy(plan, step, known.num_experts, list(slots.values()))
    words = "--enable-expert-parallel"
    if strategy:
        words += f" --expert-placement-strategy {strategy}"
    else:
        redundant = step.slots - known.num_experts
        options = {
            "window_size": WINDOW, "step_interval": INTERVAL, "num_redundant_experts": redundant,
            "log_balancedness": True,
        }  # fmt: skip
        words += f" --enable-eplb --eplb-config '{json.dumps(options, separators=(',', ':'))}'"
        left_out.append(
            f"{where}: which device holds which experts; vLLM takes no map, only the number of redundant"
            f" experts ({redundant}), and makes its own from what it counts"
        )
        notes.append("vLLM starts with experts in order and moves them for the first time after some hundred passes")
    return Exported(f"{words}\n", tuple(left_out), tuple(notes))


def _strategy(plan: Plan, step: PlaceStep, experts: int, rows: list[list[int]]) -> str:
    """The strategy whose map is that of the plan in every layer; empty where there is none."""
    size = step.slots_per_device
    held = [[set(row[device * size : (device + 1) * size]) for device in range(step.devices)] for row in rows]
    if step.slots != experts:
        return ""
    linear = [set(range(device * size, (device + 1) * size)) for device in range(step.devices)]
    if all(row == linear for row in held):
        return "linear"
    turns = [set(range(device, experts, step.devices)) for device in range(step.devices)]
    grouped = all(shape.groups > 1 for shape in plan.source.layers)
    return "round_robin" if grouped and all(row == turns for row in held) else ""
