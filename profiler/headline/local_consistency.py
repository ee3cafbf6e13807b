"""SRP and hit rates with intervals, per domain, layer and expert, beside their controls; read layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

import store
from profiler.headline.subject import (
    CONTROLS,
    SEED,
    Block,
    Rows,
    Sample,
    Subject,
    as_text,
    lengths_that_fit,
    trace_controls,
)
from profiler.metrics import local_consistency
from profiler.metrics._arrays import ratio
from profiler.metrics._intervals import interval, resample_weights
from profiler.metrics._segment_bootstrap import Bootstrap, group_interval
from profiler.metrics._segments import SegmentSums, best_threshold, segment_sums
from profiler.metrics._trace import available_cores

MAX_SIZES = 256
"""Points of a hit-rate curve that are stored; longer curves are thinned evenly, the ends kept."""

NUM_RESAMPLES = 1000
CONFIDENCE = 0.95
BOOTSTRAP = Bootstrap(NUM_RESAMPLES, CONFIDENCE, "basic", SEED)

OWN_TOKENS = 262_144
"""Tokens of whole sequences, drawn at random, that caches of single layers are replayed on; more narrow little."""

CONTROL_TOKENS = 150_000
"""The same for controls."""

SHARED_CONTROL_TOKENS = 5_000
"""The same for a cache that all layers share, where the whole trace takes longer than a few seconds."""

Curve = NDArray[np.float64]


def segment_rows(subject: Subject) -> Rows:
    """SRP: the model with intervals and controls, every domain, every layer with intervals, every expert."""
    lengths = lengths_that_fit(subject.lengths) if subject.has_trace else []
    if not lengths:
        return []
    model = {control: {length: _ModelWindows(length) for length in lengths} for control in CONTROLS}
    rows: Rows = []
    with ThreadPoolExecutor(available_cores()) as threads:
        for axis, layer in enumerate(subject.run.layers):
            for control in CONTROLS:
                sums = _layer_sums(subject, axis, control, lengths, threads)
                for length, one in sums.items():
                    model[control][length].add(one.groups, layer)
                if control == "observed":
                    rows += [row for one in sums.values() for row in _layer_rows(one, layer)]
    everything = _Texts(subject.lengths, subject.groups.group, subject.groups.domain)
    controls = subject.sample(CONTROL_TOKENS)
    drawn = _Texts(controls.block.lengths, controls.group, subject.groups.domain)
    for control, windows in model.items():
        texts = everything if control == "observed" else drawn
        rows += [row for one in windows.values() for row in _model_rows(texts, one, control)]
    for domain in subject.run.domains:
        rows += [row for one in model["observed"].values() for row in _model_rows(everything, one, "observed", domain)]
    return rows


@dataclass(frozen=True)
class _Texts:
    """The sequences that windows were counted in: their lengths and groups, and the domain of each group."""

    lengths: NDArray[np.int64]
    group: NDArray[np.int64]
    domain: NDArray[np.str_]


@dataclass
class _ModelWindows:
    """Windows of the whole model by group of sequences, summed over layers and experts."""

    segment_length: int
    groups: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    experts: int = 0

    def add(self, groups: NDArray[np.int64], layer: store.LayerInfo) -> None:
        """Add a layer's windows, (groups, m + 1)."""
        self.groups = groups if not self.experts else self.groups + groups
        self.experts += layer.num_experts


def _layer_sums(
    subject: Subject, axis: int, control: str, lengths: list[int], threads: ThreadPoolExecutor
) -> dict[int, SegmentSums]:
    """Windows of one layer by segment length: over all blocks, or, of a control, over a sample."""
    totals: dict[int, SegmentSums] = {}
    for block, group, ids in _parts(subject, axis, control):

        def one(
            length: int, ids: NDArray[np.int16] = ids, block: Block = block, group: NDArray[np.int64] = group
        ) -> SegmentSums:
            return segment_sums(
                ids=ids, offsets=block.offsets, num_experts=subject.run.layers[axis].num_experts,
                segment_length=length, group=group, num_groups=subject.groups.count,
            )  # fmt: skip

        for sums in threads.map(one, lengths):
            length = sums.segment_length
            totals[length] = totals[length] + sums if length in totals else sums
    return totals


def _parts(subject: Subject, axis: int, control: str) -> Iterator[tuple[Block, NDArray[np.int64], NDArray[np.int16]]]:
    """What a layer is read in: blocks with the groups of their sequences and the layer's ids."""
    if control != "observed":
        sample = subject.sample(CONTROL_TOKENS)
        yield sample.block, sample.group, sample.ids(axis, control=control)
        return
    for block in subject.blocks:
        yield block, subject.groups.of_block(subject.blocks, block.number), subject.ids(axis, block)


