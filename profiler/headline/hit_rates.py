"""SCH, LRU, LFU and Belady at all cache sizes: one cache per layer and one for all, with intervals, beside controls."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from profiler.headline.layerwise import LayerPart
from profiler.headline.subject import (
    CONTROLS,
    Rows,
    Sample,
    Subject,
    as_text,
    lengths_that_fit,
    resampled,
    trace_controls,
)
from profiler.metrics import local_consistency
from profiler.metrics._arrays import ratio
from profiler.metrics._intervals import interval
from profiler.metrics._trace import available_cores
from profiler.metrics.cache_hit_rate import CachePolicy, HitSums

MAX_SIZES = 256
"""Points of a hit-rate curve that are stored; longer curves are thinned evenly, the ends kept."""

CONFIDENCE = 0.95

OWN_TOKENS = 262_144
"""Tokens of whole sequences, drawn at random, that caches of single layers are replayed on; more narrow little."""

CONTROL_TOKENS = 150_000
"""The same for controls."""

SHARED_CONTROL_TOKENS = 5_000
"""The same for a cache that all layers share, where the whole trace takes longer than a few seconds."""

Curve = NDArray[np.float64]
Policy = tuple[CachePolicy, int | None]
"""A policy and the segment length that it looks ahead; None for those that do not."""


def policies(subject: Subject) -> tuple[list[Policy], list[Policy]]:
    """Those that are replayed on the trace, and those that are replayed on its controls too."""
    lengths = lengths_that_fit(subject.lengths) or [1]
    observed: list[Policy] = [("sch", length) for length in lengths]
    observed += [("lru", None), ("lfu", None), ("belady", None)]
    return observed, [("sch", lengths[min(1, len(lengths) - 1)]), ("lru", None)]


Replayed = tuple[str, Policy, Curve | None]
"""Control, policy, and the curves (1 + resamples, sizes), the estimate first, where the layer asks for anything."""


def own_cache_layer(subject: Subject, axis: int) -> list[Replayed]:
    """One layer's own cache by every policy, on a sample or on the whole trace, and on controls."""
    found: list[Replayed] = []
    observed, controlled = policies(subject)
    for control in CONTROLS:
        wanted = observed if control == "observed" else controlled
        curves = own_curves(subject, axis, control, wanted)
        found += [(control, policy, curve) for policy, curve in zip(wanted, curves, strict=True)]
    return found


def own_curves(subject: Subject, axis: int, control: str, wanted: list[Policy]) -> list[Curve | None]:
    """Curves of some policies, as :data:`Replayed`; of controls without resamples."""
    text = _text(subject, control)
    group, weights = text.drawn
    sums = [HitSums.zeros(weights.shape[1], subject.run.layers[axis].num_experts) for _ in wanted]
    with ThreadPoolExecutor(available_cores()) as threads:
        for mine, block, ids in text.pieces(axis, control):
            replay: dict[str, Any] = {"requests": ids, "offsets": block.offsets, "group": group[mine]}
            running = [
                threads.submit(one.add, policy=policy, segment_length=length, **replay)
                for one, (policy, length) in zip(sums, wanted, strict=True)
            ]
            for one in running:
                one.result()
    drawn = weights if control == "observed" else weights[:1]
    return [ratio(drawn @ one.hits, (drawn @ one.weights)[:, None]) if one.weights.any() else None for one in sums]


def own_cache_rows(subject: Subject, found: Iterable[list[Replayed]]) -> Rows:
    """Hit rates of one cache per layer: the mean over layers of every replay, then each layer's; controls' means."""
    totals: dict[tuple[str, Policy], Curve] = {}
    counts: dict[tuple[str, Policy], int] = {}
    rows: Rows = []
    for layer, replays in zip(subject.run.layers, found, strict=False):
        for control, policy, curves in replays:
            if curves is None:
                continue
            # a smaller layer's cache is whole from its own size on
            missing = subject.num_experts - curves.shape[1]
            whole = np.pad(np.nan_to_num(curves), ((0, 0), (0, missing)), mode="edge")
            key = (control, policy)
            totals[key] = totals.get(key, 0.0) + whole
            counts[key] = counts.get(key, 0) + 1
            if control == "observed":
                place = _place(_text(subject, control), control, policy)
                rows += _ranged(curves, {**place, "layer": layer.layer, "step": layer.step})
    means = [
        row
        for (control, policy), total in totals.items()
        for row in _ranged(total / counts[control, policy], _place(_text(subject, control), control, policy))
    ]
    return means + rows


