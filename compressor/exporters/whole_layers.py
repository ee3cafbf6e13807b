"""Which layers' experts lie on the device where an engine moves those of a layer together."""

from __future__ import annotations

from compressor.exporters.exported import units
from compressor.exporters.serving import Served
from compressor.plan import CacheStep, LayerKey, Plan, QuantizeStep


def whole_layers(plan: Plan, step: CacheStep, known: Served) -> tuple[list[LayerKey], bool]:
    """Layers whose experts are all on the device, and whether that is what the plan says.

    A plan that holds all or none of each layer's experts is followed. In any other, layers are taken from the last to
    the first, each if it still fits, so that their bytes do not exceed those of the plan's slots. Which ones makes no
    difference to a token: it reads k experts in every layer, so no trace picks layers, and the last ones leave the
    fewest crossings between devices.
    """
    entries = {(layer.layer, layer.step): layer for layer in step.layers}
    total = known.num_experts
    present = {key: len(known.experts[key]) for key in known.layers}
    if step.scope == "layer" and all(entries[key].slots in (0, present[key]) for key in known.layers):
        return [key for key in known.layers if entries[key].slots], True
    sizes, room = expert_bytes(plan), slot_bytes(plan, step, known)
    kept = []
    for key in reversed(known.layers):
        size = sum(sizes[key].values()) * total / present[key]
        if size <= room * (1 + 1e-9):
            kept.append(key)
            room -= size
    return kept[::-1], False


def slot_bytes(plan: Plan, step: CacheStep, known: Served) -> float:
    """Bytes of the experts that the device holds at a time; other slots than those of pinned experts count as the
    smallest expert that they may hold."""
    sizes = expert_bytes(plan)
    entries = {(layer.layer, layer.step): layer for layer in step.layers if (layer.layer, layer.step) in known.layers}
    total = sum(sizes[key][expert] for key, entry in entries.items() for expert in entry.pinned)
    if step.scope == "shared":
        free = step.slots - sum(len(entry.pinned) for entry in entries.values())
        return total + free * min(min(row.values()) for row in sizes.values())
    return total + sum(min(sizes[key].values()) * (entry.slots - len(entry.pinned)) for key, entry in entries.items())


def expert_bytes(plan: Plan) -> dict[LayerKey, dict[int, float]]:
    """(layer, step) -> expert of the source -> its bytes; weights without a width have 16 bits."""
    quantize = next((one for one in plan.steps if isinstance(one, QuantizeStep) and one.form == "packed"), None)
    result: dict[LayerKey, dict[int, float]] = {}
    for unit in units(plan):
        if unit.role == "routed":
            key, expert = unit.source
            bits = 16.0 if quantize is None else quantize.stored(unit.bits, unit.inputs)
            row = result.setdefault(key, {})
            row[expert] = row.get(expert, 0.0) + unit.inputs * unit.outputs * bits / 8
    return result
