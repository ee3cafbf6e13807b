"""A fork of llama.cpp that keeps single experts on the device: the profile that ``--moe-cache-profile`` reads.

Format: github.com/thecodacus/llama.cpp, branch ``perf`` at 8e5bc28 (src/llama-model.cpp, ``init_moe_expert_cache``).
Lines are ``position,layer,expert,expert,...``, as the fork's ``llama-moe-trace`` writes them: positions below zero are
skipped, lines are read up to 4095 characters, and experts of a layer are ranked by how often they occur, the lower
number first among equals. ``--moe-cache-slots N`` then holds the first N of every layer that the file names and that
lies in host memory. A line here says the N experts of a layer once, so that it is these that are held.
"""

from __future__ import annotations

from compressor.exporters.exported import Exported, require_some
from compressor.exporters.residents import residents
from compressor.exporters.serving import cache_step, named, served, unsaid_cache, unsaid_others
from compressor.plan import CacheStep, LayerKey, Plan

ENGINE = "the llama.cpp fork"
PER_LINE = 500
"""Experts of a line: below the 4095 characters that are read, whatever their numbers."""


def export(plan: Plan) -> Exported:
    """The plan as a profile that names as many experts of every layer, so that the device holds no more than the plan.

    Raises:
        PlanError: no cache step, a checkpoint that cannot be converted, or no slot for every layer.
    """
    step, where = cache_step(plan)
    known = served(plan, ENGINE)
    first = residents(plan, step)
    slots = min(step.slots // len(known.layers), known.num_experts)
    held = {key: experts[:slots] for key, experts in first.items()}
    lines = [line for key, experts in held.items() for line in _lines(known.layers[key], known.experts[key], experts)]
    require_some(lines, ENGINE, [_why_not(first, step, len(known.layers))])
    left_out = unsaid_others(plan, CacheStep)
    left_out += unsaid_cache(step, where, ENGINE, policies=("static",), misses=("cpu",))
    left_out += [
        f"layer {key[0]} ({named(experts[slots:])} on the device): the fork has as many slots in every layer,"
        f" {slots} where the device holds no more than the plan"
        for key, experts in first.items()
        if len(experts) > slots
    ]
    notes = (
        f"serve with --moe-cache-profile FILE --moe-cache-slots {slots} and all experts in host memory: -ngl 99 -ncmoe"
        f" {known.num_layers}",
        "for the fork at github.com/thecodacus/llama.cpp; llama.cpp itself has no such option. The fork wires a few"
        " architectures and runs others unchanged; its log says whether the cache was built",
    )
    return Exported("\n".join(lines) + "\n", tuple(left_out), notes)


def _lines(layer: int, numbers: dict[int, int], experts: list[int]) -> list[str]:
    found = sorted(numbers[expert] for expert in experts)
    parts = [found[start : start + PER_LINE] for start in range(0, len(found), PER_LINE)]
    return [f"{position},{layer},{','.join(map(str, part))}" for position, part in enumerate(parts)]


def _why_not(first: dict[LayerKey, list[int]], step: CacheStep, layers: int) -> str:
    if any(first.values()):
        return f"{step.slots} slots are fewer than one for each of {layers} layers, and it has as many in every layer"
    return "it pins no expert and holds no counts of how often they are chosen"