OWN_CACHES = LayerPart("own cache", own_cache_layer, own_cache_rows)
"""Hit rates of every layer's own cache, layer by layer."""


def _text(subject: Subject, control: str) -> Sample:
    if control == "observed":
        return subject.everything if subject.whole else subject.sample(OWN_TOKENS)
    return subject.sample(CONTROL_TOKENS)


def _place(text: Sample, control: str, policy: Policy, **more: Any) -> dict[str, Any]:
    name, length = policy
    parameters: dict[str, Any] = {**({} if length is None else {"segment_length": length}), **more}
    return {
        "metric": f"hit_rate_{name}", "control": control, "parameters": as_text(parameters),
        "tokens": text.block.tokens, "sequences": len(text.block.lengths),
    }  # fmt: skip


def shared_cache_rows(subject: Subject) -> Rows:
    """Hit rates of one cache that all layers share, on a sample where the whole trace takes too long."""
    if not subject.has_trace:
        return []
    observed, controlled = policies(subject)
    text = subject.sample(subject.replay_tokens)
    fewer = text if text.is_all else subject.sample(SHARED_CONTROL_TOKENS)
    rows: Rows = []
    for sample, controls, wanted in ((text, CONTROLS[:1], observed), (fewer, CONTROLS[1:], controlled)):
        for control, selections in trace_controls(_all_layers(subject, sample), subject.num_experts, controls):
            requests, offsets = local_consistency.shared_requests(
                selections=selections, num_experts=subject.num_experts
            )
            with ThreadPoolExecutor(available_cores()) as threads:
                running = [
                    threads.submit(_shared_cache, subject, sample, control, one, requests, offsets) for one in wanted
                ]
                rows += [row for one in running for row in one.result()]
    return rows


def _all_layers(subject: Subject, sample: Sample) -> NDArray[np.int16]:
    """(layers, sequences, tokens, k) of a sample that is held at once, -1 = none and behind every sequence."""
    lengths = sample.block.lengths
    kept = np.arange(int(lengths.max(initial=0))) < lengths[:, None]
    layers = [sample.ids(axis) for axis in range(len(subject.run.layers))]
    held = np.full((len(layers), *kept.shape, max(ids.shape[1] for ids in layers)), -1, np.int16)
    for axis, ids in enumerate(layers):
        held[axis, ..., : ids.shape[1]][kept] = ids
    return held


def _shared_cache(
    subject: Subject,
    sample: Sample,
    control: str,
    policy: Policy,
    requests: NDArray[np.int32],
    offsets: NDArray[np.int64],
) -> Rows:
    """Rows of one policy; with intervals, over sequences, for the observed trace."""
    sequences = len(offsets) - 1
    sums = HitSums.zeros(sequences, len(subject.run.layers) * subject.num_experts)
    sums.add(requests=requests, offsets=offsets, group=np.arange(sequences), policy=policy[0], segment_length=policy[1])
    weights = resampled(sums.weights > 0) if control == "observed" else np.ones((1, sequences))
    at = _thinned(sums.hits.shape[1])
    curves = ratio(weights @ sums.hits[:, at], (weights @ sums.weights)[:, None])
    return _curve(at, curves, _place(sample, control, policy, shared=True))


def _ranged(curves: Curve, place: dict[str, Any]) -> Rows:
    at = _thinned(curves.shape[1])
    return _curve(at, curves[:, at], place)


def _thinned(sizes: int) -> NDArray[np.int64]:
    """Entries of a curve that are stored; entry c - 1 belongs to c slots."""
    return np.unique(np.linspace(0, sizes - 1, min(sizes, MAX_SIZES)).round().astype(np.int64))


def _curve(at: NDArray[np.int64], curves: Curve, place: dict[str, Any]) -> Rows:
    """Rows of a curve at some sizes, (1 + resamples, sizes), with its interval; the estimate alone has none."""
    rows = [
        {**place, "at": float(size + 1), "value": value} for size, value in zip(at, curves[0].tolist(), strict=True)
    ]
    if len(curves) > 1:
        ends = interval(estimate=curves[0], resampled=curves[1:], confidence=CONFIDENCE, rule="basic")
        for row, low, high in zip(rows, *(end.tolist() for end in ends), strict=True):
            row |= {"low": low, "high": high}
    return rows
