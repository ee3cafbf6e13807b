"""Hot experts as CSV, ``layer,expert,count``: the layout that tools around llama.cpp write, and several read.

There is no standard. Readers take the experts of most uses, layer by layer or over all layers; some want this very
header, some a header behind ``#``, some none. Numbers are those of decoder layers and of experts in the checkpoint
that is served. The fork that ``llama.cpp-cache`` is for reads another layout.
"""

from __future__ import annotations

from compressor.exporters.exported import Exported, require_some
from compressor.exporters.residents import counts, residents
from compressor.exporters.serving import cache_step, named, served, unsaid_cache, unsaid_others, unsaid_slots
from compressor.plan import CacheStep, LayerKey, Plan

HEADER = "layer,expert,count"


def export(plan: Plan) -> Exported:
    """The plan as a table of all routed experts: tokens that choose each, or 1 and 0 for a plan without counts.

    Raises:
        PlanError: no cache step, a checkpoint whose layers differ, or neither counts nor pins.
    """
    step, where = cache_step(plan)
    known = served(plan, "the table")
    found, first = counts(plan), residents(plan, step)
    require_some(found or any(first.values()), "a table of hot experts", ["it has neither counts nor pinned experts"])
    if found is None:
        found = {key: {expert: int(expert in first[key]) for expert in known.experts[key]} for key in known.layers}
        notes = ["counts are 1 for pinned experts and 0 for others: the plan does not hold how often each is chosen"]
    else:
        notes = [f"counts are tokens of run {plan.provenance.run} that choose the expert"]
    lines = [HEADER]
    for key, layer in known.layers.items():
        ranked = {known.experts[key][expert]: count for expert, count in found[key].items()}
        lines += [f"{layer},{expert},{ranked.get(expert, 0)}" for expert in range(known.num_experts)]
    left_out = unsaid_others(plan, CacheStep)
    left_out += unsaid_cache(
        step, where, "the table", policies=("static",), misses=("load", "cpu"), scopes=("layer", "shared")
    )
    left_out += unsaid_slots(step, where, "the table ranks experts, and its reader is told how many to hold")
    left_out += _otherwise(found, first)
    notes.append("a neutral table, not verified with any engine: whoever reads it says by which rule")
    return Exported("\n".join(lines) + "\n", tuple(left_out), tuple(notes))


def _otherwise(found: dict[LayerKey, dict[int, int]], first: dict[LayerKey, list[int]]) -> list[str]:
    """Layers whose experts on the device are not those of most uses."""
    result = []
    for key, experts in first.items():
        ranked = sorted(found[key], key=lambda expert: (-found[key][expert], expert))[: len(experts)]
        colder = sorted(set(experts) - set(ranked))
        if colder:
            result.append(
                f"layer {key[0]} ({named(colder)} on the device): others are chosen more often and rank first"
            )
    return result
