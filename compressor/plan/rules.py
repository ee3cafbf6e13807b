"""What a plan may not ask for: refused when it is made and when it is read, not after hours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from compressor.plan.bits_rules import check_bits
from compressor.plan.caching import CacheLayer
from compressor.plan.document import Plan
from compressor.plan.factor_rules import check_factors
from compressor.plan.factors import FactorLayer
from compressor.plan.result import experts_after, kept_layers, neurons_after, router_stays
from compressor.plan.route_rules import check_route
from compressor.plan.routing import RouteLayer
from compressor.plan.serving_rules import check_serving
from compressor.plan.smooth_rules import check_smoothing
from compressor.plan.source import LayerShape
from compressor.plan.steps import DropStep, MergeLayer, MergeStep, SlimStep
from moescope.errors import PlanError


def check(plan: Plan) -> None:
    """Refuse what no checkpoint or engine could hold.

    Raises:
        PlanError: with the layer, the number, and what would do.
    """
    _known_units(plan)
    for step in plan.steps:
        if isinstance(step, MergeStep):
            for layer in step.layers:
                _groups_are_a_partition(layer, plan.source.by_key[layer.layer, layer.step], step)
    _layers_remain(plan)
    if not router_stays(plan):
        _enough_experts(plan)
    _counts_fit_the_form(plan)
    _widths_fit_the_form(plan)
    _protected_units_stay(plan)
    check_bits(plan)
    check_factors(plan)
    check_smoothing(plan)
    check_route(plan)
    check_serving(plan)


def _known_units(plan: Plan) -> None:
    shapes = plan.source.by_key
    edited: Counter[tuple[int, int]] = Counter()
    for step in plan.steps:
        for layer in step.layers:
            key = (layer.layer, layer.step)
            if key not in shapes:
                raise PlanError(f"the plan's {step.step} step names layer {_name(*key)}, which is no MoE layer")
            named = list(_numbers(layer))
            wrong = [expert for expert in named if expert >= shapes[key].num_experts]
            if wrong:
                raise PlanError(
                    f"the plan's {step.step} step names expert {wrong[0]} of layer {_name(*key)}, which has experts"
                    f" 0..{shapes[key].num_experts - 1}"
                )
            if isinstance(step, (DropStep, MergeStep)):
                edited[key] += 1
                if edited[key] > 1:
                    raise PlanError(f"two steps of the plan drop or merge experts of layer {_name(*key)}")
        if isinstance(step, DropStep):
            dense = sorted(set(step.blocks) - {number for number, _ in shapes})
            if dense:
                raise PlanError(f"the plan drops the MoE block of layer {dense[0]}, which has none")


def _numbers(layer: object) -> Iterator[int]:
    if isinstance(layer, RouteLayer):
        return
    if isinstance(layer, CacheLayer):
        yield from (*layer.pinned, *layer.disk)
    elif isinstance(layer, (MergeLayer, FactorLayer)):
        for group in layer.groups:
            yield from (*group.members, group.lead)
        yield from (entry.expert for entry in getattr(layer, "given_up", ()))
    else:
        for entry in layer.experts:  # type: ignore[attr-defined]
            if isinstance(entry, int):
                yield entry
            elif entry.role == "routed":
                yield entry.expert


def _groups_are_a_partition(layer: MergeLayer, shape: LayerShape, step: MergeStep) -> None:
    where = f"layer {_name(*shape.key)}"
    members = [expert for group in layer.groups for expert in group.members]
    members += [entry.expert for entry in layer.given_up]
    if sorted(members) != list(range(shape.num_experts)):
        raise PlanError(f"the groups of {where} are no partition of its experts 0..{shape.num_experts - 1}")
    if (step.method == "subspace") != (step.rank is not None):
        raise PlanError(f"method {step.method!r} of {where} goes {'without' if step.rank else 'with'} a rank")
    if step.method == "segments" and step.threshold is None:
        raise PlanError(f"method 'segments' of {where} lacks the least cosine at which a neuron moves: a threshold")
    if layer.given_up and step.method != "segments":
        raise PlanError(f"{where} gives experts up, which method {step.method!r} cannot use: it takes segments")
    if step.form == "shared" and (step.method == "segments" or step.router != "lead"):
        wrong = "method segments, which gives experts up" if step.router == "lead" else "mean rows"
        raise PlanError(
            f"{where} is stored in form shared, in which all rows of the router stay: it goes without {wrong}"
        )
    for group in layer.groups:
        if group.lead not in group.members or len(group.members) != len(group.weights):
            raise PlanError(f"group {group.lead} of {where} lacks its lead or a weight")
        if abs(sum(group.weights) - 1) > 1e-6 or min(group.weights) < 0:
            raise PlanError(f"the weights of group {group.lead} of {where} sum to {sum(group.weights):.6g}, not to 1")


def _layers_remain(plan: Plan) -> None:
    for step in plan.steps:
        if isinstance(step, DropStep) and any(layer >= plan.source.num_layers for layer in step.decoder_layers):
            raise PlanError(
                f"the plan drops decoder layer {step.decoder_layers[-1]}; the model has 0..{plan.source.num_layers - 1}"
            )
    if not kept_layers(plan):
        raise PlanError("the plan drops every decoder layer")


def _enough_experts(plan: Plan) -> None:
    shapes = plan.source.by_key
    for key, experts in experts_after(plan).items():
        shape = shapes[key]
        if len(experts) < shape.top_k:
            raise PlanError(
                f"layer {_name(*key)} would keep {len(experts)} of {shape.num_experts} experts, fewer than the"
                f" {shape.top_k} that each token uses: keep at least {shape.top_k}"
            )
        if shape.groups > 1 and len(experts) != shape.num_experts:
            size = shape.num_experts // shape.groups
            counts = Counter(expert.lead // size for expert in experts)
            if len(set(counts.values())) != 1 or len(counts) != shape.groups:
                found = ", ".join(str(counts.get(group, 0)) for group in range(shape.groups))
                raise PlanError(
                    f"layer {_name(*key)} routes within {shape.groups} groups, which would keep {found} experts: drop"
                    " the same number from each"
                )
            # Routers with a selection bias rank groups by their two best experts.
            if counts[0] < 2 or counts[0] * shape.chosen_groups < shape.top_k:
                raise PlanError(
                    f"layer {_name(*key)} would keep {counts[0]} experts in each of {shape.groups} groups and chooses"
                    f" {shape.chosen_groups} of them: too few for the {shape.top_k} experts of a token"
                )


def _counts_fit_the_form(plan: Plan) -> None:
    steps = [step for step in plan.steps if isinstance(step, (DropStep, MergeStep)) and step.layers]
    if not steps:
        return
    counts = {key: len(experts) for key, experts in experts_after(plan).items()}
    forms = {step.form for step in steps}
    if len(forms) > 1:
        raise PlanError(f"the steps of the plan store experts in different forms: {', '.join(sorted(forms))}")
    form = forms.pop()
    if form == "uniform" and len(set(counts.values())) > 1:
        low, high = min(counts.values()), max(counts.values())
        raise PlanError(
            f"layers would keep {low} to {high} experts, which no stock engine loads: keep the same number everywhere,"
            " or plan with form per_layer (compressor.load) or padded (models with a selection bias)"
        )
    if form == "padded" and plan.source.unpadded:
        raise PlanError(f"{plan.source.unpadded}: use form per_layer")
    _same_steps(plan)


def _same_steps(plan: Plan) -> None:
    if any(shape.step for shape in plan.source.layers):
        raise PlanError(
            f"{plan.source.model} calls the experts of a layer several times; its experts are no list of their own that"
            " could be cut"
        )


def _widths_fit_the_form(plan: Plan) -> None:
    steps = [step for step in plan.steps if isinstance(step, SlimStep)]
    if not steps:
        return
    if len(steps) > 1:
        raise PlanError("the plan has two slim steps: put them into one")
    try:
        masks = neurons_after(plan)
    except ValueError as error:
        raise PlanError(f"the plan's slim step: {error}") from error
    step, shapes = steps[0], plan.source.by_key
    if (step.form == "uniform") != (step.width is not None):
        raise PlanError(f"a slim step of form {step.form!r} goes {'with' if step.width is None else 'without'} a width")
    for (layer, number, expert, role), mask in masks.items():
        if role == "shared" and (expert or not shapes[layer, number].shared_width):
            there = "keeps its shared experts in one, number 0" if shapes[layer, number].shared_width else "has none"
            raise PlanError(f"the plan slims shared expert {expert} of layer {_name(layer, number)}, which {there}")
        if step.form == "uniform" and role == "routed" and mask.sum() != step.width:
            raise PlanError(
                f"expert {expert} of layer {_name(layer, number)} would keep {int(mask.sum())} neurons and the others"
                f" {step.width}, which no stock engine loads: keep the same number everywhere, or use form per_layer or"
                " masked"
            )
    if step.form != "uniform":
        return
    for key, experts in experts_after(plan).items():
        for one in experts:
            if (*key, one.lead, "routed") not in masks and shapes[key].width != step.width:
                raise PlanError(f"expert {one.lead} of layer {_name(*key)} keeps all its neurons, others {step.width}")


def _protected_units_stay(plan: Plan) -> None:
    after = experts_after(plan)
    masks = neurons_after(plan)
    silent = {layer for step in plan.steps if isinstance(step, DropStep) for layer in step.blocks}
    rebuilt = _rebuilt(plan)
    for evidence in plan.evidence:
        for unit in evidence.protected:
            key = (unit.layer, unit.step)
            if unit.role == "routed":
                own = {one.lead for one in after.get(key, []) if not one.merged}
                whole = unit.expert in own and (*key, unit.expert) not in rebuilt
            else:
                whole = key in after
            whole = whole and unit.layer not in silent
            mask = masks.get((*key, unit.expert, unit.role))
            if not whole or (mask is not None and not mask.all() and _cuts(plan)):
                raise PlanError(
                    f"the plan cuts {unit.role} expert {unit.expert} of layer {_name(*key)}, which it protects:"
                    f" {unit.reason}"
                )


def _rebuilt(plan: Plan) -> set[tuple[int, int, int]]:
    """Kept experts that take neurons of those given up, and are no longer what they were."""
    return {
        (layer.layer, layer.step, group.lead)
        for step in plan.steps
        if isinstance(step, MergeStep) and step.method == "segments"
        for layer in step.layers
        if layer.given_up
        for group in layer.groups
        if not group.fixed
    }


def _cuts(plan: Plan) -> bool:
    """Whether a slim step could have spared single experts: a uniform width spares none."""
    return any(isinstance(step, SlimStep) and step.form != "uniform" for step in plan.steps)


def _name(layer: int, step: int) -> str:
    return f"{layer}, step {step}" if step else str(layer)
