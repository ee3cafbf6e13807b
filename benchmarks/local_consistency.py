"""How long SRP and every cache curve take, against a plain implementation of the published algorithms.

    python benchmarks/local_consistency.py                                     timings on a synthetic trace
    python benchmarks/local_consistency.py --trace T.npz --expect T.json       differences from known values

The synthetic trace has 16 layers x 64 experts x top-8 x 196 sequences of 512 tokens, with sticky routing. The baseline
runs in the same process on a few layers or sequences and is scaled up by their number; its results must equal ours.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from profiler.metrics.controls import shuffle_within_sequences
from profiler.metrics.local_consistency import (
    CachePolicy,
    Scope,
    hit_rate_bootstrap,
    hit_rate_curve,
    srp_bootstrap_table,
    srp_table,
)

SEGMENT_LENGTHS = (4, 16, 64, 256)
SCOPES: tuple[Scope, ...] = ("model", "layer", "expert")
RESAMPLES = 1000
SRP = "SRP, 4 segment lengths, by model, layer and expert"
SRP_INTERVALS = f"the same with intervals of {RESAMPLES} resamples"
LAYER_CURVES = "SCH x 4, LRU, LFU, Belady, one cache per layer"
SHARED_CURVES = "SCH x 4, LRU, LFU, Belady, one cache for all layers"
CURVES: list[tuple[CachePolicy, int | None]] = [
    *(("sch", length) for length in SEGMENT_LENGTHS),
    ("lru", None),
    ("lfu", None),
    ("belady", None),
]
Ids = NDArray[np.int16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="npz with experts (tokens, layers, k) and offsets (sequences + 1)")
    parser.add_argument("--expect", type=Path, help="JSON with the values to meet")
    parser.add_argument("--sequences", type=int, default=196, help="sequences of 512 tokens of the synthetic trace")
    parser.add_argument("--baseline-parts", type=int, default=2, help="parts the baseline runs on; 0 = none")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args()
    if arguments.trace:
        figures = compare(read_trace(arguments.trace), json.loads(arguments.expect.read_text()))
    else:
        figures = measure(sticky_trace(num_sequences=arguments.sequences), 64, arguments.baseline_parts)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def read_trace(path: Path) -> Ids:
    """The npz as selections (layers, sequences, tokens, k), padded with -1."""
    with np.load(path) as archive:
        experts, offsets = archive["experts"].astype(np.int16), archive["offsets"]
    lengths = np.diff(offsets)
    selections = np.full((experts.shape[1], len(lengths), lengths.max(), experts.shape[2]), -1, dtype=np.int16)
    for sequence, (start, length) in enumerate(zip(offsets, lengths, strict=False)):
        selections[:, sequence, :length] = experts[start : start + length].swapaxes(0, 1)
    return selections


def sticky_trace(*, num_sequences: int, layers: int = 16, num_experts: int = 64, top_k: int = 8, seed: int = 7) -> Ids:
    """Selections whose router scores wander slowly along each sequence, around a popularity of the experts."""
    generator = np.random.default_rng(seed)
    selections = np.empty((layers, num_sequences, 512, top_k), dtype=np.int16)
    for layer in selections:
        popularity = generator.normal(0.0, 0.5, num_experts)
        state = generator.normal(size=(num_sequences, num_experts))
        for token in range(512):
            state = 0.98 * state + 0.2 * generator.normal(size=state.shape)
            scores = popularity + state + 0.5 * generator.normal(size=state.shape)
            layer[:, token] = np.argsort(-scores, axis=1)[:, :top_k]
    return selections


def compare(selections: Ids, expected: dict[str, Any]) -> dict[str, float]:
    """Differences between the metrics of a trace and known values of it."""
    num_experts = len(expected["selections"][0])
    lengths = [int(length) for length in expected["srp_model"]]
    figures: dict[str, float] = {}

    counts = [np.bincount(layer[layer >= 0], minlength=num_experts) for layer in selections]
    figures["selections, largest difference"] = float(np.abs(np.array(counts) - expected["selections"]).max())
    table = srp_table(selections=selections, num_experts=num_experts, segment_lengths=lengths, scopes=["model"])
    for length in lengths:
        ours = table[length, "model"]
        pairs = zip((ours.value, ours.router_size, ours.threshold), expected["srp_model"][str(length)], strict=True)
        figures[f"SRP m={length}, difference of value, size, threshold"] = max(abs(float(a) - b) for a, b in pairs)
    figures |= compare_lru(selections, num_experts, expected, "lru_hit_rate_per_layer", "LRU")

    shuffled = shuffle_within_sequences(selections=selections, num_experts=num_experts, seed=0)
    table = srp_table(selections=shuffled, num_experts=num_experts, segment_lengths=lengths, scopes=["model"])
    for length in lengths:
        value = expected["srp_model_shuffled_in_sequence"][str(length)][0]
        figures[f"SRP m={length}, shuffled (another order)"] = abs(float(table[length, "model"].value) - value)
    figures |= compare_lru(
        shuffled, num_experts, expected, "lru_hit_rate_per_layer_shuffled", "LRU shuffled (another order)"
    )
    for name, difference in figures.items():
        print(f"{name:60s} {difference:.2e}")
    return figures


def compare_lru(selections: Ids, num_experts: int, expected: dict[str, Any], key: str, name: str) -> dict[str, float]:
    """Largest difference of the LRU hit rate over the layers given, per cache size."""
    curve = hit_rate_curve(selections=selections[expected["lru_layers"]], num_experts=num_experts, policy="lru")
    return {
        f"{name} at {slots} slots, largest difference": float(np.abs(curve[:, int(slots) - 1] - values).max())
        for slots, values in expected[key].items()
    }


def measure(selections: Ids, num_experts: int, baseline_parts: int) -> dict[str, float]:
    """Wall and CPU seconds of everything on one trace, and the ratio to the baseline."""
    layers, sequences, tokens, top_k = selections.shape
    print(f"{layers} layers x {num_experts} experts x top-{top_k} x {sequences * tokens:,} tokens")
    trace: dict[str, Any] = {"selections": selections, "num_experts": num_experts}
    small: dict[str, Any] = {"selections": selections[:2, :2, :32], "num_experts": num_experts}
    lengths: dict[str, Any] = {"segment_lengths": SEGMENT_LENGTHS, "scopes": SCOPES}
    figures: dict[str, float] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        figures[f"{name}, wall s"] = time.perf_counter() - wall
        figures[f"{name}, cpu s"] = time.process_time() - cpu
        print(f"{name:60s} {figures[f'{name}, wall s']:7.2f} s wall {figures[f'{name}, cpu s']:7.2f} s CPU", flush=True)

    def curves(shared: bool) -> None:
        for policy, length in CURVES:
            hit_rate_curve(**trace, policy=policy, segment_length=length, shared=shared)

    timed("load compiled code (compiles on the first run ever)", lambda: hit_rate_curve(**small, policy="lru"))
    timed(SRP, lambda: srp_table(**trace, **lengths))
    timed(SRP_INTERVALS, lambda: srp_bootstrap_table(**trace, **lengths, num_resamples=RESAMPLES))
    timed(LAYER_CURVES, lambda: curves(False))
    timed(SHARED_CURVES, lambda: curves(True))
    total = {unit: sum(value for name, value in figures.items() if name.endswith(unit)) for unit in ("wall s", "cpu s")}
    figures |= {f"everything, {unit}": value for unit, value in total.items()}
    print(f"{'everything':60s} {total['wall s']:7.2f} s wall {total['cpu s']:7.2f} s CPU")
    timed(
        "for the record: SCH of 16 tokens with 1000 resamples",
        lambda: hit_rate_bootstrap(**trace, policy="sch", segment_length=16),
    )
    if baseline_parts:
        figures |= measure_baseline(selections, num_experts, baseline_parts, figures)
    return figures


def measure_baseline(selections: Ids, num_experts: int, count: int, figures: dict[str, float]) -> dict[str, float]:
    """CPU seconds of the plain implementation, scaled from ``count`` parts to the whole trace, over ours."""
    layers, sequences = selections.shape[:2]
    some_layers = [selections[layer] for layer in range(count)]
    some_sequences = [selections[:, [sequence * (sequences // count)]] for sequence in range(count)]
    times = {
        SRP_INTERVALS: [seconds(plain_srp, our_srp, part, num_experts) * layers for part in some_layers],
        LAYER_CURVES: [
            seconds(plain_curves, our_curves, part[:1], num_experts) * layers * sequences for part in some_sequences
        ],
        SHARED_CURVES: [seconds(plain_curves, our_curves, part, num_experts) * sequences for part in some_sequences],
    }
    result = {}
    for name, scaled in times.items():
        ratios = [one / figures[f"{name}, cpu s"] for one in scaled]
        print(
            f"plain implementation: {name:60s} {np.mean(scaled):7,.0f} s CPU, scaled up from {count} parts;"
            f" {np.mean(ratios):,.0f} times ours ({min(ratios):,.0f} to {max(ratios):,.0f})"
        )
        result[f"{name}, plain over ours"] = float(np.mean(ratios))
    return result


Values = list[NDArray[np.float64]]


def seconds(
    plain: Callable[[Ids, int], Values], ours: Callable[[Ids, int], Values], part: Ids, num_experts: int
) -> float:
    """CPU seconds of the plain implementation; its values must be ours."""
    start = time.process_time()
    values = plain(part, num_experts)
    taken = time.process_time() - start
    for theirs, mine in zip(values, ours(part, num_experts), strict=True):
        np.testing.assert_allclose(theirs, mine, atol=1e-12)
    return taken


def our_srp(layer: Ids, num_experts: int) -> Values:
    """SRP of every expert of one layer, per segment length."""
    table = srp_table(selections=layer[None], num_experts=num_experts, segment_lengths=SEGMENT_LENGTHS)
    return [table[length, "expert"].value[0] for length in SEGMENT_LENGTHS]


def our_curves(selections: Ids, num_experts: int) -> Values:
    """Every curve of one cache for all layers."""
    trace: dict[str, Any] = {"selections": selections, "num_experts": num_experts, "shared": True}
    return [hit_rate_curve(**trace, policy=policy, segment_length=length) for policy, length in CURVES]


def plain_srp(layer: Ids, num_experts: int) -> Values:
    """The published way for one layer: windows by doubling, one histogram per expert and sequence, integer products."""
    mask = np.zeros((*layer.shape[:2], num_experts), dtype=np.int16)
    np.put_along_axis(mask, layer.astype(np.int64), 1, axis=2)
    weights = np.random.default_rng(0).multinomial(len(layer), [1 / len(layer)] * len(layer), size=RESAMPLES)
    weights = np.concatenate([np.ones((1, len(layer)), dtype=np.int64), weights])
    values = []
    counts, length = mask, 1
    while length < SEGMENT_LENGTHS[-1]:
        counts, length = counts[:, :-length] + counts[:, length:], 2 * length
        if length in SEGMENT_LENGTHS:
            best = [plain_f1(counts[..., expert], length, weights).max(axis=1) for expert in range(num_experts)]
            values.append(np.stack(best, axis=1)[0])
    return values


def plain_f1(counts: Ids, length: int, weights: NDArray[np.int64]) -> NDArray[np.float64]:
    """F1 of every resample and threshold for one expert; counts (sequences, windows)."""
    histogram = np.zeros((len(counts), length + 1), dtype=np.int64)
    np.add.at(histogram, (np.arange(len(counts))[:, None], counts), 1)
    resampled = weights @ histogram  # integers: not a BLAS product
    hits = np.cumsum((resampled * np.arange(length + 1))[:, ::-1], axis=-1)[:, ::-1]
    kept = length * np.cumsum(resampled[:, ::-1], axis=-1)[:, ::-1]
    f1: NDArray[np.float64] = 2 * hits / np.maximum(1, kept + hits[:, :1])
    return f1


def plain_curves(selections: Ids, num_experts: int) -> Values:
    """Every curve of one sequence by a stack in plain Python, one cache for all layers; (layers, 1, tokens, k)."""
    layers, _, tokens, _ = selections.shape
    ids = selections[:, 0].astype(int) + np.arange(layers)[:, None, None] * num_experts
    stream = ids.swapaxes(0, 1).reshape(tokens, -1).tolist()
    hits = [plain_stack(stream, layers * num_experts, policy, length or 1) for policy, length in CURVES]
    return [np.array(one) / (tokens * len(stream[0])) for one in hits]


def plain_stack(stream: list[list[int]], objects: int, policy: str, window: int) -> list[int]:
    """Hits for every cache size of one sequence, one access after another."""
    flat = [item for step in stream for item in step]
    following: list[int] = [0] * len(flat)
    last: dict[int, int] = {}
    for time_, item in reversed(list(enumerate(flat))):
        following[time_] = last.get(item, len(flat) + item)
        last[item] = time_
    ahead = [0] * objects
    for step in stream[:window]:
        for item in step:
            ahead[item] += 1
    stack: list[int] = []
    priority: dict[int, tuple[int, int]] = {}
    histogram = [0] * objects
    used = [0] * objects
    now = 0
    for index, step in enumerate(stream):
        unseen = len(stack)
        for item in step:
            if item in priority:
                histogram[stack.index(item)] += 1
            else:
                histogram[unseen] += 1
                unseen += 1
        for item in step:
            end = stack.index(item) if item in priority else len(stack)
            if end == len(stack):
                stack.append(item)
            carried = stack[0]
            for depth in range(1, end + 1):
                if depth == end or priority[stack[depth]] < priority[carried]:
                    stack[depth], carried = carried, stack[depth]
            stack[0] = item
            used[item] += 1
            ahead[item] -= 1
            key = {"sch": ahead[item], "lru": 0, "lfu": used[item], "belady": -following[now]}[policy]
            priority[item] = (key, now)
            now += 1
        for item in stream[index + window] if index + window < len(stream) else []:
            ahead[item] += 1
            if policy == "sch" and item in priority:
                priority[item] = (ahead[item], priority[item][1])
    hits: list[int] = np.cumsum(histogram).tolist()
    return hits


if __name__ == "__main__":
    main()
