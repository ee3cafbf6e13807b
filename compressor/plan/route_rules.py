"""What a route step may not ask for, and what becomes of it when the cuts of its plan are made."""

from __future__ import annotations

from compressor.plan.document import Plan
from compressor.plan.result import NewExpert, experts_after, kept_layers, places_after
from compressor.plan.routing import RouteLayer, RouteStep
from compressor.plan.source import LayerKey, LayerShape
from compressor.plan.steps import MergeStep
from moescope.errors import PlanError


def check_route(plan: Plan) -> None:
    """Refuse a change of routing that no model could follow, after the cuts that come first.

    Raises:
        PlanError: with the layer, the number, and what would do.
    """
    steps = [step for step in plan.steps if isinstance(step, RouteStep)]
    if len(steps) > 1:
        raise PlanError("the plan has two route steps: put them into one")
    for step in steps:
        keys = [(layer.layer, layer.step) for layer in step.layers]
        if len(set(keys)) < len(keys):
            raise PlanError("the plan's route step names a layer twice")
        after, stays = experts_after(plan), set(kept_layers(plan))
        for one, key in zip(step.layers, keys, strict=True):
            if one.layer not in stays:
                raise PlanError(f"the plan drops decoder layer {one.layer}, which its route step names")
            _check_layer(plan, step, one, after[key])


def route_after(plan: Plan) -> RouteStep | None:
    """The route step by the numbers of the result: layers renumbered, biases those of the experts that are left.

    A merged expert has the bias of the one whose row of the router it has, or the mean where rows become a mean;
    experts that only fill up have 0.
    """
    step = plan.route
    if step is None:
        return None
    numbers = {layer: number for number, layer in enumerate(kept_layers(plan))}
    after = experts_after(plan)
    places = places_after(plan, after)
    count = max(map(len, after.values()), default=0) if _padded(plan) else 0
    layers = []
    for one in step.layers:
        key = (one.layer, one.step)
        bias = one.bias
        if bias and not _rows_stay(plan, key):
            own = [0.0] * max(count, len(after[key]))
            for expert in after[key]:
                own[places[key][expert.lead]] = _of(one.bias, expert, _router(plan, key))
            bias = tuple(own)
        layers.append(one.model_copy(update={"layer": numbers[one.layer], "bias": bias}))
    return step.model_copy(update={"layers": tuple(layers)})


def _check_layer(plan: Plan, step: RouteStep, one: RouteLayer, experts: list[NewExpert]) -> None:
    shape = plan.source.by_key[one.layer, one.step]
    if step.rule == "bias":
        if len(one.bias) != shape.num_experts:
            raise PlanError(
                f"the bias of layer {one.layer} has {len(one.bias)} numbers, and the layer {shape.num_experts} experts:"
                " give one for each expert of the source"
            )
        if _row_unknown(plan, shape.key):
            raise PlanError(
                f"experts of layer {one.layer} merge by method nearest, which takes the row of a member that only their"
                " weights decide: nobody can say whose bias it has"
            )
    if step.rule == "top_k":
        reachable = _reachable(plan, shape, len(experts))
        assert one.value is not None
        if one.value > reachable:
            raise PlanError(
                f"layer {one.layer} can reach {reachable} experts per token, and its route step asks for {one.value:g}"
            )


def _reachable(plan: Plan, shape: LayerShape, left: int) -> int:
    """Experts that a token can choose from."""
    left = shape.num_experts if _rows_stay(plan, shape.key) else left
    return left // shape.groups * shape.chosen_groups


def _merge(plan: Plan, key: LayerKey) -> MergeStep | None:
    for step in plan.steps:
        if isinstance(step, MergeStep) and any((layer.layer, layer.step) == key for layer in step.layers):
            return step
    return None


def _rows_stay(plan: Plan, key: LayerKey) -> bool:
    step = _merge(plan, key)
    return step is not None and step.form == "shared"


def _row_unknown(plan: Plan, key: LayerKey) -> bool:
    step = _merge(plan, key)
    return step is not None and step.method == "nearest" and step.form != "shared"


def _router(plan: Plan, key: LayerKey) -> str:
    step = _merge(plan, key)
    return "lead" if step is None else step.router


def _of(bias: tuple[float, ...], expert: NewExpert, router: str) -> float:
    if router == "lead":
        return bias[expert.lead]
    return sum(bias[member] * weight for member, weight in zip(expert.members, expert.weights, strict=True))


def _padded(plan: Plan) -> bool:
    return any(getattr(step, "form", "") == "padded" for step in plan.for_checkpoint)
