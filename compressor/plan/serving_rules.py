"""What steps for an engine may not ask for: where experts lie, and on which device."""

from __future__ import annotations

from compressor.plan.caching import CacheStep
from compressor.plan.document import Plan
from compressor.plan.placement import PlaceStep
from compressor.plan.result import experts_after
from compressor.plan.source import LayerKey
from moescope.errors import PlanError


def check_serving(plan: Plan) -> None:
    """Refuse what no engine could do, after the cuts that come first.

    Raises:
        PlanError: with the layer, the number, and what would do.
    """
    words = [step.step for step in plan.steps]
    for word in ("cache", "place"):
        if words.count(word) > 1:
            raise PlanError(f"the plan has two {word} steps: put them into one")
    for step in plan.steps:
        if isinstance(step, (CacheStep, PlaceStep)):
            _every_layer_once(plan, step)
        if isinstance(step, CacheStep):
            _room_for_a_token(plan, step)
        elif isinstance(step, PlaceStep):
            _every_expert_somewhere(plan, step)


def _every_layer_once(plan: Plan, step: CacheStep | PlaceStep) -> None:
    keys = [(layer.layer, layer.step) for layer in step.layers]
    if len(set(keys)) < len(keys):
        raise PlanError(f"the plan's {step.step} step names a layer twice")
    missing = [key for key in experts_after(plan) if key not in keys]
    if missing:
        raise PlanError(f"the plan's {step.step} step says nothing of layer {missing[0][0]}")


def _room_for_a_token(plan: Plan, step: CacheStep) -> None:
    staying, shapes = _left(plan), plan.source.by_key
    for layer in step.layers:
        key = (layer.layer, layer.step)
        left = staying.get(key, set())
        for expert in (*layer.pinned, *layer.disk):
            if expert not in left:
                raise PlanError(f"the plan's cache step names expert {expert} of layer {key[0]}, which does not stay")
        if layer.slots > len(left):
            raise PlanError(f"layer {key[0]} has {len(left)} experts and {layer.slots} slots for them")
        need = min(shapes[key].top_k, len(left))
        if step.scope == "layer" and step.misses == "load" and layer.slots < need:
            raise PlanError(
                f"layer {key[0]} has {layer.slots} slots and a token needs {need} experts at once: give it {need}, or"
                " let the CPU run what is missing"
            )
    need = max(shapes[layer.layer, layer.step].top_k for layer in step.layers)
    if step.scope == "shared" and step.misses == "load" and step.slots < need:
        raise PlanError(f"the shared cache has {step.slots} slots and a token needs {need} experts of a layer at once")


def _every_expert_somewhere(plan: Plan, step: PlaceStep) -> None:
    staying = _left(plan)
    for layer in step.layers:
        left = staying.get((layer.layer, layer.step), set())
        unknown = sorted(set(layer.experts) - left)
        if unknown:
            raise PlanError(f"the plan places expert {unknown[0]} of layer {layer.layer}, which does not stay")
        missing = sorted(left - set(layer.experts))
        if missing:
            raise PlanError(f"the plan gives expert {missing[0]} of layer {layer.layer} no slot on any device")


def _left(plan: Plan) -> dict[LayerKey, set[int]]:
    """Experts of each layer that stay, by their numbers in the source."""
    return {key: {one.lead for one in experts} for key, experts in experts_after(plan).items()}
