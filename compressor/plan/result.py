"""What a plan leaves: the experts of every layer and from whom they come, their widths, and the decoder layers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compressor.plan.bits import ExpertBits, QuantizeStep
from compressor.plan.document import Plan
from compressor.plan.source import LayerKey, Source
from compressor.plan.steps import DropStep, MergeLayer, MergeStep, Role, SlimStep


@dataclass(frozen=True)
class NewExpert:
    """One expert of the result.

    Attributes:
        lead: the expert of the source in whose place it stands.
        members: experts of the source that it is made of.
        weights: their parts.
    """

    lead: int
    members: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def merged(self) -> bool:
        """Made of several."""
        return len(self.members) > 1


def kept_layers(plan: Plan) -> list[int]:
    """The decoder layers of the source that stay, in order; their places are their new numbers."""
    gone = {layer for step in plan.steps if isinstance(step, DropStep) for layer in step.decoder_layers}
    return [layer for layer in range(plan.source.num_layers) if layer not in gone]


def experts_after(plan: Plan) -> dict[LayerKey, list[NewExpert]]:
    """(layer, step) of the source -> its experts afterwards in order; layers that go as a whole are left out.

    Experts that only fill up (form ``padded``) are not in it.
    """
    stays = set(kept_layers(plan))
    result = {
        shape.key: [NewExpert(expert, (expert,), (1.0,)) for expert in range(shape.num_experts)]
        for shape in plan.source.layers
        if shape.layer in stays
    }
    for step in plan.steps:
        if isinstance(step, DropStep):
            for entry in step.layers:
                key = (entry.layer, entry.step)
                if key in result:
                    gone = set(entry.experts)
                    result[key] = [expert for expert in result[key] if expert.lead not in gone]
        elif isinstance(step, MergeStep):
            for layer in step.layers:
                if (layer.layer, layer.step) in result:
                    result[layer.layer, layer.step] = _merged(layer)
    return result


def places_after(plan: Plan, after: dict[LayerKey, list[NewExpert]]) -> dict[LayerKey, dict[int, int]]:
    """(layer, step) -> lead of the source -> its place in the result; fillers stand behind those of their group."""
    forms = {step.form for step in plan.steps if isinstance(step, (DropStep, MergeStep))}
    largest = max(map(len, after.values()), default=0) if "padded" in forms else 0
    result = {}
    for key, experts in after.items():
        shape, leads = plan.source.by_key[key], [one.lead for one in experts]
        result[key] = {lead: place for place, lead in enumerate(leads)}
        if shape.groups > 1 and largest > len(leads):
            size, room = shape.num_experts // shape.groups, largest // shape.groups
            inside: dict[int, int] = {}
            for lead in leads:
                group = lead // size
                result[key][lead] = group * room + inside.get(group, 0)
                inside[group] = inside.get(group, 0) + 1
    return result


def source_after(plan: Plan) -> Source:
    """The source with the decoder layers that stay, by their new numbers: enough to find the experts of the result.

    Layers keep the shapes that they had.
    """
    kept = kept_layers(plan)
    numbers = {layer: number for number, layer in enumerate(kept)}
    layers = tuple(
        shape.model_copy(update={"layer": numbers[shape.layer]})
        for shape in plan.source.layers
        if shape.layer in numbers
    )
    return plan.source.model_copy(update={"num_layers": len(kept), "layers": layers})


def router_stays(plan: Plan) -> bool:
    """Routers choose as they did: whatever merges is stored in form ``shared``."""
    steps = [step for step in plan.steps if isinstance(step, (DropStep, MergeStep)) and step.layers]
    return all(step.form == "shared" for step in steps)


def neurons_after(plan: Plan) -> dict[tuple[int, int, int, Role], NDArray[np.bool_]]:
    """(layer, step, expert, role) -> (width,) mask of its neurons that stay; units that keep all are left out."""
    shapes = plan.source.by_key
    masks: dict[tuple[int, int, int, Role], NDArray[np.bool_]] = {}
    for step in plan.steps:
        if not isinstance(step, SlimStep):
            continue
        for layer in step.layers:
            shape = shapes[layer.layer, layer.step]
            for expert in layer.experts:
                unit = (layer.layer, layer.step, expert.expert, expert.role)
                mask = expert.mask(shape.width if expert.role == "routed" else shape.shared_width)
                masks[unit] = mask & masks[unit] if unit in masks else mask
    return masks


def bits_after(plan: Plan) -> dict[tuple[int, int, int, Role], tuple[ExpertBits, QuantizeStep]]:
    """(layer, step, expert, role) -> widths of its projections and the step that says how; others are left out."""
    return {
        (layer.layer, layer.step, expert.expert, expert.role): (expert, step)
        for step in plan.steps
        if isinstance(step, QuantizeStep)
        for layer in step.layers
        for expert in layer.experts
    }


def widths_after(plan: Plan) -> dict[LayerKey, int]:
    """(layer, step) -> neurons per routed expert as they are stored afterwards: the widest of its layer.

    Form ``masked`` changes no width, and form ``uniform`` makes all equal.
    """
    result = {shape.key: shape.width for shape in plan.source.layers}
    for step in plan.steps:
        if not isinstance(step, SlimStep) or step.form == "masked":
            continue
        if step.form == "uniform":
            result = dict.fromkeys(result, step.width or 0)
            continue
        masks, after = neurons_after(plan), experts_after(plan)
        for key, experts in after.items():
            full = result[key]
            widths = [
                int(masks[(*key, expert.lead, "routed")].sum()) if (*key, expert.lead, "routed") in masks else full
                for expert in experts
            ]
            result[key] = max(max(widths, default=full), 1)
    return result


def _merged(layer: MergeLayer) -> list[NewExpert]:
    groups = sorted(layer.groups, key=lambda group: group.lead)
    return [NewExpert(group.lead, group.members, group.weights) for group in groups]
