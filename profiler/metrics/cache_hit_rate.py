"""SCH, segment cache best hit rate, and LRU, LFU and Belady in the same harness: what an expert cache of any size
hits.

Source: "Not all models suit expert offloading" (arXiv 2505.16056), section 2.3 and its published code. Every sequence
starts with an empty cache. Conventions:

"reference" reproduces the published code for every cache size. The k experts of a token are looked up together, then
    served in descending weight, each evicting the cached expert of smallest priority, which may be one of the same
    token; the segment of SCH is the rest of the token itself and m - 1 tokens after it (so m = 1 is exactly LRU); a
    shared cache looks up the experts of all layers of a token together; the hit rate is the mean over sequences.
"clean" changes four things. An expert that the step needs is not evicted before the step is over, which is how
engines
    work and makes Belady optimal from k slots on; the segment is the m tokens after this one, as the paper says; a
    shared cache takes one layer after another; and the hit rate is total hits over total requests, so that a long
    sequence weighs more than a short one.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from moescope.errors import MetricError

from ._arrays import FloatArray, ratio
from ._intervals import Rule, check_bootstrap, interval, resample_weights
from ._trace import Trace, available_cores, in_order, sequence_runs

CachePolicy = Literal["sch", "lru", "lfu", "belady"]
Convention = Literal["reference", "clean"]
_TASK_REQUESTS = 1 << 20  # requests that one task of a thread takes: 8 MiB of ids and depths


@dataclass(frozen=True)
class HitRateInterval:
    """Hit rates with a bootstrap interval over sequences; the ends have the shape of ``estimate``."""

    estimate: FloatArray
    lower: FloatArray
    upper: FloatArray
    confidence: float
    rule: Rule
    num_resamples: int


@dataclass(frozen=True)
class _Replay:
    """One trace and how to replay it."""

    trace: Trace
    policy: CachePolicy
    segment_length: int
    shared: bool
    compulsory_free: bool
    convention: Convention

    @property
    def caches(self) -> int:
        return 1 if self.shared else self.trace.num_layers

    @property
    def sizes(self) -> int:
        """Objects, hence cache sizes, of one cache."""
        return self.trace.num_experts * (self.trace.num_layers if self.shared else 1)


def hit_rate_curve(
    *,
    selections: NDArray[Any],
    num_experts: int,
    policy: CachePolicy,
    segment_length: int | None = None,
    shared: bool = False,
    compulsory_free: bool = True,
    convention: Convention = "reference",
    per_sequence: bool = False,
) -> FloatArray:
    """Share of expert requests that a cache answers, for every cache size at once; 0..1.

    Args:
        selections: int (layers, sequences, tokens, k) in descending weight, -1 = none, padding at the end of a
        sequence. num_experts: E, experts per layer. policy: which expert goes: "lru" the one used longest ago, "lfu"
        the one used least so far in the sequence, "sch"
            the one used least in the segment ahead (ties: longest ago), "belady" the one needed again last.
        segment_length: m of "sch", in tokens, from 1; None for the others.
        shared: one cache for all layers, where layer l's expert e is object l * E + e, instead of one per layer.
        compulsory_free: count the first use of an expert as a hit while the cache is not yet full, as the published
        code
            does; then E slots always read 1. False: a first use is a miss, as in an engine that starts cold.
        convention: "reference" or "clean"; see the module's text.
        per_sequence: one curve per sequence in front; NaN for a sequence without requests.

    Returns:
        (layers, E): [l, c - 1] is the hit rate of c slots in layer l; shared: (layers * E,). With ``per_sequence``:
        (sequences, layers, E) or (sequences, layers * E). A layer without any request is NaN.

    Raises:
        MetricError: selections out of shape or range, an unknown policy, or a segment length that is missing or
        below 1.
    """
    trace = Trace.of(selections, num_experts)
    replay = _replay(trace, policy, segment_length, shared, compulsory_free, convention)
    if per_sequence:
        curves = np.full((len(trace.lengths), replay.caches, replay.sizes), np.nan)
        for first, cache, hits, weight in _parts(replay):
            curves[first : first + len(hits), cache] = ratio(hits, weight[:, None])
        return curves[:, 0] if shared else curves
    totals, weights = np.zeros((replay.caches, replay.sizes)), np.zeros((replay.caches, 1))
    for _, cache, hits, weight in _parts(replay):
        totals[cache] += hits.sum(axis=0)
        weights[cache] += weight.sum()
    curve = ratio(totals, weights)
    return curve[0] if shared else curve


def hit_rate_bootstrap(
    *,
    selections: NDArray[Any],
    num_experts: int,
    policy: CachePolicy,
    segment_length: int | None = None,
    shared: bool = False,
    compulsory_free: bool = True,
    convention: Convention = "reference",
    num_resamples: int = 1000,
    confidence: float = 0.95,
    rule: Rule = "basic",
    seed: int = 0,
) -> HitRateInterval:
    """``hit_rate_curve`` with an interval from resampling whole sequences.

    Args as ``hit_rate_curve``, and:
        rule: "basic" (the published code's, reversed) or "percentile"; docs/metrics.md says how they differ.
        seed: of the resampling; the same seed draws the same sequences for every policy.

    Raises:
        MetricError: as ``hit_rate_curve``; fewer than 2 resamples, or a confidence outside 0..1.
    """
    check_bootstrap(num_resamples=num_resamples, confidence=confidence, rule=rule)
    trace = Trace.of(selections, num_experts)
    replay = _replay(trace, policy, segment_length, shared, compulsory_free, convention)
    real = trace.lengths > 0
    drawn = np.zeros((num_resamples, len(real)))
    drawn[:, real] = resample_weights(num_sequences=int(real.sum()), num_resamples=num_resamples, seed=seed)
    # the estimate is one more row: every sequence once
    drawn = np.concatenate([np.ones((1, len(real))), drawn])
    totals = np.zeros((len(drawn), replay.caches, replay.sizes))
    weights = np.zeros((len(drawn), replay.caches, 1))
    for first, cache, hits, weight in _parts(replay):
        part = drawn[:, first : first + len(hits)]
        totals[:, cache] += part @ hits
        weights[:, cache, 0] += part @ weight
    curves = ratio(totals, weights)
    curves = curves[:, 0] if shared else curves
    lower, upper = interval(estimate=curves[0], resampled=curves[1:], confidence=confidence, rule=rule)
    return HitRateInterval(curves[0], lower, upper, confidence, rule, num_resamples)


@dataclass(frozen=True)
class HitSums:
    """What the curve of one cache is computed from, by group of sequences: hits (groups, sizes), weights (groups,).

    The curve is the sum of hits over the sum of weights; a sequence has weight 1 (the published code's mean over
    sequences). Sequences are added one after the other, so that a trace read in blocks gives the same sums to the last
    bit as one held whole.
    """

    hits: FloatArray
    weights: FloatArray

    @classmethod
    def zeros(cls, groups: int, sizes: int) -> HitSums:
        """Sums of nothing; sizes: objects that the cache may hold, hence cache sizes."""
        return cls(np.zeros((groups, sizes)), np.zeros(groups))

    def add(
        self,
        *,
        requests: NDArray[Any],
        offsets: NDArray[np.int64],
        group: NDArray[np.int64],
        policy: CachePolicy,
        segment_length: int | None = None,
    ) -> None:
        """Replay sequences, in the conventions of the published code.

        Args:
            requests: int (tokens, width) in descending weight, sequence after sequence; -1 = none.
            offsets: (sequences + 1,) first token of each sequence.
            group: (sequences,) the group of each.
            policy, segment_length: as :func:`hit_rate_curve`.

        Raises:
            MetricError: an object that the cache cannot hold; otherwise as :func:`hit_rate_curve`.
        """
        _require_policy(policy, segment_length)
        sizes = self.hits.shape[1]
        low, high = int(requests.min(initial=-1)), int(requests.max(initial=-1))
        if low < -1 or high >= sizes:
            raise MetricError(
                f"requests name objects {low} to {high}; the cache has {sizes}, numbered from 0, -1 = none"
            )
        cost = offsets * requests.shape[1] + np.arange(len(offsets)) * sizes

        def replay(part: tuple[int, int]) -> tuple[int, FloatArray, FloatArray]:
            first, last = part
            asked = np.ascontiguousarray(requests[offsets[first] : offsets[last]], np.int32)
            within = offsets[first : last + 1] - offsets[first]
            return first, *_sequence_rates(asked, within, sizes, policy, segment_length or 1)

        for first, hits, weights in in_order(replay, sequence_runs(cost, _TASK_REQUESTS)):
            owner = group[first : first + len(hits)]
            np.add.at(self.hits, owner, hits)
            np.add.at(self.weights, owner, weights)


def shared_requests(*, selections: NDArray[Any], num_experts: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """What a cache that all layers share is asked for: (tokens, layers * k), and where each sequence begins.

    Args as :func:`hit_rate_curve`. Layer l's expert e is object l * E + e.
    """
    trace = Trace.of(selections, num_experts)
    replay = _Replay(trace, "lru", 1, shared=True, compulsory_free=True, convention="reference")
    return _requests(replay, 0, len(trace.lengths), 0)[0], trace.offsets


def slots_at_ratio(*, ratio: float, top_k: int, num_layers: int = 1) -> int:
    """Slots of a cache that holds ``ratio`` (paper: rho) times what a token uses in the layers that share it."""
    return max(1, round(ratio * top_k * num_layers))


def _replay(
    trace: Trace, policy: str, segment_length: int | None, shared: bool, compulsory_free: bool, convention: str
) -> _Replay:
    """Checked settings."""
    if convention not in get_args(Convention):
        raise MetricError(f"convention is {convention!r}; choose one of {', '.join(get_args(Convention))}")
    _require_policy(policy, segment_length)
    if not trace.lengths.any():
        raise MetricError("selections holds no token that uses an expert; there is nothing to replay")
    return _Replay(trace, policy, segment_length or 1, shared, compulsory_free, convention)  # type: ignore[arg-type]


def _require_policy(policy: str, segment_length: int | None) -> None:
    if policy not in get_args(CachePolicy):
        raise MetricError(f"policy is {policy!r}; choose one of {', '.join(get_args(CachePolicy))}")
    if policy == "sch" and (segment_length is None or segment_length < 1):
        raise MetricError(f"segment_length is {segment_length}; policy 'sch' takes a number of tokens from 1")
    if policy != "sch" and segment_length is not None:
        raise MetricError(
            f"segment_length is {segment_length}, but policy {policy!r} looks at no segment: leave it out"
        )


def _parts(replay: _Replay) -> Iterator[tuple[int, int, FloatArray, FloatArray]]:
    """Replay the trace in parts: yield (first sequence, cache, hits (sequences, sizes), weight (sequences,)).

    The hit rate is the sum of the hits over the sum of the weights. "reference": each sequence's hit rate, weight 1.
    """
    width = replay.trace.top_k * (replay.trace.num_layers if replay.shared else 1)
    tasks = [
        (low, high, cache)
        for low, high in sequence_runs(replay.trace.offsets, max(1, _TASK_REQUESTS // width))
        for cache in range(replay.caches)
    ]
    with ThreadPoolExecutor(available_cores()) as threads:
        yield from threads.map(lambda task: _replay_part(replay, *task), tasks)


def _replay_part(replay: _Replay, low: int, high: int, cache: int) -> tuple[int, int, FloatArray, FloatArray]:
    """One part: sequences low..high-1 through one cache."""
    from ._stack import Policy, hit_histograms, request_depths

    requests, steps_per_token = _requests(replay, low, high, cache)
    offsets = (replay.trace.offsets[low : high + 1] - replay.trace.offsets[low]) * steps_per_token
    clean = replay.convention == "clean"
    window = replay.segment_length * steps_per_token + 1 if clean else replay.segment_length
    depths = np.empty_like(requests)
    policy = Policy[replay.policy.upper()]
    request_depths(requests, offsets, replay.sizes, int(policy), window, clean, depths)

    histogram, asked = hit_histograms(depths, offsets, replay.sizes, replay.compulsory_free)
    hits = np.cumsum(histogram, axis=1, dtype=np.float64)
    if clean:
        return low, cache, hits, asked.astype(np.float64)
    return low, cache, *_rates(hits, asked)


def _sequence_rates(
    requests: NDArray[np.int32], offsets: NDArray[np.int64], sizes: int, policy: str, window: int
) -> tuple[FloatArray, FloatArray]:
    """Hit rates of sequences at every size, (sequences, sizes), and their weights, (sequences,): "reference"."""
    from ._stack import Policy, hit_histograms, request_depths

    depths = np.empty_like(requests)
    request_depths(requests, offsets, sizes, int(Policy[policy.upper()]), window, False, depths)
    histogram, asked = hit_histograms(depths, offsets, sizes, True)
    return _rates(np.cumsum(histogram, axis=1, dtype=np.float64), asked)


def _rates(hits: FloatArray, asked: NDArray[np.int64]) -> tuple[FloatArray, FloatArray]:
    """Each sequence's hit rate, with weight 1 where it asks for anything."""
    return ratio(hits, asked[:, None], empty=0.0), (asked > 0).astype(np.float64)


def _requests(replay: _Replay, low: int, high: int, cache: int) -> tuple[NDArray[np.int32], int]:
    """The requests of sequences low..high-1 to one cache, (steps, width), and the number of steps per token."""
    trace, kept = replay.trace, replay.trace.kept[low:high]
    if not replay.shared:
        return np.ascontiguousarray(trace.selections[cache, low:high][kept], dtype=np.int32), 1
    ids = trace.selections[:, low:high][:, kept].astype(np.int32)  # shape: (layers, tokens, k)
    ids += np.where(ids >= 0, np.arange(trace.num_layers, dtype=np.int32)[:, None, None] * trace.num_experts, 0)
    tokens = np.ascontiguousarray(ids.transpose(1, 0, 2))
    if replay.convention == "clean":
        return tokens.reshape(-1, trace.top_k), trace.num_layers
    return tokens.reshape(len(tokens), -1), 1
