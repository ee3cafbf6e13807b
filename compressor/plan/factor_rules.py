"""What the factors of a plan may not ask for."""

from __future__ import annotations

from compressor.plan.document import Plan
from compressor.plan.factors import FactorGroup, FactorLayer, FactorStep
from compressor.plan.result import experts_after, neurons_after, widths_after
from moescope.errors import PlanError


def check_factors(plan: Plan) -> None:
    """Refuse groups of experts that do not stay, ranks that save nothing, and factors of protected experts.

    Raises:
        PlanError: with the layer, the number, and what would do.
    """
    for step in plan.steps:
        if not isinstance(step, FactorStep):
            continue
        keys = [(layer.layer, layer.step) for layer in step.layers]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise PlanError(f"the plan's factor step names layer {twice[0]} twice: put its groups together")
        for layer in step.layers:
            _experts_stay(plan, layer)
            for group in layer.groups:
                _is_a_group(group, step, layer.layer)
            _rank_is_low(plan, step, layer)
        _no_neuron_comes_back(plan, step)
        _protected_stay(plan, step)


def _experts_stay(plan: Plan, layer: FactorLayer) -> None:
    left = {one.lead for one in experts_after(plan).get((layer.layer, layer.step), ())}
    members = [member for group in layer.groups for member in group.members]
    for member in members:
        if member not in left:
            raise PlanError(f"the plan factors expert {member} of layer {layer.layer}, which does not stay")
        if members.count(member) > 1:
            raise PlanError(f"expert {member} of layer {layer.layer} stands in two groups of the factor step")


def _is_a_group(group: FactorGroup, step: FactorStep, layer: int) -> None:
    where = f"group {group.lead} of layer {layer}"
    if group.lead not in group.members or len(group.members) != len(group.weights):
        raise PlanError(f"{where}, whose experts are factored, lacks its lead or a weight")
    if abs(sum(group.weights) - 1) > 1e-6 or min(group.weights) < 0:
        raise PlanError(f"the weights of {where} sum to {sum(group.weights):.6g}, not to 1")
    if step.method == "low_rank_sparse" and len(group.members) > 1:
        raise PlanError(f"{where} has {len(group.members)} members: method low_rank_sparse takes experts one by one")


def _rank_is_low(plan: Plan, step: FactorStep, layer: FactorLayer) -> None:
    full = min(plan.source.expert_size, widths_after(plan)[layer.layer, layer.step])
    if step.rank is not None and step.rank >= full:
        raise PlanError(
            f"rank {step.rank} is no less than that of the experts of layer {layer.layer}, {full}: use at most"
            f" {full - 1}"
        )


def _no_neuron_comes_back(plan: Plan, step: FactorStep) -> None:
    cut = {unit[:3] for unit, mask in neurons_after(plan).items() if unit[3] == "routed" and not mask.all()}
    for layer in step.layers if step.method == "ternary_residual" else ():
        for group in layer.groups:
            if len(group.members) > 1 and any((layer.layer, layer.step, member) in cut for member in group.members):
                raise PlanError(
                    f"experts of layer {layer.layer} lose neurons, which the centre of group {group.lead} would bring"
                    " back: slim, or share a centre"
                )


def _protected_stay(plan: Plan, step: FactorStep) -> None:
    changed = {
        (layer.layer, layer.step, member)
        for layer in step.layers
        for group in layer.groups
        if step.method == "low_rank_sparse" or len(group.members) > 1
        for member in group.members
    }
    for evidence in plan.evidence:
        for unit in evidence.protected:
            if unit.role == "routed" and (unit.layer, unit.step, unit.expert) in changed:
                raise PlanError(
                    f"the plan factors routed expert {unit.expert} of layer {unit.layer}, which it protects:"
                    f" {unit.reason}"
                )
