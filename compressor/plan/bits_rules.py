"""What the bits of a plan may not ask for."""

from __future__ import annotations

from collections.abc import Iterator

from compressor.plan.bits import PARTS, ExpertBits, QuantizeStep
from compressor.plan.document import Plan
from compressor.plan.factors import FactorStep
from compressor.plan.result import bits_after, experts_after, neurons_after, widths_after
from compressor.plan.source import LayerKey
from compressor.plan.steps import SlimStep
from moescope.errors import PlanError

_PACKED = (2, 3, 4, 8)
_ORDER = {"drop": 0, "merge": 0, "slim": 0, "factor": 1, "quantize": 2, "route": 3, "cache": 4, "place": 5}


def check_bits(plan: Plan) -> None:
    """Refuse widths that no checkpoint could hold, and those that protected experts may not have.

    Raises:
        PlanError: with the layer, the number, and what would do.
    """
    words = [step.step for step in plan.steps]
    if [_ORDER[word] for word in words] != sorted(_ORDER[word] for word in words):
        raise PlanError(
            f"the plan's steps are {', '.join(words)}: cut first, then factor, then quantize, then route, then cache"
            " and place"
        )
    for kind in (FactorStep, QuantizeStep):
        if sum(isinstance(step, kind) for step in plan.steps) > 1:
            raise PlanError(f"the plan has two {kind.model_fields['step'].default} steps: put them into one")
    for step in plan.steps:
        if isinstance(step, QuantizeStep):
            _check(plan, step)


def _check(plan: Plan, step: QuantizeStep) -> None:
    _numbers_are_there(plan, step)
    _form_holds_them(step)
    _groups_divide(plan, step)
    _as_granular_as_said(plan, step)
    _protected_have_the_widest(plan)


def _numbers_are_there(plan: Plan, step: QuantizeStep) -> None:
    after, shapes = experts_after(plan), plan.source.by_key
    for (layer, number), experts in _by_layer(step):
        units = [(one.expert, one.role) for one in experts]
        if len(set(units)) < len(units):
            raise PlanError(f"the plan gives an expert of layer {layer} widths twice")
        left = {one.lead for one in after.get((layer, number), ())}
        for one in experts:
            if one.role == "shared" and (one.expert or not shapes[layer, number].shared_width):
                there = "keeps them in one, number 0" if shapes[layer, number].shared_width else "has none"
                raise PlanError(f"the plan quantizes shared expert {one.expert} of layer {layer}, which {there}")
            if one.role == "routed" and one.expert not in left:
                raise PlanError(f"the plan quantizes expert {one.expert} of layer {layer}, which does not stay")
            if one.gate is not None and not plan.source.gated:
                raise PlanError(f"the plan quantizes the gate projection of layer {layer}, whose experts have none")


def _form_holds_them(step: QuantizeStep) -> None:
    widths = {one.of(part) for _, experts in _by_layer(step) for one in experts for part in PARTS} - {None}
    if step.form == "packed":
        wrong = sorted(map(str, widths - set(_PACKED)))
        if wrong:
            raise PlanError(f"form packed holds widths 2, 3, 4 and 8, not {', '.join(wrong)}: use form dense")
        if step.nested is not None:
            raise PlanError("form packed holds no nested widths: use form dense")
        if step.activation_bits is not None:
            raise PlanError("form packed holds weights alone, no width of activations: use form dense")


def _groups_divide(plan: Plan, step: QuantizeStep) -> None:
    group, widths, shared = step.group_size, widths_after(plan), _shared_widths(plan)
    for (layer, number), experts in _by_layer(step) if group else ():
        for one in experts:
            routed = one.role == "routed"
            inputs = plan.source.expert_size if routed else plan.source.hidden_size
            inside = (widths if routed else shared)[layer, number]
            for part, channels in (("gate", inputs), ("up", inputs), ("down", inside)):
                if one.of(part) is not None and channels % group:
                    raise PlanError(
                        f"groups of {group} do not divide the {channels} inputs of the {part} projections of layer"
                        f" {layer}: use a divisor, or 0 for whole rows"
                    )


def _shared_widths(plan: Plan) -> dict[LayerKey, int]:
    """(layer, step) -> neurons of its shared experts as they are stored afterwards; form ``masked`` changes none."""
    widths = {shape.key: shape.shared_width for shape in plan.source.layers}
    if any(isinstance(step, SlimStep) and step.form != "masked" for step in plan.steps):
        for (layer, number, _, role), mask in neurons_after(plan).items():
            if role == "shared":
                widths[layer, number] = max(int(mask.sum()), 1)
    return widths


def _as_granular_as_said(plan: Plan, step: QuantizeStep) -> None:
    if step.granularity in ("matrix", "expert"):
        return
    after = experts_after(plan)
    for key, experts in _by_layer(step):
        routed = [one for one in experts if one.role == "routed"]
        if routed and len(routed) != len(after[key]):
            raise PlanError(
                f"layer {key[0]} quantizes {len(routed)} of {len(after[key])} experts at granularity"
                f" {step.granularity}: name all of them, or use granularity expert"
            )
        parts = [part for part in PARTS if part != "gate" or plan.source.gated]
        sets = [{one.of(part) for one in routed} for part in parts]
        if step.granularity == "layer":
            sets = [set().union(*sets)]
        if any(len(widths) > 1 for widths in sets):
            raise PlanError(
                f"layer {key[0]} has several widths at granularity {step.granularity}: plan at granularity expert"
            )


def _protected_have_the_widest(plan: Plan) -> None:
    found = bits_after(plan)
    widest: dict[tuple[int, int, str, str], float] = {}
    after = experts_after(plan)
    for (layer, number, _, role), (bits, _) in found.items():
        for part in PARTS:
            place = (layer, number, role, part)
            widest[place] = max(widest.get(place, 0.0), _width(bits, part))
    for (layer, number), experts in after.items():  # an expert that is not named stays as it is
        if any((layer, number, one.lead, "routed") not in found for one in experts):
            for part in PARTS:
                widest[layer, number, "routed", part] = 16.0
    for evidence in plan.evidence:
        for unit in evidence.protected:
            entry = found.get((unit.layer, unit.step, unit.expert, unit.role))
            for part in PARTS if entry is not None else ():
                own = _width(entry[0], part)  # type: ignore[index]
                if own < widest[unit.layer, unit.step, unit.role, part]:
                    raise PlanError(
                        f"the plan gives {unit.role} expert {unit.expert} of layer {unit.layer} fewer bits than others"
                        f" of the layer have, and protects it: {unit.reason}"
                    )


def _width(bits: ExpertBits, part: str) -> float:
    value = bits.of(part)
    return 16.0 if value is None else 1.6 if value == "ternary" else float(value)


def _by_layer(step: QuantizeStep) -> Iterator[tuple[tuple[int, int], tuple[ExpertBits, ...]]]:
    for layer in step.layers:
        yield (layer.layer, layer.step), layer.experts
