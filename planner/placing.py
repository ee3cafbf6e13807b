"""The entry to placements: a run and a number of devices in, a checked plan out that says which device holds what.

Placements are fitted on the first part of the text and scored on the rest; :mod:`planner.place.verdict` tells what that
is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import store
from compressor.plan import (
    Estimate,
    Evidence,
    LayerValues,
    PlaceLayer,
    PlaceStep,
    Plan,
    Provenance,
    Source,
    Target,
)
from moescope import __version__
from moescope.cluster import Cluster
from moescope.errors import PlanError
from planner.entry import domains_of
from planner.estimate.parameters import active_parameters, expert_parameters, sizes_before
from planner.importance.statistics import Statistics
from planner.place.methods import Problem, find
from planner.place.score import score
from planner.place.slots import Placement, check_slots
from planner.place.stream import Requests, Stream
from planner.simulate.reading import Reading
from planner.source import source_of, value_bytes
from profiler.metrics._arrays import IntArray

BATCH = 64
"""Requests that are decoded together in a pass, where nobody says otherwise."""

WINDOWS = 4
"""Windows of later text that loads are added up over."""


@dataclass(frozen=True)
class Text:
    """What a placement is made from, and what it is scored on.

    Attributes:
        fit: the first requests, one token per pass; None of a run that holds counts alone.
        later: the others; None likewise.
        load: (layers, E) tokens of each expert in the text of the fit; of the whole run where there is no trace.
    """

    fit: Requests | None
    later: Requests | None
    load: IntArray


def place(
    run: store.Run,
    *,
    method: str = "eplb",
    devices: int,
    nodes: int = 1,
    redundant: int = 0,
    groups: int | None = None,
    train_part: float = 0.5,
    domains: Sequence[str] | None = None,
    batch: int = BATCH,
    max_tokens: int | None = None,
    allow_invalid: bool = False,
    text: Text | None = None,
    **options: Any,
) -> Plan:
    """A plan that places the experts of a run's model. The same run and arguments give the same plan, byte for byte.

    (Under "moetuner", as long as its solver ends before its seconds are spent.)

    Args:
        run: a finished run. Counts are enough for ``eplb``, ``lpt``, ``hecate`` and ``contiguous``.
        method: one of :data:`planner.place.methods.METHODS`.
        devices: of the expert-parallel group.
        nodes: among which they are divided evenly.
        redundant: slots of a layer beyond one per expert, for replicas.
        groups: of consecutive experts that hierarchical EPLB keeps on a node; None = those of the model's router.
        train_part: of the requests in order, what the placement is made from; the rest scores it.
        domains: whose text counts; None = all of the run's.
        batch: requests that are decoded together.
        max_tokens: of the trace at most, whole sequences; None = all.
        allow_invalid: take a run whose checks failed.
        text: what :func:`text_of` read by the same arguments; None = it is read.
        options: of the method.

    Raises:
        PlanError: what cannot be, with what would do; before anything is computed where possible.
    """
    way = find(method)
    source = placeable(run, allow_invalid=allow_invalid)
    names = domains_of(run, domains)
    shape = source.layers[0]
    if redundant < 0:
        raise PlanError(f"{redundant} redundant experts cannot be: give 0 or more")
    check_slots(shape.num_experts + redundant, shape.num_experts, devices, nodes)
    text = text or text_of(run, source, domains=names, train_part=train_part, max_tokens=max_tokens)
    problem = Problem(
        load=text.load, work=text.fit, devices=devices, nodes=nodes, redundant=redundant,
        groups=shape.groups if groups is None else groups, expert_bytes=expert_bytes(run, source), batch=batch,
    )  # fmt: skip
    found = way(problem, **options)
    whole = expert_parameters(source, sizes_before(source))
    active = active_parameters(source, sizes_before(source))
    balance = None
    if text.later is not None:
        balance = score(text.later, found.placement, count=WINDOWS, batch=batch).mean_balancedness
    return Plan(
        provenance=Provenance(
            run=run.name, corpus=str(run.info.settings.get("corpus_sha256", "")), tokens=run.info.tokens,
            domains=names, badge=run.badge.status, tool_version=__version__,
        ),
        source=source,
        target=Target(devices=devices, preset=method),
        steps=(step_of(found.placement, source, method),),
        estimate=Estimate(
            expert_parameters=whole, expert_parameters_after=whole, active_parameters=active,
            active_parameters_after=active, bytes_saved=0,
            balancedness=None if balance is None else float(f"{balance:.6g}"),
        ),
        evidence=(
            Evidence(
                score="selections", unit="tokens", source=way.source, guard=False,
                layers=tuple(
                    LayerValues(layer=one.layer, step=one.step, values=tuple(map(float, row)))
                    for one, row in zip(source.layers, text.load.tolist(), strict=True)
                ),
                notes=(*found.notes, *_notes(text, found.placement, train_part)),
            ),
        ),
    ).checked()  # fmt: skip


def step_of(placement: Placement, source: Source, method: str) -> PlaceStep:
    """The step of a plan that a placement becomes."""
    return PlaceStep(
        method=method, devices=placement.devices, nodes=placement.nodes,
        layers=tuple(
            PlaceLayer(layer=one.layer, step=one.step, experts=tuple(map(int, row)))
            for one, row in zip(source.layers, placement.experts.tolist(), strict=True)
        ),
    )  # fmt: skip


def placement_of(plan: Plan) -> Placement:
    """The placement that a plan states.

    Raises:
        PlanError: it has none.
    """
    for step in plan.steps:
        if isinstance(step, PlaceStep):
            rows = {(one.layer, one.step): one.experts for one in step.layers}
            experts = np.array([rows[one.key] for one in plan.source.layers], np.int64)
            return Placement(experts, plan.source.layers[0].num_experts, step.devices, step.nodes)
    raise PlanError("the plan places nothing: make one with a number of devices")


def placeable(run: store.Run, *, allow_invalid: bool = False) -> Source:
    """The model of a run that can be placed.

    Raises:
        PlanError: the run is live, its checks failed, or its layers have different numbers of experts.
    """
    if run.live:
        raise PlanError(f"run {run.name!r} is still being collected: place when it is finished")
    if run.badge.status == "invalid" and not allow_invalid:
        raise PlanError(
            f"the checks of run {run.name!r} failed ({run.badge.reason}): collect it again, or allow an invalid run"
        )
    source = source_of(run)
    counts = {one.num_experts for one in source.layers}
    if len(counts) > 1:
        raise PlanError(
            f"layers of {source.model} have {min(counts)} to {max(counts)} experts, and engines give all layers as many"
            " slots: place the model before experts are cut, or one whose layers have as many"
        )
    return source


def text_of(
    run: store.Run, source: Source, *, domains: Sequence[str], train_part: float = 0.5, max_tokens: int | None = None,
    cluster: Cluster | None = None, tell: Callable[[str], None] | None = None,
) -> Text:  # fmt: skip
    """The text of a run in two parts; without a trace, its counts.

    Args:
        cluster: whose workers read and count parts of the trace, each by the run's path; None = this process.
        tell: told how far it is, each time that a long trace is read.

    Raises:
        PlanError: no token used any expert, or the trace has too few requests to be split.
    """
    experts = source.layers[0].num_experts
    if not 0 < train_part < 1:
        raise PlanError(f"part {train_part:g} is outside (0, 1): give the part to fit on, such as 0.5")
    if run.has_trace:
        reading = Reading.of(run, domains=domains, max_tokens=max_tokens).with_passes()
        fit, later = Stream(reading, experts, cluster=cluster, tell=tell).split(train_part)
        return Text(fit, later, fit.counts()[:, :experts])
    frames = [Statistics(run, level="routing", domain=one).experts("expert_load", "tokens") for one in domains]
    load = sum(frame["tokens"].to_numpy().astype(np.int64) for frame in frames)
    table = np.asarray(load, np.int64).reshape(len(source.layers), experts)
    if not table.any():
        raise PlanError(f"run {run.name!r} counted no token in {', '.join(domains)}: choose other domains")
    return Text(None, None, table)


def expert_bytes(run: store.Run, source: Source) -> int:
    """Bytes of one routed expert in the run's type, biases left out; 0 where the type is not known."""
    shape = source.layers[0]
    return (3 if source.gated else 2) * shape.width * source.expert_size * (value_bytes(run) or 0)


def _notes(text: Text, placement: Placement, train_part: float) -> tuple[str, ...]:
    notes = []
    if text.later is None:
        fitted = placement.load(text.load)
        balance = float(np.mean(fitted.mean(-1) / np.maximum(fitted.max(-1), 1e-300)))
        notes.append(
            f"The run holds counts and no trace. On the counts that it was made from, balancedness is {balance:.3f}; on"
            " later text, per forward pass, across devices and by affinity it is not known."
        )
    else:
        notes.append(f"Made from the first {train_part:.0%} of the requests; balancedness is that of the others.")
    idle = placement.idle_slots()
    if idle:
        notes.append(f"{idle} slots hold an expert that their device has already, and serve nothing.")
    return tuple(notes)
