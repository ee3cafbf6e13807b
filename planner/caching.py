"""The entry to "will caching pay?": a run and a machine in, a verdict with everything that it rests on out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

import store
from compressor.plan import Plan
from moescope.cluster import Cluster
from moescope.sizes import size
from planner.cache.bound import Bound
from planner.cache.published import sch_place, srp_place
from planner.cache.reasons import reasons
from planner.cache.setting import Setting, notes_of, setting_of, steps_within
from planner.cache.study import CurvePoint, DomainFigures, Study, WayFigures
from planner.cache.verdict import SizePoint, judge
from planner.cache.ways import RESIDENT, SWEPT, WAYS, Served, Way, serve, way_of
from planner.cache.whole import WholeCurves, whole_curves
from planner.machine import Machine
from planner.simulate.bounds import bounds
from planner.simulate.controls import UNIFORM, decompose
from planner.simulate.curves import curve, popularity
from planner.simulate.forecast import hit_rate_interval
from planner.simulate.outcome import Curve

COVERAGE = 0.95
PREFETCHES = ("popularity", "transitions", "cross_layer_gate")
"""Ways to foresee experts that are tried with LRU caches; the last where the run recorded it."""

RATIOS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Sizes that are tried, as multiples of what one token needs; and the whole model."""

SHARES = (0.5, 0.75)
"""Further sizes, as parts of the whole model: where tokens choose few of many, the others end long before it."""


