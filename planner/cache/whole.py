"""Hit-rate curves of every layer's own cache on all of a trace: one layer is read, replayed and let go after the other.

Caches per layer mind no other layer, so that the curves are those of the trace held whole, to the last digit. Ways to
serve are timed on passes through all layers, and rest on a part of a long trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

import store
from moescope import memory
from moescope.cluster import Cluster
from moescope.errors import PlanError
from moescope.sizes import size
from planner.cache.setting import Setting, control_among, halves, with_weights
from planner.simulate.bounds import BOUNDS, Bound, bounds
from planner.simulate.controls import CONTROLS
from planner.simulate.curves import curve, popularity
from planner.simulate.outcome import Curve
from planner.simulate.reading import Reading
from planner.simulate.workload import Workload
from profiler.metrics._arrays import FloatArray, IntArray

OBSERVED = "observed"
TOLD_APART = ("lru", "static")
"""Policies whose curves have intervals: their hits are kept by request."""

MOST_BUNDLES = 4096
"""Requests that are told apart at most; of more, neighbours of one domain count as one when intervals are drawn."""

_SELECTION_BYTES = 60
"""Of one selection of a layer, with its controls, while its curves are counted; as measured."""

_PART = 1 - memory.DATABASE  # of what a memory limit leaves

Tallies = dict[tuple[str, str], tuple[IntArray, FloatArray]]
"""(control, policy) -> uses (bundles,) and hits (bundles, sizes); one bundle where they are not told apart."""


@dataclass(frozen=True)
class WholeCurves:
    """Curves over all layers, by control and policy; hits and uses are summed over layers.

    Attributes:
        curves: control -> policy -> curve.
        domains: (bundles,) of those policies whose hits are kept by request.
        tokens: that were judged on; as many, nearly, were fitted on.
        requests: that they are of.
    """

    curves: Mapping[str, Mapping[str, Curve]]
    domains: tuple[str, ...]
    tokens: int
    requests: int


@dataclass(frozen=True)
class LayerJob:
    """One layer for :func:`layer_curves`, as it is sent to a worker.

    Attributes:
        run: with a trace.
        place: of the layer among those of the run.
        numbers, lengths, domains: of the requests, as in :class:`planner.simulate.reading.Reading`.
        kept: bits of the tokens that are passes.
        held: (E,) experts of the layer that hold weights.
        seed: of the controls.
    """

    run: store.SharedRun
    place: int
    numbers: IntArray
    lengths: IntArray
    domains: tuple[str, ...]
    kept: NDArray[np.uint8]
    held: NDArray[np.bool_]
    seed: int


def whole_curves(
    run: store.Run, setting: Setting, *, domains: list[str] | None = None, phase: str = "any", seed: int = 0,
    cluster: Cluster | None = None, tell: Callable[[str], None] = lambda _: None,
) -> WholeCurves:  # fmt: skip
    """The curves of a run's whole trace, judged on half of its requests.

    Args:
        run: with a trace.
        setting: whose experts hold weights; single tokens.
        domains: whose requests count; None = all.
        phase: which tokens.
        seed: of the controls.
        cluster: layers go over its workers; None = one after the other here.
        tell: told how far it is.

    Raises:
        PlanError: passes of several tokens, or one layer is more than the memory limit lets in.
    """
    if setting.batch > 1 or setting.chunk > 1:
        raise PlanError("all of a trace is replayed token by token: leave out --batch and --chunk, or give --steps N")
    reading = Reading.of(run, domains=domains, phase=phase).with_passes()
    _require_room(reading)
    halved = _halved(reading, run.name)
    shared = store.SharedRun.of(run.path)
    if cluster is None:  # this process has the limit already
        shared = replace(shared, limit=None)
    jobs = [
        LayerJob(shared, place, reading.numbers, reading.lengths, reading.domains, np.packbits(reading.kept),
                 setting.sizes.bytes[place] > 0, seed)
        for place in range(len(run.layers))
    ]  # fmt: skip
    sums: Tallies = {}
    for done, found in enumerate(_results(jobs, cluster), 1):
        tell(f"replaying all of the trace, layer {done} of {len(jobs)}")
        for key, (uses, hits) in found.items():
            before = sums.get(key)
            sums[key] = (uses, hits) if before is None else (before[0] + uses, before[1] + hits)
    curves: dict[str, dict[str, Curve]] = {}
    for (control, policy), (uses, hits) in sums.items():
        curves.setdefault(control, {})[policy] = Curve(name=policy, uses=uses[:, None], hits=hits[:, None])
    return WholeCurves(curves, _bundled(halved.domains)[1], int(halved.pass_tokens.sum()), halved.num_requests)


def layer_curves(job: LayerJob) -> Tallies:
    """The curves of one layer; from any process that reaches the run.

    Raises:
        StoreError: it cannot be read.
    """
    with job.run.opened() as run:
        kept = np.unpackbits(job.kept, count=int(job.lengths.sum())).astype(np.bool_)
        reading = Reading(run, job.numbers, job.lengths, np.zeros_like(job.lengths), job.domains, known=kept)
        work = with_weights(reading.workload([job.place], weights=False), job.held[None])
        train, test = halves(work, run.name)
        del work
        owner, _ = _bundled(test.domains)
        found = dict(_tallies(OBSERVED, train, test, owner))
        count = [int(job.held.sum())]
        for name in CONTROLS:  # one at a time: each is as large as the layer
            shuffled = control_among(train, name, count, seed=job.seed, first=job.place)
            judged = control_among(test, name, count, seed=job.seed + 1, first=job.place)
            found |= dict(_tallies(name, shuffled, judged, owner))
    return found


def _results(jobs: list[LayerJob], cluster: Cluster | None) -> Iterator[Tallies]:
    """Of each layer, in any order: sums of whole numbers are the same in all of them."""
    if cluster is None:
        yield from map(layer_curves, jobs)
    else:
        yield from (found for _, found in cluster.map(layer_curves, jobs))


def _tallies(control: str, train: Workload, test: Workload, owner: IntArray) -> Iterator[tuple[Any, Any]]:
    """Uses and hits of the policies that a study shows, of one layer."""
    makers: dict[str, Callable[[], Curve]] = {
        "lru": lambda: curve(test, policy="lru", overflow=True), "static": lambda: popularity(train, test)
    }  # fmt: skip
    if control == OBSERVED:
        makers["lfu"] = lambda: curve(test, policy="lfu", overflow=True)
        makers |= {name: partial(_bound, test, name) for name in BOUNDS}
    for policy, maker in makers.items():
        found = maker()
        apart = control == OBSERVED and policy in TOLD_APART
        at = owner if apart else np.zeros_like(owner)
        uses, hits = np.zeros(at.max() + 1, np.int64), np.zeros((at.max() + 1, found.hits.shape[2]))
        np.add.at(uses, at, found.uses[:, 0])
        np.add.at(hits, at, found.hits[:, 0])
        yield (control, policy), (uses, hits)


def _bound(test: Workload, name: Bound) -> Curve:
    return bounds(test, names=[name])[name]


def _bundled(domains: tuple[str, ...]) -> tuple[IntArray, tuple[str, ...]]:
    """(requests,) the bundle of each, and the domain of each bundle: every request its own, or so many of a domain."""
    if len(domains) <= MOST_BUNDLES:
        return np.arange(len(domains)), domains
    owner = np.zeros(len(domains), np.int64)
    names: list[str] = []
    known = np.asarray(domains)
    each = -(-len(domains) // MOST_BUNDLES)
    for name in dict.fromkeys(domains):
        mine = np.flatnonzero(known == name)
        owner[mine] = len(names) + np.arange(len(mine)) // each
        names += [name] * -(-len(mine) // each)
    return owner, tuple(names)


def _halved(reading: Reading, name: str) -> Workload:
    """The requests that judge, with how many tokens each has, but without its experts."""
    passes = reading.passes
    bare = Workload(
        ids=np.zeros((1, int(passes.sum()), 0), np.int16), tokens=np.zeros((1, int(passes.sum()), 0), np.uint16),
        weights=None, offsets=np.concatenate([[0], np.cumsum(passes)]).astype(np.int64),
        pass_tokens=np.ones(int(passes.sum()), np.int64), domains=reading.domains, sequences=reading.numbers,
        layers=((0, 0),), num_experts=1, top_k=(1,),
    )  # fmt: skip
    return halves(bare, name)[1]


def _require_room(reading: Reading) -> None:
    """Refuse a trace of which one layer is more than the memory limit lets in."""
    wide = max(layer.top_k for layer in reading.run.layers)
    layer = reading.num_tokens * wide * _SELECTION_BYTES
    if (room := memory.share(_PART, layer)) < layer:
        raise PlanError(
            f"one layer of all {reading.num_tokens:,} tokens takes about {size(layer)} to replay, and the memory limit"
            f" leaves {size(room)}: give --memory-limit {memory.needed(layer, _PART) >> 20}MiB or more, or --steps N"
            " for a part of the trace"
        )
