"""What two plans do differently, unit by unit."""

from __future__ import annotations

from dataclasses import dataclass

from compressor.plan.bits import PARTS, ExpertBits
from compressor.plan.document import Plan
from compressor.plan.factors import FactorStep
from compressor.plan.result import NewExpert, bits_after, experts_after, kept_layers, neurons_after
from compressor.plan.source import LayerKey
from moescope.errors import PlanError


@dataclass(frozen=True)
class Difference:
    """One unit that two plans treat differently.

    Attributes:
        layer: decoder layer.
        step: call of the layer's experts.
        expert: number in the source; -1 for the layer as a whole.
        role: routed | shared | layer.
        first: what the first plan does to it.
        second: what the second one does.
    """

    layer: int
    step: int
    expert: int
    role: str
    first: str
    second: str


def differences(first: Plan, second: Plan) -> list[Difference]:
    """The units that two plans treat differently, in the order of the model.

    Raises:
        PlanError: they are for models of different shape.
    """
    if first.source.layers != second.source.layers or first.source.num_layers != second.source.num_layers:
        raise PlanError(f"the plans are for models of different shape: {first.source.model} and {second.source.model}")
    one, two = _fates(first), _fates(second)
    return [
        Difference(*unit, one.get(unit, "kept"), two.get(unit, "kept"))
        for unit in sorted({*one, *two})
        if one.get(unit, "kept") != two.get(unit, "kept")
    ]


def _fates(plan: Plan) -> dict[tuple[int, int, int, str], str]:
    fates: dict[tuple[int, int, int, str], str] = {}
    stays = set(kept_layers(plan))
    for layer in range(plan.source.num_layers):
        if layer not in stays:
            fates[layer, 0, -1, "layer"] = "dropped"
    after = experts_after(plan)
    for shape in plan.source.layers:
        if shape.layer in stays:
            for expert, fate in _of_layer(shape.key, after[shape.key], shape.num_experts).items():
                fates[(*shape.key, expert, "routed")] = fate
    for (layer, step, expert, role), mask in neurons_after(plan).items():
        unit = (layer, step, expert, role)
        if layer in stays and fates.get(unit, "kept") != "dropped" and not mask.all():
            fates[unit] = f"{int(mask.sum())} of {len(mask)} neurons"
    for place, factored in _factored(plan).items():
        fate = fates.get(place, "kept")
        fates[place] = ", ".join([*([fate] if fate != "kept" else []), factored])
    for unit, (bits, _) in bits_after(plan).items():
        fate = fates.get(unit, "kept")
        if unit[0] in stays and fate != "dropped" and not fate.startswith("merged into"):
            fates[unit] = ", ".join([*([fate] if fate != "kept" else []), _in_bits(bits)])
    for place, words in _routed(plan).items():
        fate = fates.get(place, "kept")
        if fate != "dropped":
            fates[place] = ", ".join([*([fate] if fate != "kept" else []), words])
    return fates


def _routed(plan: Plan) -> dict[tuple[int, int, int, str], str]:
    """Layers whose choice follows a rule, and experts whose logits are shifted."""
    step = plan.route
    found: dict[tuple[int, int, int, str], str] = {}
    if step is None:
        return found
    for one in step.layers:
        if one.value is not None:
            found[one.layer, one.step, -1, "layer"] = f"routed by {step.rule} {one.value:g}, weights {step.weights}"
        for expert, shift in enumerate(one.bias):
            if shift:
                found[one.layer, one.step, expert, "routed"] = f"logit {shift:+.6g}"
    return found


def _factored(plan: Plan) -> dict[tuple[int, int, int, str], str]:
    return {
        (layer.layer, layer.step, member, "routed"): f"rank {step.rank}" if step.rank else f"residual of {group.lead}"
        for step in plan.steps
        if isinstance(step, FactorStep)
        for layer in step.layers
        for group in layer.groups
        if step.rank or len(group.members) > 1
        for member in group.members
    }


def _in_bits(bits: ExpertBits) -> str:
    widths = {part: bits.of(part) for part in PARTS if bits.of(part) is not None}
    if len(widths) > 1 and len(set(widths.values())) == 1:
        widths = {"": next(iter(widths.values()))}
    return ", ".join(f"{part} {width} bit".strip() for part, width in widths.items())


def _of_layer(key: LayerKey, experts: list[NewExpert], count: int) -> dict[int, str]:
    fates = dict.fromkeys(range(count), "dropped")
    for expert in experts:
        for member in expert.members:
            fates[member] = f"merged into {expert.lead}" if expert.merged else "kept"
    return fates
