"""One model on one machine: sizes, memory, requests to learn from and requests to judge by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

import store
from compressor.plan import Plan, Source
from moescope import memory
from moescope.errors import PlanError
from moescope.sizes import size
from planner.estimate.dense import DensePart, dense_part
from planner.estimate.memory import ExpertSizes, MemoryBudget, expert_sizes, memory_budget
from planner.estimate.speed import step_costs
from planner.machine import Machine
from planner.simulate.controls import CONTROLS, UNIFORM, control
from planner.simulate.prefetch.cross_layer_gate import Recorded, recall_of
from planner.simulate.timeline import StepCosts
from planner.simulate.workload import Workload, batched, prefill, strata, workload_of
from planner.source import packed_bits, source_of, value_bytes
from profiler.metrics.controls import uniform_tokens

STEPS = 600_000
"""Layer-steps that are replayed unless told otherwise: some seconds, and intervals of about a percent."""

CONTEXT = 4096
"""Tokens whose keys and values are kept per sequence, unless told otherwise."""

_UP = 1.006  # sizes in messages have three figures: what is advised must not be rounded below what is needed
_ENDLESS = 1 << 62
_PART = 1 - memory.DATABASE  # of what a memory limit leaves
_SELECTION_BYTES = 200  # of a step and one of its experts, with controls and times; as measured


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
        chunk: tokens of a prompt that one pass reads; 1 = tokens one after another, as in decoding.
        packed: bits of a weight of the experts where the checkpoint is quantized already; None where it is not.
        apart: ``train`` and ``test`` before sequences were put together to be decoded together; None = they are not.
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
    chunk: int = 1
    packed: float | None = None
    apart: tuple[Workload, Workload] | None = None

    @property
    def slot_bytes(self) -> float:
        """Bytes of one slot: the largest expert."""
        return float(self.sizes.largest.max())

    @property
    def has_mixed_sizes(self) -> bool:
        """Experts of one layer differ in size."""
        size = self.sizes.bytes
        return bool(((size > 0) & (size < size.max(axis=1, keepdims=True))).any())

    @property
    def all_slots(self) -> int:
        """Experts of all layers."""
        return int((self.sizes.bytes > 0).sum())

    @property
    def floors(self) -> NDArray[np.int64]:
        """(layers,) experts that one token needs in each; what several tokens together need may pass through."""
        single = self.apart or (self.train, self.test)
        most: NDArray[np.int64] = np.max([work.needed.max(axis=1) for work in single], axis=0)
        return most

    @property
    def least_slots(self) -> int:
        """What one token needs over all layers, where each has a cache of its own."""
        return int(self.floors.sum())

    @property
    def slots(self) -> int:
        """Experts that the device holds: all where all fit, else as many as the largest would."""
        return self.all_slots if self.sizes.total <= self.budget.left else self.budget.slots(self.sizes)

    def costs_of(self, work: Workload) -> StepCosts:
        """Seconds of the steps of other passes of the same model."""
        return _costs(work, self.machine, self.sizes, self.rest, self.context, self.dense_bits, self.other, self.chunk)

    def together(self, work: Workload) -> Workload:
        """Single tokens put together as the setting says: sequences side by side, or chunks of prompts."""
        return _together(work, self.batch, self.chunk)

    def with_sizes(self, sizes: ExpertSizes) -> Setting:
        """The same with experts of other widths."""
        found = replace(self, sizes=sizes)
        return replace(found, test_costs=found.costs_of(self.test))

    def on(self, train: Workload, test: Workload) -> Setting:
        """The same with other requests, of single tokens: they are put together as the setting says."""
        mine, theirs = self.together(train), self.together(test)
        apart = None if self.batch == self.chunk == 1 else (train, test)
        return replace(self, train=mine, test=theirs, test_costs=self.costs_of(theirs), apart=apart)

    def controls(self, *, seed: int) -> dict[str, Setting]:
        """The same on each control: tokens shuffled in their requests and over all, and random experts.

        Tokens are shuffled and experts drawn before sequences are put together. Random experts of a layer are among
        those that it has.
        """
        counts = (self.sizes.bytes > 0).sum(axis=1).tolist()
        pair = self.apart or (self.train, self.test)
        return {
            name: self.on(*(control_among(one, name, counts, seed=seed + at) for at, one in enumerate(pair)))
            for name in CONTROLS
        }


def control_among(work: Workload, name: str, counts: Sequence[int], *, seed: int, first: int = 0) -> Workload:
    """A control of a workload, random experts of a layer among those that it has.

    Args:
        work: single tokens.
        name: of the control.
        counts: (layers,) experts that each of its layers has.
        seed: of shuffles and draws.
        first: place of its first layer in the model.
    """
    found = control(work, name, seed=seed, first=first)
    if name != UNIFORM or min(counts) >= work.num_experts:
        return found
    ids = found.ids.copy()
    for layer, count in enumerate(counts):
        if count < work.num_experts:
            ids[layer] = uniform_tokens(ids[layer], count, seed=[seed, 3, first + layer])
    return replace(found, ids=ids)


def setting_of(
    run: store.Run,
    machine: Machine,
    *,
    plan: Plan | None = None,
    context: int = CONTEXT,
    batch: int = 1,
    chunk: int = 1,
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
        chunk: tokens of a prompt that one pass reads, as in prefill; 1 = tokens one after another, as in decoding.
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
    packed = packed_bits(run)
    if plan is not None and packed is not None and plan.for_checkpoint:
        raise PlanError(f"the experts of {source.model} are packed in {packed:g} bits already, and the plan edits them")
    sizes = expert_sizes(plan or source, source_bits=8.0 * weight if packed is None else packed)
    rest = _rest(run, source, other_weights)
    if batch > 1 and chunk > 1:
        raise PlanError(f"batch {batch} and chunk {chunk}: sequences are decoded together or prompts read, ask for one")
    budget = _budget(machine, rest, source, context, batch, chunk, 8.0 * weight, other_weights)
    _require_room(budget, source, sizes, narrow)
    _require_memory(run, steps)
    work = workload_of(run, domains=domains, phase=phase, max_tokens=max(2 * steps // max(len(run.layers), 1), 2))
    apart = halves(with_weights(work, sizes.bytes > 0), run.name)
    train, test = (_together(half, batch, chunk) for half in apart)
    costs = _costs(test, machine, sizes, rest, context, 8.0 * weight, other_weights, chunk)
    return Setting(
        machine=machine, source=source, sizes=sizes, rest=rest, budget=budget, train=train, test=test, test_costs=costs,
        context=context, batch=batch, dense_bits=8.0 * weight, other=other_weights,
        recorded=_recorded(run, test), chunk=chunk, packed=packed, apart=None if batch == chunk == 1 else apart,
    )  # fmt: skip


def steps_within(run: store.Run) -> int:
    """:data:`STEPS`, or as many as the memory limit lets in where that is fewer."""
    each = max(layer.top_k for layer in run.layers) * _SELECTION_BYTES
    return max(min(STEPS, memory.share(_PART, STEPS * each) // each), 1)


def _require_memory(run: store.Run, steps: int) -> None:
    """Refuse more steps than the memory limit lets in: ways are timed on all layers of all passes at once."""
    wide = max(layer.top_k for layer in run.layers)
    count = min(steps, run.info.tokens * len(run.layers) // 2)
    taken = count * wide * _SELECTION_BYTES
    if (room := memory.share(_PART, taken)) < taken:
        raise PlanError(
            f"{count:,} layer-steps take about {size(taken)} to replay, and the memory limit leaves {size(room)}: give"
            f" --steps {max(room // (wide * _SELECTION_BYTES) // 1000, 1)}k or fewer, or --memory-limit"
            f" {memory.needed(taken, _PART) >> 20}MiB"
        )


def _together(work: Workload, batch: int, chunk: int) -> Workload:
    return prefill(work, chunk=chunk) if chunk != 1 else batched(work, size=batch)


def notes_of(setting: Setting) -> tuple[str, ...]:
    """What was assumed of machine and memory, in sentences."""
    machine, budget = setting.machine, setting.budget
    notes = [f"{machine.title[:1].upper()}{machine.title[1:]}: {machine.note}."] if machine.note else []
    if setting.packed is not None:
        notes.append(
            f"The checkpoint keeps experts in {setting.packed:g} bits already: narrower ones take the weights that it"
            " comes from."
        )
    if budget.estimated:
        notes.append("What lies on the device beside experts is estimated from the model's configuration.")
    return (*notes, *(f"{one[0].upper()}{one[1:].rstrip('.')}." for one in budget.assumed))


def _recorded(run: store.Run, work: Workload) -> Recorded | None:
    """What routers one layer early foresaw, where the run says it for as many experts as tokens choose."""
    try:
        found = recall_of(run)
    except PlanError:  # no such level, or other distances
        return None
    wide = max(work.top_k) - min(work.top_k) < found.hits.shape[2]
    return found if wide and found.tokens.shape[1] == work.num_layers else None


def with_weights(work: Workload, held: NDArray[np.bool_]) -> Workload:
    """Without experts that hold no weights, such as those that pass a token on: they take no room and no time.

    held: (layers, E) which do.
    """
    exists = np.zeros((work.num_layers, work.num_experts), np.bool_)
    width = min(work.num_experts, held.shape[1])
    exists[:, :width] = held[:, :width]
    there = (work.ids >= 0) & exists[np.arange(work.num_layers)[:, None, None], np.maximum(work.ids, 0)]
    return replace(
        work, ids=np.where(there, work.ids, np.int16(-1)), tokens=np.where(there, work.tokens, np.uint16(0)),
        weights=None if work.weights is None else np.where(there, work.weights, np.float32(0)),
        num_experts=held.shape[1],
    )  # fmt: skip


def halves(work: Workload, name: str) -> tuple[Workload, Workload]:
    """Requests to fit on and requests to judge by, of every domain; domains of one request count as one together."""
    if work.num_requests < 2:
        raise PlanError(
            f"run {name!r} has one request alone to replay, and judging takes others than fitting: record two or more,"
            " or choose more domains"
        )
    names = dict(zip(work.sequences.tolist(), work.domains, strict=True))
    train, test = replace(work, domains=strata(work.domains)).halves()
    mine, theirs = (tuple(names[one] for one in half.sequences.tolist()) for half in (train, test))
    return replace(train, domains=mine), replace(test, domains=theirs)


def _require_room(budget: MemoryBudget, source: Source, sizes: ExpertSizes, narrow: bool) -> None:
    """Refuse a device that cannot hold what one token needs of one layer, or if ``narrow`` no expert at all."""
    most = max(shape.top_k for shape in source.layers)
    largest = float(sizes.largest.max())
    if budget.left >= (0 if narrow else most * largest) and budget.left > 0:
        return
    top_k = np.array([shape.top_k for shape in source.layers])
    rest = budget.total - budget.left
    enough = rest + max(float((sizes.largest * top_k).sum()), most * largest)
    raise PlanError(
        f"{size(budget.total)} are too small: {size(rest)} go to other weights ({size(budget.other)}), keys and values"
        f" ({size(budget.kv)}) and activations ({size(budget.activations)}), and one token needs {most} experts of"
        f" {size(largest)} in a layer; give {size(_UP * enough)} or more, a shorter context, or fewer bits"
    )


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
    machine: Machine, rest: DensePart | None, source: Source, context: int, batch: int, chunk: int, bits: float,
    other: int | None,
) -> MemoryBudget:  # fmt: skip
    """What is left may be less than nothing."""
    if rest is not None:
        found = memory_budget(_ENDLESS, rest, source, context=context, batch=batch, chunk=chunk, dense_bits=bits,
                              other=other)  # fmt: skip
        return replace(found, total=machine.vram)
    return MemoryBudget(
        total=machine.vram, other=float(other or 0), kv=0.0, activations=0.0, estimated=False,
        assumed=("keys, values and activations are not known: they count as part of the other weights",),
    )  # fmt: skip


def _costs(
    work: Workload, machine: Machine, sizes: ExpertSizes, rest: DensePart | None, context: int, bits: float,
    other: int | None, chunk: int,
) -> StepCosts:  # fmt: skip
    """Chunks of a prompt read keys and values of one sequence, whatever their length."""
    return step_costs(
        work, machine, sizes=sizes, rest=rest, context=context, dense_bits=bits, other=other,
        sequences=None if chunk == 1 else 1,
    )  # fmt: skip
