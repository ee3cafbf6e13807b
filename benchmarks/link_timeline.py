"""How long the clock of copies takes for a million steps, and what prefetching gives at several accuracies.

    python benchmarks/link_timeline.py                      a synthetic trace: 48 layers, 128 experts, 8 per token
    python benchmarks/link_timeline.py --json FILE          the figures as JSON as well

The trace is made of slowly moving scores: consecutive tokens share about half of their experts. Times are those of one
thread, best of ``--repeats``, without the compilation, which is measured apart.
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

from planner.machine import EFFICIENCY, Link
from planner.simulate.outcome import Outcome
from planner.simulate.timeline import StepCosts, Timeline, prefetching, timeline
from planner.simulate.workload import Workload, decode

EXPERT_BYTES = 3 * 2048 * 768 * 4.5 / 8
"""An expert of Qwen3-30B-A3B at 4.5 bits."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_834, help="passes; with 48 layers about a million steps")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--slots", type=int, default=32, help="per layer")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    ids = sticky(arguments.layers, arguments.tokens, arguments.experts, arguments.top_k)
    kept = np.mean([len(np.intersect1d(a, b)) for a, b in zip(ids[0, :500], ids[0, 1:501], strict=True)])
    work = decode(selections=ids[:, None], num_experts=arguments.experts)
    print(
        f"{ids.shape[0] * ids.shape[1]:,} steps; {kept / arguments.top_k:.0%} of a token's experts are the last one's"
    )
    figures = measure(work, ids, arguments.slots, arguments.repeats)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def measure(work: Workload, ids: NDArray[np.int16], slots: int, repeats: int) -> list[dict[str, Any]]:
    """Every row: what was timed, its seconds, and what it found."""
    shape = (work.num_layers, work.num_passes)
    costs = StepCosts(
        dense=np.full(shape, 80e-6), expert=np.full(shape, 12e-6), tail=np.zeros(shape[1]),
        size=np.full((shape[0], work.num_experts), EXPERT_BYTES), cpu=np.full(shape, 90e-6),
    )  # fmt: skip
    link = Link("pcie4x16", 31.5e9 * EFFICIENCY)
    part = work.requests([0])
    start = time.perf_counter()
    lru = prefetching(part, costs, predicted=None, slots=slots, link=link)
    print(f"first call, compilation included: {time.perf_counter() - start:.1f} s")
    zero = np.zeros((1, shape[0]), np.int64)
    outcome = Outcome("lru", slots * shape[0], zero, zero, zero, zero, 0, lru.missing.astype(np.uint16))
    rng = np.random.default_rng(1)
    cases: list[tuple[str, Callable[[], Timeline]]] = [
        ("times of a replay, experts over the link", lambda: timeline(work, outcome, costs, link=link)),
        ("times of a replay, best split with the CPU",
         lambda: timeline(work, outcome, costs, link=link, fallback="split")),
        ("no prefetching", lambda: prefetching(work, costs, predicted=None, slots=slots, link=link)),
        ("no prefetching, one shared cache",
         lambda: prefetching(work, costs, predicted=None, slots=slots * shape[0], link=link, shared=True)),
    ]  # fmt: skip
    for accuracy in (1.0, 0.9, 0.7):
        guess = np.where(rng.random(ids.shape) < accuracy, ids, rng.integers(0, work.num_experts, ids.shape))
        guess = guess.astype(np.int16)
        cases.append(
            (f"next layer prefetched, {accuracy:.0%} right",
             lambda guess=guess: prefetching(work, costs, predicted=guess, slots=slots, link=link))  # type: ignore[misc]
        )  # fmt: skip
    rows = []
    for name, run in cases:
        best, found = np.inf, None
        for _ in range(repeats):
            start = time.perf_counter()
            found = run()
            best = min(best, time.perf_counter() - start)
        assert found is not None
        rows.append(
            {"case": name, "seconds": best, "ms_per_token": found.ms_per_token, "resident_ms": found.resident_ms,
             "stalled": found.stalled_share, "hit_rate": found.hit_rate, "wasted_bytes": found.wasted_bytes}
        )  # fmt: skip
        print(
            f"{name:46} {best:6.2f} s   {found.ms_per_token:7.2f} ms/token (resident {found.resident_ms:.2f}),"
            f" {found.stalled_share:.0%} of steps stall"
        )
    return rows


def sticky(layers: int, tokens: int, experts: int, top_k: int, seed: int = 0) -> NDArray[np.int16]:
    """(layers, tokens, k) selections of scores that move slowly about a liking that all tokens share."""
    rng = np.random.default_rng(seed)
    liking = rng.normal(0, 0.7, (layers, experts)).astype(np.float32)
    state = rng.normal(0, 1, (layers, experts)).astype(np.float32)
    ids = np.empty((layers, tokens, top_k), np.int16)
    keep = np.float32(0.95)
    rest = np.sqrt(1 - keep**2)
    for at in range(tokens):
        state = keep * state + rest * rng.standard_normal((layers, experts), np.float32)
        scores = liking + state + 0.5 * rng.standard_normal((layers, experts), np.float32)
        ids[:, at] = np.argpartition(-scores, top_k, axis=1)[:, :top_k]
    return ids


if __name__ == "__main__":
    main()
