"""One model on one machine: sizes, memory, requests to learn from and requests to judge by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

import store
from compressor.plan import Plan, Source
from moescope.errors import PlanError
from moescope.sizes import size
from planner.estimate.dense import DensePart, dense_part
from planner.estimate.memory import ExpertSizes, MemoryBudget, expert_sizes, memory_budget
from planner.estimate.speed import step_costs
from planner.machine import Machine
from planner.simulate.controls import controls
from planner.simulate.prefetch.cross_layer_gate import Recorded, recall_of
from planner.simulate.timeline import StepCosts
from planner.simulate.workload import Workload, batched, workload_of
from planner.source import source_of, value_bytes

STEPS = 600_000
"""Layer-steps that are replayed unless told otherwise: some seconds, and intervals of about a percent."""

CONTEXT = 4096
"""Tokens whose keys and values are kept per sequence, unless told otherwise."""


@dataclass(frozen=True)
class Setting:
    """What all ways of serving a model on a machine share.

    Attributes:
        machine: on which.
        source: the model.
        sizes: of its experts, in the widths of a plan.
        rest: of the model beside them; None where the configuration does not say.
        budget: what the device's memory goes to.
        train: requests that policies are fitted on.
        test: requests that they are judged by; none of ``train``.
        test_costs: of the steps of ``test``.
        context: tokens whose keys and values are kept, per sequence.
        batch: sequences that are decoded together.
        dense_bits: bits of the weights beside routed experts.
        other: bytes of all of these, if they were given.
        recorded: how well routers that were run one layer early foresaw experts; None where the run has none.
    """

    machine: Machine
    source: Source
    sizes: ExpertSizes
    rest: DensePart | None
    budget: MemoryBudget
    train: Workload
    test: Workload
    test_costs: StepCosts
    context: int
    batch: int
    dense_bits: float
    other: int | None
    recorded: Recorded | None = None

    @property
    def slot_bytes(self) -> float:
        """Bytes of one slot: the largest expert."""
        return float(self.sizes.largest.max())

    @property
    def all_slots(self) -> int:
        """Experts of all layers."""
        return int((self.sizes.bytes > 0).sum())

    @property
    def least_slots(self) -> int:
        """What one step of every layer needs at once, where each layer has a cache of its own."""
        return int(np.maximum(self.train.needed.max(axis=1), self.test.needed.max(axis=1)).sum())

    @property
    def slots(self) -> int:
        """Experts that the device holds."""
        return self.budget.slots(self.sizes)

    def with_sizes(self, sizes: ExpertSizes) -> Setting:
        """The same with experts of other widths."""
        costs = _costs(self.test, self.machine, sizes, self.rest, self.context, self.dense_bits, self.other)
        return replace(self, sizes=sizes, test_costs=costs)

    def on(self, train: Workload, test: Workload) -> Setting:
        """The same with other requests."""
        costs = _costs(test, self.machine, self.sizes, self.rest, self.context, self.dense_bits, self.other)
        return replace(self, train=train, test=test, test_costs=costs)

    def controls(self, *, seed: int) -> dict[str, Setting]:
        """The same on each control: tokens shuffled in their requests and over all, and random experts."""
        mine, theirs = controls(self.train, seed=seed), controls(self.test, seed=seed + 1)
        return {name: self.on(mine[name], theirs[name]) for name in mine}


def setting_of(
    run: store.Run,
    machine: Machine,
    *,
    plan: Plan | None = None,
    context: int = CONTEXT,
    batch: int = 1,
    other_weights: int | None = None,
    domains: Sequence[str] | None = None,
    phase: str = "any",
    steps: int = STEPS,
    narrow: bool = False,
) -> Setting:
    """The setting of a run's model on a machine; half of the requests of each domain are for judging.

    Args:
        run: with a trace.
        machine: on which it is to run.
        plan: what is done to the checkpoint first: its widths are what experts take; None = nothing.
        context: tokens whose keys and values are kept, per sequence.
        batch: sequences that are decoded together.
        other_weights: bytes of all weights beside routed experts; None = estimated from the configuration.
        domains: whose requests count; None = all.
        phase: ``any``, ``prompt`` or ``decode``: which tokens are replayed, one after another, as in decoding.
        steps: layer-steps that are replayed at most.
        narrow: experts may become narrower, so that a device too small for what one token needs is not refused yet.

    Raises:
        PlanError: no trace, fewer than two requests, a plan that changes what tokens choose, a type that is not known,
            or a device too small for everything beside the experts.
    """
    source = source_of(run)
    if plan is not None:
        _require_same_routes(plan, source)
    weight = value_bytes(run)
    if weight is None:
        raise PlanError(f"run {run.name!r} does not know the type of its model's weights: import it with --config")
    sizes = expert_sizes(plan or source, source_bits=8.0 * weight)
    rest = _rest(run, source, other_weights)
    budget = _budget(machine, rest, source, context, batch, 8.0 * weight, other_weights)
    if not narrow and budget.left < float(sizes.largest.max()) * max(shape.top_k for shape in source.layers):
        raise PlanError(
            f"the device has {size(budget.left)} for experts, and one token needs"
            f" {max(shape.top_k for shape in source.layers)} of {size(float(sizes.largest.max()))} at once: give"
            f" {size(budget.total - budget.left + len(source.layers) * _token_bytes(source, sizes))} or more, a shorter"
            " context, or fewer bits"
        )
    work = workload_of(run, domains=domains, phase=phase, max_tokens=max(2 * steps // max(len(run.layers), 1), 2))
    train, test = (batched(half, size=batch) for half in work.halves())
    costs = _costs(test, machine, sizes, rest, context, 8.0 * weight, other_weights)
    return Setting(
        machine=machine, source=source, sizes=sizes, rest=rest, budget=budget, train=train, test=test, test_costs=costs,
        context=context, batch=batch, dense_bits=8.0 * weight, other=other_weights,
        recorded=None if run.table("lookahead").is_empty() else recall_of(run),
    )  # fmt: skip


def _token_bytes(source: Source, sizes: ExpertSizes) -> float:
    """Of what one token uses in a layer, mean over layers."""
    top_k = np.array([shape.top_k for shape in source.layers])
    return float((sizes.largest * top_k).mean())


def _require_same_routes(plan: Plan, source: Source) -> None:
    if plan.source.layers != source.layers:
        raise PlanError("the plan is for a model of other layers or experts than the run's")
    cuts = sorted({step.step for step in plan.steps} & {"drop", "merge"})
    if cuts:
        raise PlanError(
            f"the plan has a {cuts[0]} step, after which tokens choose other experts: apply it, record the result, and"
            " ask with that run"
        )


def _rest(run: store.Run, source: Source, other: int | None) -> DensePart | None:
    try:
        return dense_part(run.info.model_config, source)
    except PlanError:
        if other is None:
            raise
        return None


def _budget(
    machine: Machine, rest: DensePart | None, source: Source, context: int, batch: int, bits: float, other: int | None
) -> MemoryBudget:
    if rest is not None:
        return memory_budget(
            machine.vram, rest, source, context=context, batch=batch, dense_bits=bits, other=other
        )  # fmt: skip
    found = MemoryBudget(
        total=machine.vram, other=float(other or 0), kv=0.0, activations=0.0, estimated=False,
        assumed=("keys, values and activations are not known: they count as part of the other weights",),
    )  # fmt: skip
    if found.left <= 0:
        raise PlanError(f"{size(machine.vram)} hold no expert: the other weights take {size(found.other)}")
    return found


def _costs(
    work: Workload, machine: Machine, sizes: ExpertSizes, rest: DensePart | None, context: int, bits: float,
    other: int | None,
) -> StepCosts:  # fmt: skip
    return step_costs(work, machine, sizes=sizes, rest=rest, context=context, dense_bits=bits, other=other)
