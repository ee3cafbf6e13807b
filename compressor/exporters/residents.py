"""How often experts are chosen, and which of them the device holds when nothing moves: from the plan alone."""

from __future__ import annotations

from compressor.exporters.serving import Served
from compressor.plan import CacheStep, LayerKey, Plan, experts_after
from moescope.errors import PlanError

SCORE = "selections"
"""Name of the evidence that holds counts, in tokens."""

Counts = dict[LayerKey, dict[int, int]]
"""(layer, step) of the source -> expert of the source that stays -> tokens that choose it."""


def counts(plan: Plan) -> Counts | None:
    """Selections per expert that stays; a merged expert has those of its members. None where the plan holds none.

    Raises:
        PlanError: a layer's counts are missing, negative, or not as many as its experts.
    """
    found = next((one for one in plan.evidence if one.score == SCORE), None)
    if found is None:
        return None
    values = {(layer.layer, layer.step): layer.values for layer in found.layers}
    result: Counts = {}
    for key, experts in experts_after(plan).items():
        size = plan.source.by_key[key].num_experts
        row = values.get(key, ())
        if len(row) != size or any(value is not None and value < 0 for value in row):
            raise PlanError(f"the plan's counts of layer {key[0]} are not one number per expert, of {size}: plan again")
        result[key] = {one.lead: round(sum(row[member] or 0 for member in one.members)) for one in experts}
    return result


def require_counts(plan: Plan) -> Counts:
    """Selections per expert.

    Raises:
        PlanError: the plan holds none.
    """
    found = counts(plan)
    if found is None:
        raise PlanError(
            f"the plan holds no counts of how often experts are chosen (evidence {SCORE!r}): plan again from a run"
        )
    return found


def count_table(plan: Plan, known: Served) -> list[list[int]]:
    """Counts [decoder layer][expert] of the result; zero in dense layers and for experts that only fill up.

    Raises:
        PlanError: the plan holds none.
    """
    rows = [[0] * known.num_experts for _ in range(known.num_layers)]
    for key, row in require_counts(plan).items():
        for expert, count in row.items():
            rows[known.layers[key]][known.experts[key][expert]] = count
    return rows


def residents(plan: Plan, step: CacheStep) -> dict[LayerKey, list[int]]:
    """Experts of the source that the device holds at first, the hottest first: all pinned ones, and the most chosen
    others in the slots that are left.

    Without counts in the plan, only those that are pinned. Ties go to the lower number, and in a shared cache to the
    earlier layer.
    """
    found, after = counts(plan) or {}, experts_after(plan)
    entries = {(layer.layer, layer.step): layer for layer in step.layers}

    def heat(key: LayerKey, expert: int) -> tuple[int, LayerKey, int]:
        return -found.get(key, {}).get(expert, 0), key, expert

    result = {key: sorted(entries[key].pinned, key=lambda expert: heat(key, expert)) for key in after}
    others = sorted(
        (heat(key, expert) for key, row in found.items() for expert in row if expert not in entries[key].pinned)
    )
    free = step.slots - sum(map(len, result.values()))
    for _, key, expert in others:
        if free > 0 and (step.scope == "shared" or len(result[key]) < entries[key].slots):
            result[key].append(expert)
            free -= 1
    return result