def study(
    run: store.Run,
    machine: Machine,
    *,
    plan: Plan | None = None,
    seed: int = 0,
    whole: bool = False,
    cluster: Cluster | None = None,
    tell: Callable[[str], None] = lambda _: None,
    **asked: Any,
) -> Study:
    """Whether caching experts pays for a run's model on a machine, with all figures.

    Half of the requests are for fitting whatever is fitted; every figure is of the other half, and stands beside what
    the same cache does on shuffled tokens and on random experts.

    Args:
        run: with a trace.
        machine: on which.
        plan: what is done to the checkpoint first.
        seed: of controls and resampling.
        whole: hit-rate curves are of all the trace, read layer by layer; ways are timed on the steps asked for.
        cluster: whose workers take layers of the whole trace.
        tell: told what is being worked out.
        asked: context, batch, chunk, other_weights, domains, phase, steps: as :func:`planner.cache.setting.setting_of`.

    Raises:
        PlanError: as there.
    """
    tell("reading the trace")
    setting = setting_of(run, machine, plan=plan, **({"steps": steps_within(run)} if whole else {}) | asked)
    slots = min(setting.slots, setting.all_slots)
    shuffled = setting.controls(seed=seed)
    tell("replaying caches of all sizes")
    curves: Mapping[str, Mapping[str, Curve]]
    extent: tuple[str, ...] = ()
    if whole:
        every = whole_curves(
            run, setting, domains=asked.get("domains"), phase=asked.get("phase", "any"), seed=seed, cluster=cluster,
            tell=tell,
        )  # fmt: skip
        curves, owners, extent = every.curves, every.domains, (_extent(every, setting),)
    else:
        curves = {"observed": _curves(setting)} | {name: _curves(one, few=True) for name, one in shuffled.items()}
        owners = setting.test.domains
    tell("timing ways to serve")
    served = [serve(setting, way, slots=slots) for way in _ways(setting, slots)]
    chance = {one.way.name: serve(shuffled[UNIFORM], one.way, slots=slots).ms
              for one in served if one.way.prefetch == "none"}  # fmt: skip
    figures = tuple(sorted((_figures(one, chance.get(one.way.name)) for one in served), key=lambda one: one.ms))
    tell("timing other sizes")
    bound = Bound.of(setting)
    traced = min((one for one in served if one.way.needs_trace), key=lambda one: one.ms)
    points = _points(setting, shuffled[UNIFORM], slots, bound, traced.way)
    each = max(slots // setting.test.num_layers, 1)
    parts = {name: _parts({kind: found[name] for kind, found in curves.items()}, each) for name in ("lru", "static")}
    srp, sch = srp_place(run), sch_place(run)
    if asked.get("domains") or asked.get("phase", "any") != "any":  # the run's metrics are of all its tokens
        srp = sch = None
    why = reasons(setting, slots=slots, each=each, parts=parts["lru"], srp=srp, sch=sch, ways=figures)
    return Study(
        run=run.name, machine=(machine.name, machine.title), tokens=int(setting.test.pass_tokens.sum()),
        requests=setting.test.num_requests, layers=setting.test.num_layers, experts=setting.test.num_experts,
        slots=slots, all_slots=setting.all_slots, memory=_memory(setting),
        notes=(*_doubts(run), *extent, *notes_of(setting), *_outside(setting, str(asked.get("phase", "any")))),
        curves=tuple(_curve_points(curves, owners, seed)), parts=parts, points=tuple(points), ways=figures,
        domains=_domains(setting, traced), bound_ms=bound.ms(slots), resident_ms=served[0].clock.resident_ms,
        srp=srp, sch=sch,
        verdict=judge(
            points, asked=round(slots * setting.slot_bytes), whole=round(setting.all_slots * setting.slot_bytes),
            room=setting.budget.left, total=setting.sizes.total, shared=machine.shares_memory, told=why,
        ),
        asked={name: list(value) if isinstance(value, tuple) else value
               for name, value in asked.items() if value is not None} | ({"curves": "all tokens"} if whole else {}),
    )  # fmt: skip


def _curves(setting: Setting, few: bool = False) -> dict[str, Curve]:
    """Curves of policies on the requests for judging; of controls, those that are decomposed."""
    found = {
        "lru": curve(setting.test, policy="lru", overflow=True), "static": popularity(setting.train, setting.test)
    }  # fmt: skip
    if few:
        return found
    return found | {"lfu": curve(setting.test, policy="lfu", overflow=True), **bounds(setting.test)}


def _extent(every: WholeCurves, setting: Setting) -> str:
    """On how much of the trace what rests."""
    steps = setting.test.num_passes * setting.test.num_layers
    return (
        f"Hit-rate curves, and what they are made of, are of all the trace: {every.tokens:,} tokens of"
        f" {every.requests:,} requests in every layer, as many for fitting. Times, and the hit rates of ways, rest on"
        f" {steps:,} layer-steps of {setting.test.num_requests:,} of the requests: time takes all layers at once."
    )


def _curve_points(curves: Mapping[str, Mapping[str, Curve]], domains: tuple[str, ...], seed: int) -> list[CurvePoint]:
    points = []
    for control, found in curves.items():
        for name, one in found.items():
            rates, ends = one.rates(), None
            if control == "observed" and name in ("lru", "static"):
                ends = hit_rate_interval(one, domains=domains, seed=seed, num_resamples=400)
            for at in np.flatnonzero(np.isfinite(rates)).tolist():
                low, high = (None, None) if ends is None else (float(ends.lower[at]), float(ends.upper[at]))
                points.append(CurvePoint(name, control, at + 1, float(rates[at]), low, high))
    return points


def _parts(by_control: Mapping[str, Curve], each: int) -> dict[str, float]:
    """What the hit rate with ``each`` slots per layer is made of."""
    rates = {name: one.rates()[each - 1] for name, one in by_control.items()}
    found = decompose(rates.pop("observed"), rates)
    return {name: float(getattr(found, name)) for name in ("random", "popularity", "topic", "locality")}


def _ways(setting: Setting, slots: int) -> list[Way]:
    """Those that machine and size allow, and LRU with each way to foresee that the run allows."""
    found = _allowed(setting, slots, WAYS)
    if slots >= setting.all_slots:
        found = [RESIDENT, *found]
    if slots < setting.least_slots or setting.test.num_layers < 2 or setting.machine.shares_memory:
        return found
    for name in PREFETCHES:
        if name != "cross_layer_gate" or setting.recorded is not None:
            title = f"LRU caches, prefetching by {name.replace('_', ' ')}"
            found.append(replace(way_of("lru"), name=f"lru+{name}", title=title, prefetch=name))  # type: ignore[arg-type]
    return found


def _allowed(setting: Setting, slots: int, ways: Sequence[Way]) -> list[Way]:
    """Caches per layer hold what one token needs; where memory is shared, no CPU runs experts beside the device."""
    roomy, alone = slots >= setting.least_slots, setting.machine.shares_memory
    return [
        way for way in ways
        if (roomy or way.policy == "static" or way.scope == "shared") and not (alone and way.misses == "cpu")
    ]  # fmt: skip


def _figures(one: Served, chance: float | None) -> WayFigures:
    low, high = one.interval(coverage=COVERAGE)
    tokens = float(one.request_tokens.sum())
    hit_low, hit_high = one.hit_interval(coverage=COVERAGE) if one.way.prefetch == "none" else (None, None)
    return WayFigures(
        name=one.way.name, title=one.way.title, policy=one.way.policy, misses=one.way.misses,
        needs_trace=one.way.needs_trace, hit_rate=one.clock.hit_rate, ms=one.ms, low=low, high=high,
        p95_ms=one.clock.p95_ms, stalled=one.clock.stalled_share, loads_per_token=one.clock.bytes / tokens,
        wasted_per_token=one.clock.wasted_bytes / tokens, chance_ms=chance,
        layer_slots=tuple(int(slots) for slots in one.layer_slots), hit_low=hit_low, hit_high=hit_high,
    )  # fmt: skip


def _points(setting: Setting, chance: Setting, asked: int, bound: Bound, best: Way) -> list[SizePoint]:
    """Times of several sizes, ascending; the one asked for is among them, and its best way is tried at all."""
    swept = [way_of(name) for name in SWEPT]
    swept += [] if best in swept else [best]
    least, whole = setting.least_slots, setting.all_slots
    tried = [*(least * ratio for ratio in RATIOS), *(whole * share for share in SHARES)]
    sizes = sorted({*(min(round(one), whole) for one in tried), asked, whole})
    return [_point(setting, chance, slots, bound, swept) for slots in sizes if slots >= min(least, asked)]


def _point(setting: Setting, chance: Setting, slots: int, bound: Bound, swept: Sequence[Way]) -> SizePoint:
    ways = _allowed(setting, slots, swept)
    if not any(way.needs_trace for way in ways):
        ways.append(way_of("lru_shared"))
    served = [serve(setting, way, slots=slots) for way in ways]
    best = min((one for one in served if one.way.needs_trace), key=lambda one: one.ms)
    low, high = best.interval(coverage=COVERAGE)
    return SizePoint(
        bytes=round(slots * setting.slot_bytes), slots=slots, way=best.way.title, ms=best.ms, low=low, high=high,
        plain=min(one.ms for one in served if not one.way.needs_trace),
        chance=serve(chance, best.way, slots=slots).ms, bound=bound.ms(slots), requests=setting.test.num_requests,
    )  # fmt: skip


def _domains(setting: Setting, best: Served) -> tuple[DomainFigures, ...]:
    """Of the best way, the slowest domain first."""
    rows = []
    together = best.by_domain() if setting.apart is None else {}
    train, test = setting.apart or (setting.train, setting.test)
    for name in sorted(set(test.domains)):
        own = test.of_domain(name)
        if setting.apart is None and best.way.policy == "static":  # does not mind what was served before
            rate, ms = together[name]
            alone = rate
        else:
            found = serve(setting.on(train, own), best.way, slots=best.slots)
            alone = found.outcome.hit_rate
            rate, ms = together.get(name, (alone, found.ms))
        rows.append(DomainFigures(name, int(own.pass_tokens.sum()), rate, ms, alone))
    return tuple(sorted(rows, key=lambda row: -row.ms))


def _doubts(run: store.Run) -> list[str]:
    """That the run itself may be wrong."""
    if run.badge.status != "invalid":
        return []
    return [f"The checks of the run failed, so that all of this may be wrong: {run.badge.reason.rstrip('.')}."]


def _outside(setting: Setting, phase: str) -> list[str]:
    """What the figures leave out: experts that host memory cannot hold, and how little was judged."""
    machine, told = setting.machine, []
    beyond = setting.sizes.total - setting.budget.left - machine.ram
    if beyond > 0:
        told.append(
            f"{size(setting.sizes.total)} of experts are more than the device and {size(machine.ram)} of host memory"
            f" hold: {size(beyond)} would have to be read from disk, which these times leave out; moescope"
            " recommend --vram counts it."
        )
    if setting.chunk > 1:
        told.append(f"Text is read {setting.chunk} tokens at a time, as prompts are: times are of reading it.")
    elif phase == "prompt":
        told.append("Tokens of prompts are replayed one after another, as in decoding: --chunk reads many at once.")
    if setting.batch > 1:
        told.append(
            f"Sequences run {setting.batch} at a time until the longest of them ends:"
            f" {setting.test.pass_tokens.mean():.3g} tokens per pass on average."
        )
    if setting.test.num_requests < 2:
        told.append("One request alone, or one batch of them, was judged: intervals over requests say nothing.")
    return told


def _memory(setting: Setting) -> dict[str, float]:
    budget = setting.budget
    return {
        "total": float(budget.total), "other": budget.other, "kv": budget.kv, "activations": budget.activations,
        "experts": budget.left, "slot": setting.slot_bytes,
    }  # fmt: skip
