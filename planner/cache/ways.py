"""Ways to serve experts that do not all fit on the device, each replayed and timed on requests it was not fitted on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from compressor.plan import CachePolicy, Prefetch
from moescope.errors import PlanError
from planner.cache.setting import Setting
from planner.simulate.curves import curve
from planner.simulate.outcome import Outcome
from planner.simulate.split import split
from planner.simulate.timeline import StepCosts, Timeline, copy_size, prefetching, timeline
from planner.simulate.workload import Workload, strata
from profiler.metrics._arrays import FloatArray, ratio

Flags = NDArray[np.bool_]
Slots = NDArray[np.int64]


@dataclass(frozen=True)
class Way:
    """One way to serve.

    Attributes:
        name: how it is asked for.
        title: in words, as part of a sentence.
        policy: which expert makes room.
        misses: loaded over the link, or run by the CPU where they lie.
        scope: a cache per layer, or one for all.
        split: how slots are shared out over layers: ``equal``, ``fitted`` to the training requests, or ``prefix`` =
            whole layers, the first ones.
        pinned: part of the slots that hold the most used experts for good.
        prefetch: what is loaded before it is asked for; only where :attr:`can_prefetch`.
        needs_trace: it goes by what was recorded; others are what engines do without.
    """

    name: str
    title: str
    policy: CachePolicy
    misses: str = "load"
    scope: str = "layer"
    split: str = "equal"
    pinned: float = 0.0
    prefetch: Prefetch = "none"
    needs_trace: bool = True

    @property
    def can_prefetch(self) -> bool:
        """Prefetching is simulated beside LRU caches per layer in which nothing is pinned."""
        return self.policy == "lru" and self.scope == "layer" and not self.pinned


WAYS: tuple[Way, ...] = (
    Way("layers_cpu", "whole layers on the device, the CPU runs the others", "static", "cpu", split="prefix",
        needs_trace=False),
    Way("layers_load", "whole layers on the device, experts of the others streamed", "static", split="prefix",
        needs_trace=False),
    Way("static_cpu", "the most used experts on the device, the CPU runs the others", "static", "cpu", split="fitted"),
    Way("lru", "LRU caches", "lru"),
    Way("lru_split", "LRU caches, sizes fitted per layer", "lru", split="fitted"),
    Way("lfu", "LFU caches", "lfu"),
    Way("half_pinned", "half of the slots pinned to the most used experts, LRU for the others", "lru", pinned=0.5),
    Way("lru_shared", "one LRU cache for all layers", "lru", scope="shared"),
)  # fmt: skip
"""In the order in which charts list them; of equally fast ones, the first is advised."""

RESIDENT = Way("resident", "all experts on the device", "static", needs_trace=False)
"""Where they fit."""

SWEPT = ("layers_cpu", "layers_load", "static_cpu", "lru", "half_pinned")
"""Those that are tried at every size, beside the one that is best at the size asked for."""


def way_of(name: str) -> Way:
    """The way of that name.

    Raises:
        PlanError: there is none.
    """
    for one in (*WAYS, RESIDENT):
        if one.name == name:
            return one
    raise PlanError(f"no way to serve {name!r}; there are {', '.join(one.name for one in WAYS)}")


@dataclass(frozen=True)
class Served:
    """What a way comes to.

    Attributes:
        way: which.
        slots: experts that the device holds, over all layers.
        layer_slots: (layers,) of each; of a shared cache, its pinned ones.
        pinned: (layers, E) experts that never leave.
        outcome: hits and loads.
        clock: times.
        costs: of the steps, that the times are made of.
        offsets: (requests + 1,) first pass of each request.
        domains: (requests,) of each.
        there: (layers, passes, width) which experts of each step were on the device when it began; None with
            prefetching, where that depends on the clock.
    """

    way: Way
    slots: int
    layer_slots: Slots
    pinned: Flags
    outcome: Outcome
    clock: Timeline
    costs: StepCosts
    offsets: NDArray[np.int64]
    domains: tuple[str, ...]
    there: Flags | None = None

    @property
    def ms(self) -> float:
        """Milliseconds per token."""
        return self.clock.ms_per_token

    @cached_property
    def request_seconds(self) -> FloatArray:
        """(requests,) of each."""
        seconds: FloatArray = np.add.reduceat(self.clock.pass_seconds, self.offsets[:-1])
        return seconds

    @cached_property
    def request_tokens(self) -> FloatArray:
        """(requests,) tokens of each."""
        return np.add.reduceat(self.clock.pass_tokens, self.offsets[:-1]).astype(np.float64)

    def interval(self, *, seed: int = 0, resamples: int = 1000, coverage: float = 0.95) -> tuple[float, float]:
        """Of the milliseconds per token, over whole requests drawn anew within their domains."""
        draws = _draws(self.domains, resamples, seed)
        found = 1e3 * (draws @ self.request_seconds) / (draws @ self.request_tokens)
        low, high = np.quantile(found, [(1 - coverage) / 2, (1 + coverage) / 2])
        return float(low), float(high)

    def hit_interval(self, *, seed: int = 0, resamples: int = 1000, coverage: float = 0.95) -> tuple[float, float]:
        """Of the hit rate without prefetching, over the same draws."""
        draws = _draws(self.domains, resamples, seed)
        found = (draws @ self.outcome.hits.sum(axis=1)) / (draws @ self.outcome.uses.sum(axis=1))
        low, high = np.quantile(found, [(1 - coverage) / 2, (1 + coverage) / 2])
        return float(low), float(high)

    def by_domain(self) -> dict[str, tuple[float, float]]:
        """Domain -> (hit rate, milliseconds per token)."""
        result = {}
        for name in sorted(set(self.domains)):
            mine = np.array([domain == name for domain in self.domains])
            rate = float(ratio(self.outcome.hits[mine].sum(), self.outcome.uses[mine].sum()))
            result[name] = rate, 1e3 * float(self.request_seconds[mine].sum() / self.request_tokens[mine].sum())
        return result


def serve(setting: Setting, way: Way, *, slots: int, disk: Flags | None = None) -> Served:
    """Replay a way on the requests for judging, and time it.

    Args:
        setting: model, machine and requests.
        way: how to serve.
        slots: experts that the device holds, over all layers.
        disk: (layers, E) experts that lie on disk, and are read whenever the device lacks them; None = none.

    Raises:
        PlanError: slots below what one token needs in every layer, for sizes fitted per layer; experts on disk,
            for ways with prefetching or for a machine that has no disk.
    """
    work = setting.test
    layer_slots, pinned = allotted(setting, way, slots)
    if disk is not None and not disk.any():
        disk = None
    if way.prefetch != "none":
        if disk is not None:
            raise PlanError(f"{way.title}: prefetching from disk is not simulated; take a way without it")
        clock = _prefetched(setting, way, layer_slots)
        outcome = _counted(work, way, slots, clock.missing)
        return Served(way, slots, layer_slots, pinned, outcome, clock, setting.test_costs, work.offsets, work.domains)
    outcome, there = _replayed(setting, way, slots, layer_slots, pinned)
    missing_on_disk = None
    if disk is not None:
        lies = disk[np.arange(work.num_layers)[:, None, None], np.maximum(work.ids, 0)]
        missing_on_disk = ((work.ids >= 0) & ~there & lies).sum(axis=2)
    costs = _costs_where(setting, way, there)
    clock = timeline(
        work, outcome, costs, link=setting.machine.link, disk=setting.machine.disk,
        from_disk=missing_on_disk, fallback="cpu" if way.misses == "cpu" else "link",
    )  # fmt: skip
    clock = replace(clock, resident=setting.test_costs.resident(work.needed))
    return Served(way, slots, layer_slots, pinned, outcome, clock, costs, work.offsets, work.domains, there)


def allotted(setting: Setting, way: Way, slots: int) -> tuple[Slots, Flags]:
    """Slots per layer, and which experts are pinned."""
    work, layers = setting.train, setting.train.num_layers
    pinned = np.zeros((layers, work.num_experts), np.bool_)
    sizes = (setting.sizes.bytes > 0).sum(axis=1)
    if way.split == "prefix":
        given = np.minimum(np.maximum(slots - np.concatenate([[0], np.cumsum(sizes)[:-1]]), 0), sizes)
        given = np.where(given < sizes, 0, given)  # a layer is there as a whole or not at all
        pinned |= np.arange(work.num_experts) < given[:, None]
        return given, pinned
    if way.policy == "static":
        pinned = most_used(setting, slots)
        return pinned.sum(axis=1), pinned
    if way.scope == "shared":
        return np.zeros(layers, np.int64), pinned
    if way.pinned > 0:
        pins = max(min(round(way.pinned * slots), slots - setting.least_slots), 0)
        pinned = most_used(setting, pins)
    free = slots - int(pinned.sum())
    if way.split == "fitted":
        fitted = curve(work, policy="lru", overflow=True)
        given = split(fitted, slots=free, floors=setting.floors.tolist(), ceilings=sizes.tolist())
    else:
        given = _even(free, sizes - pinned.sum(axis=1))
    return given + pinned.sum(axis=1), pinned


def _even(slots: int, most: Slots) -> Slots:
    """Shared out evenly, no layer more than ``most``; what one cannot take goes to the others."""
    given = np.zeros(len(most), np.int64)
    while slots > 0 and (given < most).any():
        open_ = np.flatnonzero(given < most)[:slots]  # all have as many so far; what does not divide goes to the first
        added = np.minimum(slots // len(open_), (most - given)[open_])
        given[open_] += added
        slots -= int(added.sum())
    return given


def most_used(setting: Setting, slots: int) -> Flags:
    """(layers, E) the experts that most steps of the training requests need, over all layers; ties: lower ids."""
    work = setting.train
    counts = np.stack([np.bincount(layer[layer >= 0], minlength=work.num_experts) for layer in work.ids])
    exists = (setting.sizes.bytes > 0).ravel()
    order = np.lexsort((np.arange(counts.size), -counts.ravel(), ~exists))
    chosen = np.zeros(counts.size, np.bool_)
    chosen[order[: min(slots, int(exists.sum()))]] = True
    return chosen.reshape(counts.shape)


def _replayed(setting: Setting, way: Way, slots: int, layer_slots: Slots, pinned: Flags) -> tuple[Outcome, Flags]:
    """The outcome, and which experts of every step were there: (layers, passes, width)."""
    from planner.simulate.replay import residency

    work = setting.test
    fixed = pinned[np.arange(work.num_layers)[:, None, None], np.maximum(work.ids, 0)] & (work.ids >= 0)
    if way.policy == "static":
        return _counted(work, way, slots, _missing(work, fixed)), fixed
    rest = replace(work, ids=np.where(fixed, np.int16(-1), work.ids))
    shared, free = way.scope == "shared", layer_slots - pinned.sum(axis=1)
    there = residency(
        rest, policy=way.policy, passes=range(work.num_passes), slots=slots if shared else None, shared=shared,
        layer_slots=None if shared else free.tolist(), train=setting.train,
    )  # fmt: skip
    overflow = int(np.count_nonzero(rest.needed > (slots if shared else free[:, None])))
    there |= fixed
    return _counted(work, way, slots, _missing(work, there), overflow=overflow), there


def _costs_where(setting: Setting, way: Way, there: Flags) -> StepCosts:
    """Costs of the steps where experts of a layer differ in size: what is missing may be narrower than what is there.

    Copies and the CPU take the mean size of the experts that were missing, the device that of those that it runs.
    """
    work, costs = setting.test, setting.test_costs
    if not setting.has_mixed_sizes:
        return costs
    missing = _only(work, ~there)
    if way.misses == "cpu":
        costs = replace(costs, expert=setting.costs_of(_only(work, there)).expert, cpu=setting.costs_of(missing).cpu)
    return replace(costs, copied=copy_size(missing, costs))


def _only(work: Workload, those: Flags) -> Workload:
    """The uses of some entries of ``ids`` alone."""
    return replace(work, ids=np.where(those, work.ids, np.int16(-1)), tokens=np.where(those, work.tokens, np.uint16(0)))


def _missing(work: Workload, there: Flags) -> NDArray[np.int64]:
    """(layers, passes) experts that each step needs and that were not there."""
    missing: NDArray[np.int64] = np.count_nonzero((work.ids >= 0) & ~there, axis=2)
    return missing


def _counted(work: Workload, way: Way, slots: int, missing: NDArray[np.int64], overflow: int = 0) -> Outcome:
    """The outcome of knowing how many experts of every step, (layers, passes), were missing."""
    firsts = work.offsets[:-1]
    needs = work.needed

    def per_request(values: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.add.reduceat(values, firsts, axis=1).T.astype(np.int64)

    return Outcome(
        policy=way.name, slots=slots, uses=per_request(needs), hits=per_request(needs - missing),
        stalled=per_request((missing > 0).astype(np.int64)), steps=per_request((needs > 0).astype(np.int64)),
        overflow=overflow, missing=missing.astype(np.uint16),
    )  # fmt: skip


def _prefetched(setting: Setting, way: Way, layer_slots: Slots) -> Timeline:
    from planner.simulate.prefetch import find
    from planner.simulate.prefetch.predicted import together

    work = setting.test
    train, single = setting.apart or (setting.train, work)
    given = {"recorded": setting.recorded} if way.prefetch == "cross_layer_gate" else {}
    width = min(max(single.top_k), single.num_experts)
    foreseen = find(way.prefetch).predict(single, train=train, ahead=1, width=width, **given)
    if setting.apart is not None:
        united = together(foreseen, single, setting.together)
        foreseen = united.first(int(work.needed.max()))
    return prefetching(
        work, setting.test_costs, predicted=foreseen.ids, slots=layer_slots, link=setting.machine.link, ahead=1
    )


def _draws(domains: tuple[str, ...], resamples: int, seed: int) -> FloatArray:
    """(resamples, requests) how often each request is drawn: as many of each domain as there are.

    Domains of one request each are drawn as one: alone, each would vary by nothing.
    """
    generator = np.random.default_rng(seed)
    result = np.zeros((resamples, len(domains)))
    several = np.array(strata(domains))
    for name in sorted(set(several.tolist())):
        mine = np.flatnonzero(several == name)
        result[:, mine] = generator.multinomial(len(mine), np.full(len(mine), 1 / len(mine)), size=resamples)
    return result
