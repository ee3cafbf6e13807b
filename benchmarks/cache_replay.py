"""One policy at one size on 1,000,000 layer-steps: seconds of every policy, per layer and shared.

    python -m benchmarks.cache_replay [--tokens 20834] [--core 0]
    python -m benchmarks.cache_replay --trace FILE.npz --experts E

The synthetic trace is that of ``cache_curves``: 48 layers x 128 experts x top-8. Everything on one core, processor
seconds, median of three. Bounds: twice what a C program of the same policy takes on such a machine (gcc -O3, one
thread). Compilation is timed apart, on an empty cache of numba; installed, it happens once. Baseline, in the same run:
LRU in plain Python, for part of the tokens.

With a trace (experts (tokens, layers, k), weights, offsets (sequences + 1,)): what each policy misses on the later half
of its sequences, what needs training having seen the first half.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.cache_curves import EXPERTS, K, described, plain_lru, synthetic

PER_LAYER, SHARED = (16, 32, 64), (768, 1536, 3072)
LIMITS: dict[tuple[str, bool], tuple[float, ...]] = {  # seconds of the C program, by slots
    ("lru", False): (0.34, 0.30, 0.18),
    ("lfu", False): (0.44, 0.51, 0.34),
    ("min_set", False): (0.48, 0.34, 0.20),
    ("lru", True): (0.17, 0.13, 0.09),
    ("min_set", True): (1.8, 1.1, 0.9),
    ("hobbit", True): (6.0, 6.0, 6.0),  # a scan of 1536 slots at every eviction took 6 to 17
}
ALONE = ("mixtral_offloading", "fate")  # caches per layer by their nature


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_834)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--experts", type=int, help="per layer of the trace")
    options = parser.parse_args()
    os.sched_setaffinity(0, {options.core})
    if options.trace:
        compare(options.trace, options.experts)
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NUMBA_CACHE_DIR"] = folder
        measure(options.tokens)


def seconds_of(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds, and the result."""
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def measure(tokens: int) -> None:
    """Every policy on the synthetic trace."""
    from planner.simulate.policies import POLICIES
    from planner.simulate.replay import replay
    from planner.simulate.workload import decode

    selections = synthetic(tokens)
    print(f"{selections.size // K:,} layer-steps; {described(selections)}")
    weights = -np.sort(-np.random.default_rng(1).random(selections.shape, np.float32), axis=-1)
    requests = 20
    shape = (selections.shape[0], requests, tokens // requests, K)
    ids, gates = (array[:, 0, : tokens // requests * requests].reshape(shape) for array in (selections, weights))
    work = decode(selections=ids, weights=gates, num_experts=EXPERTS)
    train, _ = work.halves()
    few = work.requests([0])
    compiling = 0.0
    print(f"{'policy':20} {'cache':9} {'slots':>5} {'missed':>8} {'seconds':>8} {'bound':>6}")
    for one in POLICIES:
        for shared in (False, True):
            if shared and one.name in ALONE:
                continue
            options: dict[str, Any] = {"policy": one.name, "shared": shared, "train": train if one.fitted else None}
            compiling += seconds_of(lambda options=options: replay(few, slots=400, **options))[0]  # type: ignore[misc]
            for place, slots in enumerate(SHARED if shared else PER_LAYER):
                runs = [seconds_of(lambda slots=slots, options=options: replay(work, slots=slots, **options))
                        for _ in range(3)]  # type: ignore[misc]  # fmt: skip
                spent, done = median(run[0] for run in runs), runs[0][1]
                limit = 2 * LIMITS[one.name, shared][place] if (one.name, shared) in LIMITS else None
                bound = "" if limit is None else f"{limit:6.2f}{'  OVER' if spent > limit else ''}"
                scope = "shared" if shared else "per layer"
                print(f"{one.name:20} {scope:9} {slots:5} {1 - done.hit_rate:8.4f} {spent:8.2f} {bound}", flush=True)
    spent, done = seconds_of(
        lambda: replay(work, policy="hobbit", slots=1024, shared=True, thresholds=(0.6, 0.9), narrow_slots=1024)
    )
    print(f"hobbit, shared, 1024 slots and 1024 narrow: {spent:.2f} s")
    print(f"compilation of all kernels, once: {compiling:.1f} s")
    part = min(tokens, 1000)
    spent, _ = seconds_of(lambda: plain_lru(selections[:, :, :part], 32))
    print(f"lru of 32 slots per layer in plain Python: {spent * tokens / part:.1f} s, from {part:,} tokens")


def compare(path: Path, experts: int) -> None:
    """Miss rates of every policy on the later half of a trace, at a quarter and a half of the experts."""
    from planner.simulate.policies import POLICIES
    from planner.simulate.policies.hobbit import fit_hobbit
    from planner.simulate.replay import replay
    from planner.simulate.workload import decode

    with np.load(path) as archive:
        ids, gates, offsets = archive["experts"].astype(np.int16), archive["weights"], archive["offsets"]
    lengths = np.diff(offsets)
    kept = np.arange(lengths.max()) < lengths[:, None]
    selections = np.full((ids.shape[1], *kept.shape, ids.shape[2]), -1, np.int16)
    weights = np.zeros(selections.shape, np.float32)
    selections[:, kept], weights[:, kept] = ids.swapaxes(0, 1), gates.swapaxes(0, 1)
    whole = decode(selections=selections, weights=weights, num_experts=experts)
    train, work = whole.halves()
    sizes = (experts // 4, experts // 2)
    print(
        f"{work.num_passes:,} tokens; missed at " + ", ".join(f"{size} and {size * whole.num_layers}" for size in sizes)
    )
    fitted = {shared: [fit_hobbit(train, slots=size * (whole.num_layers if shared else 1), shared=shared)
                       for size in sizes] for shared in (False, True)}  # fmt: skip
    for one in POLICIES:
        rates = []
        for shared in (False, True):
            for place, size in enumerate(sizes):
                if shared and one.name in ALONE:
                    rates.append("     -")
                    continue
                more = {"weights": fitted[shared][place]} if one.name == "hobbit" else {}
                slots = size * (whole.num_layers if shared else 1)
                done = replay(work, policy=one.name, slots=slots, shared=shared, train=train, **more)
                rates.append(f"{1 - done.hit_rate:.4f}")
        print(f"{one.name:20} per layer {rates[0]} {rates[1]}   shared {rates[2]} {rates[3]}", flush=True)
    print(f"HOBBIT's weights as fitted: per layer {fitted[False]}, shared {fitted[True]}")


if __name__ == "__main__":
    main()
