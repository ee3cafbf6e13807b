"""Every way to place experts, by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moescope.errors import PlanError
from planner.place.affinity import Objective, affinity
from planner.place.dispatch import passes_of
from planner.place.hecate import WINDOW, hecate, hidden_replicas, lasting
from planner.place.lpt import lpt
from planner.place.moetuner import SOLVER_EXPERTS, moetuner
from planner.place.moetuner import Objective as Cost
from planner.place.pairs import coactivations, transitions
from planner.place.rebalance import eplb
from planner.place.slots import Placement, contiguous
from planner.place.stream import Part, Requests, over_parts
from profiler.metrics._arrays import FloatArray, IntArray


@dataclass(frozen=True)
class Problem:
    """What is to be placed.

    Attributes:
        load: (layers, E) tokens of each expert, of the text to fit on.
        work: that text, one token per pass; None where only counts are known.
        devices: D.
        nodes: among which devices are divided evenly.
        redundant: slots of a layer beyond one per expert.
        groups: of consecutive experts, as the router limits itself to.
        expert_bytes: of one expert; 0 where the type of its weights is not known.
        batch: requests decoded together in one pass.
    """

    load: IntArray
    work: Requests | None
    devices: int
    nodes: int = 1
    redundant: int = 0
    groups: int = 1
    expert_bytes: int = 0
    batch: int = 64


@dataclass(frozen=True)
class Found:
    """What a method answers: slots, and sentences for the reader."""

    placement: Placement
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """One way to place experts.

    Attributes:
        name: how it is asked for.
        title: in words.
        source: where it was published.
        function: (problem, **options) -> Found.
        replicates: takes redundant slots.
        needs_trace: counts are not enough.
        options: its parameters beside the problem.
        required: those that have no default.
    """

    name: str
    title: str
    source: str
    function: Callable[..., Found]
    replicates: bool = False
    needs_trace: bool = False
    options: tuple[str, ...] = field(init=False)
    required: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        given = list(inspect.signature(self.function).parameters.values())[1:]
        object.__setattr__(self, "options", tuple(one.name for one in given))
        object.__setattr__(self, "required", tuple(one.name for one in given if one.default is one.empty))

    def __call__(self, problem: Problem, **options: Any) -> Found:
        """The placement.

        Raises:
            PlanError: an option that it does not have, lacks or cannot read, or what it cannot do.
        """
        unknown = sorted(set(options) - set(self.options))
        if unknown:
            near = difflib.get_close_matches(unknown[0], self.options, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(self.options) or 'none'}"
            raise PlanError(f"placement {self.name!r} has no option {unknown[0]!r}: {hint}")
        missing = [name for name in self.required if name not in options]
        if missing:
            how = "them as options" if len(missing) > 1 else "it as an option"
            raise PlanError(f"placement {self.name!r} needs {' and '.join(missing)}: give {how}")
        if problem.redundant and not self.replicates:
            *others, last = (one.name for one in METHODS if one.replicates)
            able = f"{', '.join(others)} or {last}"
            raise PlanError(f"placement {self.name!r} gives each expert one slot: leave redundant out, or use {able}")
        if self.needs_trace and problem.work is None:
            raise PlanError(
                f"placement {self.name!r} needs a trace and the run holds counts: use eplb or lpt, or record selections"
                " token by token"
            )
        try:
            return self.function(problem, **options)
        except (TypeError, ValueError) as error:
            if not options:
                raise
            given = ", ".join(f"{name}={value!r}" for name, value in sorted(options.items()))
            raise PlanError(f"placement {self.name!r} cannot take {given}: {error}") from error


def find(name: str) -> Method:
    """A method by its name.

    Raises:
        PlanError: there is none.
    """
    for method in METHODS:
        if method.name == name:
            return method
    known = [one.name for one in METHODS]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
    raise PlanError(f"there is no placement {name!r}: {hint}")


def _eplb(problem: Problem) -> Found:
    experts = problem.load.shape[1]
    slots = eplb(
        load=problem.load, num_replicas=experts + problem.redundant, num_groups=problem.groups,
        num_nodes=problem.nodes, num_gpus=problem.devices,
    ).physical_to_logical  # fmt: skip
    whole = problem.groups % problem.nodes == 0 and problem.nodes > 1
    how = (
        f"hierarchical, each group of experts on one of {problem.nodes} nodes"
        if whole
        else "global, replicas lie on any device"
    )
    return Found(Placement(slots, experts, problem.devices, problem.nodes), (f"EPLB: {how}.",))


def _lpt(problem: Problem) -> Found:
    return Found(
        lpt(load=problem.load, devices=problem.devices, nodes=problem.nodes, redundant=problem.redundant)
    )  # fmt: skip


def _contiguous(problem: Problem) -> Found:
    layers, experts = problem.load.shape
    slots = experts + problem.redundant
    return Found(
        contiguous(num_layers=layers, num_experts=experts, devices=problem.devices, nodes=problem.nodes, slots=slots)
    )


def _moetuner(
    problem: Problem, *, bandwidth: ArrayLike | None = None, objective: Cost = "sum", seconds: float = 15.0,
    solver_experts: int = SOLVER_EXPERTS,
) -> Found:  # fmt: skip
    assert problem.work is not None
    tuned = moetuner(
        load=problem.load, transitions=transitions(problem.work), devices=problem.devices, nodes=problem.nodes,
        bandwidth=bandwidth, objective=objective, seconds=seconds, solver_experts=solver_experts,
    )  # fmt: skip
    gap = float(tuned.clusters.gap.max())
    proven = "the best for these clusters" if tuned.exact else "found by a search, not proven the best"
    return Found(tuned.placement, (
        f"MoETuner's clusters: the fullest is at most {gap:.2%} above the least that is known to be possible; their"
        f" assignment to devices is {proven}.",
    ))  # fmt: skip


def _affinity(problem: Problem, *, objective: Objective = "fanout", across: float = 1.0, slack: float = 0.05) -> Found:
    assert problem.work is not None
    return Found(
        affinity(
            load=problem.load, coactivations=coactivations(problem.work),
            transitions=transitions(problem.work) if across else None, devices=problem.devices, nodes=problem.nodes,
            objective=objective, across=across, slack=slack,
        )
    )  # fmt: skip


def _hecate(
    problem: Problem, *, attention: float, bandwidth: float, free_slots: int = 1, window: int = WINDOW
) -> Found:
    layers, experts = problem.load.shape
    if problem.expert_bytes < 1:
        raise PlanError("the bytes of an expert are not known, so neither is how many can be copied: use eplb or lpt")
    limits = hidden_replicas(
        attention=attention, bandwidth=bandwidth, expert_bytes=problem.expert_bytes, free_slots=free_slots,
        layers=layers,
    )  # fmt: skip
    limit = min(int(limits.min()), experts - experts // problem.devices)
    placement = lasting(load=problem.load.astype(np.float64), devices=problem.devices, limit=limit)
    copied = "1 expert" if limit == 1 else f"{limit} experts"
    notes = [f"{copied} per layer can be copied to a device while attention runs and kept by it."]
    if problem.work is not None and limit:
        done = hecate(
            loads=pass_loads(problem.work, batch=problem.batch), devices=problem.devices, limits=limits, window=window
        )
        notes.append(
            f"Chosen anew for every pass from the {window} before, they take balancedness per pass from"
            f" {done.balancedness_without:.3f} to {done.balancedness:.3f} on the text of the fit; this plan keeps those"
            " that the whole text asks for, since no engine's file says otherwise."
        )
    return Found(Placement(placement.experts, experts, problem.devices, problem.nodes), tuple(notes))


def pass_loads(work: Requests, *, batch: int) -> FloatArray:
    """(passes, layers, E) tokens of each expert in each pass of ``batch`` requests."""
    return np.concatenate(list(over_parts(work, partial(_pass_loads, batch=batch), multiple=batch)))


def _pass_loads(part: Part, *, batch: int) -> FloatArray:
    work = part.work
    turn = passes_of(work, batch=batch)
    count = int(turn.max(initial=-1)) + 1
    loads = np.zeros((count, work.num_layers, work.num_experts))
    for layer, ids in enumerate(work.ids):
        token, rank = np.nonzero(ids >= 0)
        keys = turn[token] * work.num_experts + ids[token, rank]
        loads[:, layer] = np.bincount(keys, minlength=count * work.num_experts).reshape(count, -1)
    return loads


METHODS: tuple[Method, ...] = (
    Method("eplb", "EPLB: replicate busy experts", "arXiv 2412.19437", _eplb, replicates=True),
    Method("lpt", "longest first, then swaps", "Graham 1969", _lpt, replicates=True),
    Method("moetuner", "balanced clusters, near those before", "arXiv 2502.06643", _moetuner, needs_trace=True),
    Method("affinity", "experts that tokens use together", "arXiv 2401.08383", _affinity, needs_trace=True),
    Method("hecate", "replicas that attention hides", "arXiv 2502.02581", _hecate),
    Method("contiguous", "as engines begin", "standard", _contiguous, replicates=True),
)
"""In the order in which pages list them."""