def _model_rows(texts: _Texts, windows: _ModelWindows, control: str, domain: str | None = None) -> Rows:
    """SRP and router size of the whole model at one segment length, over all text or one domain."""
    length, groups = windows.segment_length, windows.groups
    long_enough = texts.lengths >= length
    if domain is not None:
        mine = texts.domain == domain
        groups = groups[mine]
        long_enough &= mine[texts.group]
    if int(long_enough.sum()) < 2:
        return []
    estimate, lower, upper = group_interval(histogram=groups, segment_length=length, settings=BOOTSTRAP)
    place = {"control": control, "domain": domain, "at": float(length)}
    place |= {"tokens": int(texts.lengths[long_enough].sum()), "sequences": int(long_enough.sum())}
    rows = _with_ends(place, estimate, lower, upper)
    if control == "observed":
        pooled = groups.sum(axis=0)
        share = float(pooled @ np.arange(length + 1) / max(length * pooled.sum(), 1))
        rows.append({**place, "metric": "srp", "value": 2.0 * share / (1.0 + share), "control": "lower_bound"})
    return rows


def _layer_rows(sums: SegmentSums, layer: store.LayerInfo) -> Rows:
    """SRP of one layer, with intervals, and of each of its experts."""
    place = {"layer": layer.layer, "step": layer.step, "at": float(sums.segment_length)}
    ends = group_interval(histogram=sums.groups, segment_length=sums.segment_length, settings=BOOTSTRAP)
    experts, _, _ = best_threshold(sums.experts, sums.segment_length)
    rows = _with_ends(place, *ends)
    return rows + [
        {**place, "metric": "srp", "expert": expert, "value": value} for expert, value in enumerate(experts.tolist())
    ]


def _with_ends(place: dict[str, Any], estimate: Curve, lower: Curve, upper: Curve) -> Rows:
    """Rows of SRP and router size with their intervals."""
    ends = zip(("srp", "router_size"), estimate.tolist(), lower.tolist(), upper.tolist(), strict=True)
    return [{**place, "metric": name, "value": value, "low": low, "high": high} for name, value, low, high in ends]


def hit_rate_rows(subject: Subject) -> Rows:
    """SCH, LRU, LFU and Belady at all cache sizes: one cache per layer and one for all; SCH and LRU beside controls."""
    if not subject.has_trace:
        return []
    lengths = lengths_that_fit(subject.lengths) or [1]
    policies: list[tuple[str, int | None]] = [("sch", length) for length in lengths]
    policies += [("lru", None), ("lfu", None), ("belady", None)]
    controlled = [("sch", lengths[min(1, len(lengths) - 1)]), ("lru", None)]
    return _own_caches(subject, policies, controlled) + _shared_caches(subject, policies, controlled)


def _own_caches(
    subject: Subject, policies: list[tuple[str, int | None]], controlled: list[tuple[str, int | None]]
) -> Rows:
    """Hit rates of one cache per layer on a sample: each layer's and their mean, with intervals; controls' means."""
    sample, fewer = subject.sample(OWN_TOKENS), subject.sample(CONTROL_TOKENS)
    replays = [_OwnReplay(sample, "observed", policy, length) for policy, length in policies]
    replays += [_OwnReplay(fewer, control, *one) for control in CONTROLS[1:] for one in controlled]
    first = {replay.control: replay for replay in reversed(replays)}
    rows: Rows = []
    with ThreadPoolExecutor(available_cores()) as threads:
        for axis, layer in enumerate(subject.run.layers):
            held = {control: replay.selections(axis) for control, replay in first.items()}
            replayed = [threads.submit(replay.layer_rows, held[replay.control], layer) for replay in replays]
            rows += [row for one in replayed for row in one.result()]
    return [row for replay in replays for row in replay.mean_rows()] + rows


