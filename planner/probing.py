"""Plans that are measured to learn what changes cost this model: one layer and one kind of change at a time, and a few
whole plans. Nobody applies them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from compressor.plan import (
    DropLayer,
    DropStep,
    Estimate,
    ExpertBits,
    LayerShape,
    Plan,
    Provenance,
    QuantizeLayer,
    QuantizeStep,
    SlimExpert,
    SlimLayer,
    SlimStep,
    Target,
    group_size_for,
)
from moescope import __version__
from planner.allocation import most_removed
from planner.estimate.stream import gone_cost, neuron_squares, streams
from planner.recommendation import Candidate, mix_of
from planner.task import Task

LAYERS = 16
"""Layers of which each kind of change is measured alone, at most; others count as typical."""

WHOLE = 12
"""Whole plans that are measured, from the cheapest to ten times its price."""

PART = 0.25
"""Of a layer's experts or neurons that go in a probe."""


def probes(task: Task, found: Sequence[Candidate]) -> list[Plan]:
    """The plans, those of single layers first.

    Args:
        task: what is planned; its run saw the stream.
        found: candidates; kinds of change that none of them makes are left out.
    """
    shapes = task.source.layers
    places = sorted({round(place) for place in np.linspace(0, len(shapes) - 1, min(LAYERS, len(shapes)))})
    steps = {step.step for one in found for step in one.plan.steps}
    plans = []
    for shape in (shapes[place] for place in places):
        if "quantize" in steps:
            plans.append(_narrow(task, shape))
        if steps & {"drop", "merge"} and most_removed(shape, task.guard.experts(shape.key)):
            plans.append(_fewer(task, shape))
        if "slim" in steps:
            plans.append(_slimmer(task, shape))
    return plans + _whole(found)


def _whole(found: Sequence[Candidate]) -> list[Plan]:
    """Candidates at even distances of the logarithm of their price, each mix among them."""
    priced = sorted((one for one in found if one.prediction is not None), key=lambda one: one.prediction.kl)  # type: ignore[union-attr]
    within = [one for one in priced if one.prediction.kl <= 10 * priced[0].prediction.kl]  # type: ignore[union-attr]
    if not within:
        return []
    chosen: dict[str, Plan] = {}
    for one in within:  # the cheapest of each mix
        if one.mix not in {mix_of(plan) for plan in chosen.values()}:
            chosen[one.plan.digest] = one.plan
    for target in np.linspace(0, len(within) - 1, max(min(WHOLE, len(within)) - len(chosen), 4)):
        one = within[round(target)]
        chosen[one.plan.digest] = one.plan
    return list(chosen.values())


def _narrow(task: Task, shape: LayerShape) -> Plan:
    group = group_size_for(task.source.expert_size, shape.width)
    gate = 2 if task.source.gated else None
    experts = tuple(ExpertBits(expert=expert, gate=gate, up=2, down=2) for expert in range(shape.num_experts))  # type: ignore[arg-type]
    layer = QuantizeLayer(layer=shape.layer, step=shape.step, experts=experts)
    return _plan(task, QuantizeStep(method="probe", form="dense", group_size=group, layers=(layer,)))


def _fewer(task: Task, shape: LayerShape) -> Plan:
    count = min(max(round(PART * shape.num_experts), 1), most_removed(shape, task.guard.experts(shape.key)))
    cost = gone_cost(streams(task)[shape.key], list(range(shape.num_experts)))
    cost[list(task.guard.experts(shape.key))] = np.inf
    # A wide probe: not only what is cheapest, but every other one of the cheaper half.
    order = np.argsort(cost, kind="stable")[: 2 * count : 2]
    if shape.groups > 1:
        size = shape.num_experts // shape.groups
        order = np.array([group * size + int(np.argmin(cost[group * size :][:size])) for group in range(shape.groups)])
    experts = tuple(sorted(int(expert) for expert in order if np.isfinite(cost[expert])))
    form = "per_layer"
    return _plan(task, DropStep(method="probe", form=form, layers=(DropLayer(layer=shape.layer, experts=experts),)))  # type: ignore[arg-type]


def _slimmer(task: Task, shape: LayerShape) -> Plan:
    squares = neuron_squares(task)[shape.key]
    gone = np.argsort(squares, axis=1, kind="stable")[:, : max(round(PART * shape.width), 1)]
    masks = np.ones(squares.shape, dtype=bool)
    np.put_along_axis(masks, gone, False, axis=1)
    spared = task.guard.experts(shape.key)
    experts = tuple(SlimExpert.of(expert=e, mask=mask) for e, mask in enumerate(masks) if e not in spared)
    layer = SlimLayer(layer=shape.layer, step=shape.step, experts=experts)
    return _plan(task, SlimStep(method="probe", form="masked", layers=(layer,)))


def _plan(task: Task, step: DropStep | QuantizeStep | SlimStep) -> Plan:
    nothing = Estimate(
        expert_parameters=0, expert_parameters_after=0, active_parameters=0, active_parameters_after=0, bytes_saved=0
    )
    return Plan(
        provenance=Provenance(run=task.run.name, domains=task.domains, tool_version=__version__),
        source=task.source, target=Target(preset="probe"), steps=(step,), estimate=nothing,
    ).checked()  # fmt: skip
