"""Parameters of the experts before and after: exact, as they are stored."""

from __future__ import annotations

from dataclasses import dataclass

from compressor.plan import LayerKey, LayerShape, MergeStep, Plan, SlimStep, Source, experts_after, widths_after
from compressor.plan.result import neurons_after
from compressor.plan.steps import DropStep


@dataclass(frozen=True)
class LayerSize:
    """What one MoE layer stores.

    Attributes:
        experts: routed experts, those that only fill up included.
        width: neurons of each.
        shared_width: neurons of the shared experts.
        top_k: routed experts that a token uses.
    """

    experts: int
    width: int
    shared_width: int
    top_k: int


Sizes = dict[LayerKey, LayerSize]


def sizes_before(source: Source) -> Sizes:
    """(layer, step) -> what the source stores."""
    return {shape.key: _size(shape) for shape in source.layers}


def sizes_after(plan: Plan) -> Sizes:
    """(layer, step) -> what the plan stores; layers that go as a whole are left out.

    Form ``padded`` stores as many experts in every layer as the largest keeps, form ``masked`` all neurons.
    """
    shapes, widths, masks = plan.source.by_key, widths_after(plan), neurons_after(plan)
    after = {key: len(experts) for key, experts in experts_after(plan).items()}
    if any(isinstance(step, (DropStep, MergeStep)) and step.form == "padded" for step in plan.steps):
        after = dict.fromkeys(after, max(after.values()))
    stored = any(isinstance(step, SlimStep) and step.form != "masked" for step in plan.steps)
    sizes = {}
    for key, count in after.items():
        shape, mask = shapes[key], masks.get((*key, 0, "shared"))
        shared = int(mask.sum()) if stored and mask is not None else shape.shared_width
        sizes[key] = LayerSize(count, widths[key], shared, shape.top_k)
    return sizes


def expert_parameters(source: Source, sizes: Sizes) -> int:
    """Weights of all projections of routed and shared experts; biases are left out."""
    return sum(
        size.experts * size.width * _per_neuron(source, source.expert_size)
        + size.shared_width * _per_neuron(source, source.hidden_size)
        for size in sizes.values()
    )


def active_parameters(source: Source, sizes: Sizes) -> int:
    """The same for the experts that one token uses."""
    return sum(
        size.top_k * size.width * _per_neuron(source, source.expert_size)
        + size.shared_width * _per_neuron(source, source.hidden_size)
        for size in sizes.values()
    )


def _per_neuron(source: Source, size: int) -> int:
    return (3 if source.gated else 2) * size


def _size(shape: LayerShape) -> LayerSize:
    return LayerSize(shape.num_experts, shape.width, shape.shared_width, shape.top_k)
