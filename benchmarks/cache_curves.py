"""Hit curves of every cache size for 1,000,000 layer-steps: LRU and min_set, per layer and shared, and the split.

    python -m benchmarks.cache_curves [--tokens 20834] [--core 0]

A synthetic trace of 48 layers x 128 experts x top-8: logits that keep part of their value from token to token (AR(1)),
and a standing popularity. Everything on one core. Bound: the full LRU and min_set curves per layer in 10 s together.
Compilation is timed apart, on an empty cache of numba; installed, it happens once. Baseline, in the same run: one size
of LRU in plain Python, for part of the tokens.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

LAYERS, EXPERTS, K = 48, 128, 8
KEPT, POPULARITY = 0.66, 0.83  # tuned to 50 % reuse, and 76.5 % of uses for the top quarter of the experts
LIMIT, SPLIT_LIMIT = 10.0, 0.08


def synthetic(tokens: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.int16]]:
    """Selections (layers, 1, tokens, k)."""
    generator = np.random.default_rng(seed)
    popular = POPULARITY * generator.standard_normal((LAYERS, EXPERTS), np.float32)
    state = generator.standard_normal((LAYERS, EXPERTS), np.float32)
    selections = np.empty((LAYERS, 1, tokens, K), np.int16)
    for token in range(tokens):
        state = KEPT * state + np.sqrt(1 - KEPT**2) * generator.standard_normal((LAYERS, EXPERTS), np.float32)
        logits = state + popular
        chosen = np.argpartition(-logits, K, axis=1)[:, :K]
        order = np.argsort(-np.take_along_axis(logits, chosen, axis=1), axis=1)
        selections[:, 0, token] = np.take_along_axis(chosen, order, axis=1)
    return selections


def described(selections: np.ndarray[Any, np.dtype[np.int16]]) -> str:
    """Reuse of the token before, and what the top quarter of the experts gets."""
    ids = selections[:, 0].astype(np.int64)
    reused = (ids[:, 1:, :, None] == ids[:, :-1, None, :]).any(axis=3).mean()
    counts = np.stack([np.bincount(layer.ravel(), minlength=EXPERTS) for layer in ids])
    top = -np.sort(-counts, axis=1)[:, : EXPERTS // 4].sum() / counts.sum()
    return f"{reused:.1%} of a token's experts are those of the token before; the top quarter has {top:.1%} of the uses"


def plain_lru(selections: np.ndarray[Any, np.dtype[np.int16]], slots: int) -> float:
    """Miss rate of one size, one step after another."""
    misses = 0
    for layer in selections[:, 0].tolist():
        resident: OrderedDict[int, None] = OrderedDict()
        for step in layer:
            misses += sum(one not in resident for one in step)
            for one in step:
                resident[one] = None
                resident.move_to_end(one)
            while len(resident) > slots:
                resident.popitem(last=False)
    return misses / selections.size


def timed(name: str, work: Callable[[], Any], *, limit: float | None = None) -> tuple[float, Any]:
    """Processor seconds, printed."""
    began = time.process_time()
    result = work()
    spent = time.process_time() - began
    over = "" if limit is None or spent <= limit else f"   OVER {limit:g} s"
    print(f"{name:44} {spent:7.2f} s{over}", flush=True)
    return spent, result


def main() -> None:
    """Print seconds, and check one size against plain Python."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_834)
    parser.add_argument("--core", type=int, default=0)
    options = parser.parse_args()
    os.sched_setaffinity(0, {options.core})
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NUMBA_CACHE_DIR"] = folder
        measure(options.tokens)


def measure(tokens: int) -> None:
    """Everything, on this core."""
    from planner.simulate.bounds import BOUNDS, bounds
    from planner.simulate.curves import curve
    from planner.simulate.split import split
    from planner.simulate.workload import decode

    selections = synthetic(tokens)
    print(f"{tokens:,} tokens x {LAYERS} layers = {tokens * LAYERS:,} layer-steps; {described(selections)}")
    work = decode(selections=selections, num_experts=EXPERTS)
    small = decode(selections=selections[:, :, :4], num_experts=EXPERTS)
    compiling = timed("compile lru", lambda: curve(small, policy="lru"))[0]
    compiling += timed("compile min_set", lambda: bounds(small, names=["min_set"]))[0]
    seconds, lru = timed("lru, all sizes, per layer", lambda: curve(work, policy="lru"))
    more, optimal = timed("min_set, all sizes, per layer", lambda: bounds(work, names=["min_set"])["min_set"])
    seconds += more
    over = "" if seconds + compiling <= LIMIT else f"   OVER {LIMIT:g} s"
    print(f"{'both':44} {seconds:7.2f} s; with compilation {seconds + compiling:.2f} s{over}")
    timed("compile the other kernels", lambda: (bounds(small), curve(small, policy="lfu")))
    timed("lfu, all sizes, per layer", lambda: curve(work, policy="lfu"))
    for name in BOUNDS[1:]:
        timed(f"{name}, all sizes, per layer", lambda name=name: bounds(work, names=[name]))  # type: ignore[misc]
    timed("lru, all sizes, shared", lambda: curve(work, policy="lru", shared=True))
    for name in BOUNDS:
        timed(f"{name}, all sizes, shared", lambda name=name: bounds(work, names=[name], shared=True))  # type: ignore[misc]
    timed("lfu, all sizes, shared", lambda: curve(work, policy="lfu", shared=True))
    timed("split of 1536 slots", lambda: split(lru, slots=1536), limit=SPLIT_LIMIT)
    rates = "  ".join(
        f"{slots}: {1 - lru.rates()[slots - 1]:.4f} / {1 - optimal.rates()[slots - 1]:.4f}" for slots in (8, 16, 32, 64)
    )
    print(f"miss rates by slots, lru / min_set: {rates}")
    part = min(tokens, 1000)
    spent, expected = timed(
        f"one size of lru in plain Python, {part:,} tokens", lambda: plain_lru(selections[:, :, :part], 32)
    )
    found = 1 - curve(decode(selections=selections[:, :, :part], num_experts=EXPERTS), policy="lru").rates()[31]
    print(f"  {spent * tokens / part:.1f} s for all tokens; miss rate {expected:.6f}, from the curve {found:.6f}")


if __name__ == "__main__":
    main()