class _OwnReplay:
    """One policy's caches of single layers, layer after layer."""

    def __init__(self, sample: Sample, control: str, policy: str, length: int | None) -> None:
        self.sample, self.control, self.policy = sample, control, policy
        self.parameters: dict[str, Any] = {} if length is None else {"segment_length": length}
        # groups that the sample has no sequence of are not drawn
        self.drawn = np.unique(sample.group)
        self.weights = np.ones((1, len(self.drawn)))
        if control == "observed":
            resampled = resample_weights(num_sequences=len(self.drawn), num_resamples=NUM_RESAMPLES, seed=SEED)
            self.weights = np.concatenate([self.weights, resampled])
        self.sizes = sample.subject.num_experts
        self.total = np.zeros((len(self.weights), self.sizes))
        self.layers = 0

    def selections(self, axis: int) -> NDArray[np.int16]:
        """(1, sequences, tokens, k) of one layer."""
        return _padded(self.sample.ids(axis, control=self.control), self.sample.block.offsets)[None]

    def layer_rows(self, selections: NDArray[np.int16], layer: store.LayerInfo) -> Rows:
        """Replay one layer; its rows, where the trace is the observed one."""
        if (selections < 0).all():
            return []
        (sums,) = local_consistency.hit_sums(
            selections=selections, num_experts=layer.num_experts, policy=self.policy,  # type: ignore[arg-type]
            group=np.searchsorted(self.drawn, self.sample.group), num_groups=len(self.drawn), **self.parameters,
        )  # fmt: skip
        curves = ratio(self.weights @ sums.hits, (self.weights @ sums.weights)[:, None])
        # a smaller layer's cache is whole from its own size on
        self.total += np.pad(np.nan_to_num(curves), ((0, 0), (0, self.sizes - curves.shape[1])), mode="edge")
        self.layers += 1
        if self.control != "observed":
            return []
        return _ranged(curves, {**self._place(), "layer": layer.layer, "step": layer.step})

    def mean_rows(self) -> Rows:
        """The mean over layers."""
        return _ranged(self.total / self.layers, self._place()) if self.layers else []

    def _place(self) -> dict[str, Any]:
        block = self.sample.block
        return {
            "metric": f"hit_rate_{self.policy}", "control": self.control, "parameters": as_text(self.parameters),
            "tokens": block.tokens, "sequences": len(block.lengths),
        }  # fmt: skip


def _shared_caches(
    subject: Subject, policies: list[tuple[str, int | None]], controlled: list[tuple[str, int | None]]
) -> Rows:
    """Hit rates of one cache that all layers share, on a sample where the whole trace takes too long."""
    replays: list[tuple[dict[str, Any], dict[str, Any]]] = []
    trace = subject.replayed
    small = trace if trace.num_tokens == int(subject.lengths.sum()) else subject.whole_trace(SHARED_CONTROL_TOKENS)
    for held, controls in ((trace, ("observed",)), (small, CONTROLS[1:])):
        for control, selections in trace_controls(held, subject.num_experts):
            if control not in controls:
                continue
            for policy, length in policies if control == "observed" else controlled:
                parameters: dict[str, Any] = {} if length is None else {"segment_length": length}
                replay = {"selections": selections, "num_experts": subject.num_experts, "policy": policy, **parameters}
                place: dict[str, Any] = {"metric": f"hit_rate_{policy}", "control": control}
                place |= {"tokens": held.num_tokens, "sequences": len(held.sequences)}
                replays.append((replay, {**place, "parameters": as_text({**parameters, "shared": True})}))
    with ThreadPoolExecutor(available_cores()) as threads:
        replayed = [threads.submit(_shared_cache, *one) for one in replays]
        return [row for one in replayed for row in one.result()]


def _shared_cache(replay: dict[str, Any], place: dict[str, Any]) -> Rows:
    """Hit rates of one cache for all layers; with intervals for the observed trace."""
    if place["control"] != "observed":
        return _curve(local_consistency.hit_rate_curve(**replay, shared=True), place)
    found = local_consistency.hit_rate_bootstrap(**replay, shared=True, num_resamples=NUM_RESAMPLES, seed=SEED)
    return _curve(found.estimate, place, found.lower, found.upper)


def _padded(ids: NDArray[np.int16], offsets: NDArray[np.int64]) -> NDArray[np.int16]:
    """(sequences, tokens, k) from (tokens, k): padding of -1 behind every sequence."""
    lengths = np.diff(offsets)
    kept = np.arange(int(lengths.max(initial=0))) < lengths[:, None]
    padded = np.full((*kept.shape, ids.shape[1]), -1, np.int16)
    padded[kept] = ids
    return padded


def _ranged(curves: Curve, place: dict[str, Any]) -> Rows:
    """Rows of a curve with its interval; curves (1 + resamples, sizes), the estimate first; alone it has none."""
    if len(curves) == 1:
        return _curve(curves[0], place)
    lower, upper = interval(estimate=curves[0], resampled=curves[1:], confidence=CONFIDENCE, rule="basic")
    return _curve(curves[0], place, lower, upper)


def _curve(values: Curve, place: dict[str, Any], low: Curve | None = None, high: Curve | None = None) -> Rows:
    """Rows of a hit-rate curve; entry c - 1 belongs to c slots."""
    sizes = np.unique(np.linspace(0, len(values) - 1, min(len(values), MAX_SIZES)).round().astype(int))
    rows = []
    for size in sizes:
        row = {**place, "at": float(size + 1), "value": float(values[size])}
        if low is not None and high is not None:
            row |= {"low": float(low[size]), "high": float(high[size])}
        rows.append(row)
    return rows
