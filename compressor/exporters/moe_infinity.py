"""MoE-Infinity: its configuration, which knows shares of memory and no expert.

Format: the configuration of EfficientMoE/MoE-Infinity at d617801. ``trace_path`` is left out: the loader tests for a
path object and is given a text, so a file of traces is ignored without a word. The released dispatcher evicts the
expert of fewest uses since it came, over all layers, whatever the paper says; prefetching is live for few families.
"""

from __future__ import annotations

import json
import math

from compressor.exporters.exported import Exported
from compressor.exporters.serving import cache_step, served, unsaid_cache, unsaid_others, unsaid_slots
from compressor.exporters.whole_layers import slot_bytes
from compressor.plan import CacheStep, Plan

ENGINE = "MoE-Infinity"
RATIO = 0.9
"""Its own default for both shares."""


def export(plan: Plan) -> Exported:
    """The plan as a configuration: the share of the device's memory that its slots take.

    Raises:
        PlanError: no cache step, or a checkpoint that it could not load.
    """
    step, where = cache_step(plan)
    known = served(plan, ENGINE)
    left_out = unsaid_others(plan, CacheStep)
    left_out += unsaid_cache(
        step, where, ENGINE, policies=("lfu_in_cache",), misses=("load",), scopes=("shared",),
        disk="it keeps all experts in files under offload_path and decides by itself which are in memory",
    )  # fmt: skip
    left_out += unsaid_slots(step, where, "it has one share of memory for all experts, and no list of them")
    notes = [
        "offload_path is an example: a folder on a fast disk with room for all experts",
        "trace_path is not written: both published versions ignore it without a word",
    ]
    share, vram = RATIO, plan.target.vram
    if vram is None:
        left_out.append(
            f"{where}: bytes of the slots; the plan was made without the device's memory, so no share of it"
        )
        notes.append(f"device_memory_ratio is its default, {RATIO:g}")
    else:
        share = min(math.floor(100 * slot_bytes(plan, step, known) / vram) / 100, RATIO)
        notes.append(
            f"device_memory_ratio {share:g} is the slots' part of the {vram / 2**30:.2f} GiB that the plan was made"
            " for: scale it if the device has more"
        )
    config = {
        "offload_path": "moe-infinity-experts", "device_memory_ratio": share, "host_memory_ratio": RATIO,
        "prefetch": False,
    }  # fmt: skip
    return Exported(json.dumps(config, indent=1) + "\n", tuple(left_out), tuple(notes))
