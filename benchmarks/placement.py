"""Seconds and balance of placements: EPLB at DeepSeek-V3's size, LPT with swaps against HiGHS, and a trace's own load.

    python -m benchmarks.placement [--rounds N] [--seconds S] [--trace FILE.npz --num-experts E] [--devices D]

EPLB: 58 layers x 256 experts into 288 slots on 32 devices, hierarchical (8 groups, 4 nodes) and global; bound 0.3 s.
Baseline: the published loop, item by item, in the same process. LPT with swaps: largest over mean load for E experts on
D devices, against ``scipy.optimize.milp`` given ``--seconds``. Transitions: pairs of adjacent layers of 4,000 tokens x
48 layers x 128 experts, top-8. A trace (the bundled run without ``--trace``) is split in halves by requests: placements
are made from the first and scored on the second, beside the contiguous map and uniformly random experts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import store
from planner.place import Placement, eplb
from planner.place.affinity import affinity
from planner.place.hecate import hecate
from planner.place.lpt import least_maximum, lpt, packed
from planner.place.methods import pass_loads
from planner.place.moetuner import moetuner, solve_clusters
from planner.place.pairs import coactivations, transitions
from planner.place.rebalance import balanced_packing
from planner.place.score import Score, balancedness, score
from planner.place.slots import contiguous
from planner.place.stream import uniform
from planner.place.verdict import sentence
from planner.place.windows import split
from planner.simulate.workload import Workload, decode, workload_of

ROOT = Path(__file__).parents[1]


def published_packing(weight: NDArray[np.float32], packs: int) -> NDArray[np.int64]:
    """The published loop: every item looks for the lightest pack that is not full."""
    rows, items = weight.shape
    result = np.zeros((rows, items), np.int64)
    for row in range(rows):
        total, held = [0.0] * packs, [0] * packs
        for item in np.argsort(-weight[row], kind="stable"):
            pack = min((one for one in range(packs) if held[one] < items // packs), key=total.__getitem__)
            result[row, item] = pack
            total[pack] += weight[row, item]
            held[pack] += 1
    return result


def timed(work: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Median and longest seconds."""
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), max(seconds)


def eplb_part(rounds: int) -> None:
    """EPLB at the size of DeepSeek-V3."""
    load = np.random.default_rng(0).lognormal(6, 1, (58, 256)).round()
    first = contiguous(num_layers=58, num_experts=256, devices=32)
    print("EPLB, 58 layers x 256 experts -> 288 slots on 32 devices; bound 0.3 s")
    print(f"  as they lie    balancedness {balancedness(first.load(load)).mean():.4f}")
    for name, groups, nodes in (("hierarchical", 8, 4), ("global", 1, 1)):
        ask = {"load": load, "num_replicas": 288, "num_groups": groups, "num_nodes": nodes, "num_gpus": 32}
        median, longest = timed(lambda: eplb(**ask), rounds)  # type: ignore[arg-type]  # noqa: B023
        placed = Placement(eplb(**ask).physical_to_logical, 256, 32, nodes)  # type: ignore[arg-type]
        print(f"  {name:14} {median:.4f} s ({longest:.4f})  balancedness {balancedness(placed.load(load)).mean():.4f}")
    each = np.random.default_rng(1).lognormal(6, 1, (58, 288)).astype(np.float32)
    slow, _ = timed(lambda: published_packing(each, 32), 1)
    fast, _ = timed(lambda: balanced_packing(each, 32), rounds)
    same = np.array_equal(published_packing(each, 32), balanced_packing(each, 32)[0])
    print(f"  packing alone  {fast:.4f} s, item by item {slow:.3f} s: {slow / fast:.0f} times; equal: {same}")


def lpt_part(rounds: int, seconds: float) -> None:
    """LPT, LPT with swaps, and HiGHS."""
    print(f"\nlargest over mean load, one layer; HiGHS gets {seconds:g} s")
    print(f"{'E, D':>8} {'bound':>9} {'LPT':>9} {'with swaps':>11} {'seconds':>9} {'HiGHS':>9} {'seconds':>9}")
    for experts, devices in ((8, 4), (64, 8), (128, 8), (256, 8)):
        load = np.random.default_rng(experts).lognormal(0, 0.9, (1, experts))
        mean = load.sum() / devices

        def most(device: NDArray[np.int64], load: NDArray[Any] = load, mean: float = mean) -> float:
            return float(np.bincount(device, weights=load[0]).max() / mean)

        start, _ = balanced_packing(load.astype(np.float32), devices)
        median, _ = timed(lambda: packed(load, devices), rounds)  # noqa: B023
        began = time.perf_counter()
        solved, _ = solve_clusters(load[0], devices, seconds=seconds, nodes=2**31 - 1)
        took = time.perf_counter() - began
        highs = f"{most(solved):9.5f}" if solved is not None else "     none"
        print(
            f"{experts:>4}, {devices:<2} {least_maximum(load[0], devices) / mean:9.5f} {most(start[0]):9.5f}"
            f" {most(packed(load, devices)[0]):11.6f} {median:9.4f} {highs} {took:9.2f}",
            flush=True,
        )


def pairs_part(rounds: int) -> None:
    """Transition counts."""
    rng = np.random.default_rng(0)
    ids = rng.permuted(np.tile(np.arange(128, dtype=np.int16), (48 * 4000, 1)), axis=1)[:, :8]
    work = decode(selections=ids.reshape(48, 1, 4000, 8), num_experts=128)
    transitions(work)
    median, longest = timed(lambda: transitions(work), rounds)
    print(f"\ntransitions, 4,000 tokens x 48 layers x 128 experts: {median:.3f} s ({longest:.3f}); bound 0.04 s")


def read(trace: Path | None, num_experts: int) -> Workload:
    """The bundled run, or a trace of ``experts`` (tokens, layers, k), ``offsets`` and ``dataset``."""
    if trace is None:
        with store.open_run(ROOT / "sample_data" / "runs" / "sample.duckdb") as run:
            return workload_of(run)
    held = np.load(trace, allow_pickle=False)
    experts, offsets = held["experts"], held["offsets"]
    lengths = np.diff(offsets)
    ids = np.full((experts.shape[1], len(lengths), int(lengths.max()), experts.shape[2]), -1, np.int16)
    for number, (first, last) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        ids[:, number, : last - first] = experts[first:last].transpose(1, 0, 2)
    return decode(selections=ids, num_experts=num_experts, domains=[str(one) for one in held["dataset"]])


def line(name: str, done: Score, seconds: float) -> None:
    """One row."""
    print(
        f"  {name:22} {done.mean_balancedness:8.3f} {done.pass_balancedness:9.3f} {done.remote_share:8.3f}"
        f" {done.mean_fan_out:8.3f} {done.move_share:7.3f} {seconds:8.2f}",
        flush=True,
    )


def trace_part(work: Workload, devices: int, batch: int, title: str) -> None:
    """Placements made from the first half of the requests, on the second."""
    fit, later = split(work, 0.5)
    load, layers, experts = fit.counts(), work.num_layers, work.num_experts
    print(
        f"\n{title}: {layers} layers x {experts} experts, {work.num_passes:,} tokens, {devices} devices, batch {batch}"
    )
    print(f"  {'':22} {'windows':>8} {'per pass':>9} {'remote':>8} {'fan-out':>8} {'moves':>7} {'seconds':>8}")
    first = contiguous(num_layers=layers, num_experts=experts, devices=devices)
    slots = experts + devices
    ask: dict[str, Any] = {"num_replicas": slots, "num_groups": 1, "num_nodes": 1, "num_gpus": devices}
    near, follow = coactivations(fit), transitions(fit)
    ways: dict[str, Callable[[], Placement]] = {
        "as they lie": lambda: first,
        "LPT with swaps": lambda: lpt(load=load, devices=devices),
        f"EPLB, {devices} replicas": lambda: Placement(eplb(load=load, **ask).physical_to_logical, experts, devices),
        f"LPT, {devices} replicas": lambda: lpt(load=load, devices=devices, redundant=devices),
        "MoETuner": lambda: moetuner(load=load, transitions=follow, devices=devices).placement,
        "affinity, fan-out": lambda: affinity(load=load, coactivations=near, transitions=follow, devices=devices),
        "affinity, balance": lambda: affinity(load=load, coactivations=near, devices=devices, objective="balance"),
        "affinity, across layers": lambda: affinity(load=load, transitions=follow, devices=devices, objective="none"),
        "LPT, later text's load": lambda: lpt(load=later.counts(), devices=devices),
    }
    scores = {}
    for name, way in ways.items():
        began = time.perf_counter()
        placed = way()
        took = time.perf_counter() - began
        scores[name] = score(later, placed, batch=batch)
        line(name, scores[name], took)
    chance = score(uniform(later), first, batch=batch)
    line("uniform experts", chance, 0.0)
    began = time.perf_counter()
    hidden = hecate(loads=pass_loads(later, batch=batch), devices=devices, limits=np.ones(layers, int))
    took = time.perf_counter() - began
    print(f"  one replica per device and pass, hidden (5 passes before): {hidden.balancedness_without:.3f} ->"
          f" {hidden.balancedness:.3f} per pass, {hidden.copies.sum():,} copies, {took:.1f} s")  # fmt: skip
    print(
        "  EPLB: "
        + sentence(
            scores["as they lie"], scores[f"EPLB, {devices} replicas"], scores["LPT with swaps"], chance, devices
        )
    )


def main() -> None:
    """Print all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--num-experts", type=int, default=32)
    parser.add_argument("--devices", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    eplb_part(options.rounds)
    lpt_part(options.rounds, options.seconds)
    pairs_part(options.rounds)
    work = read(options.trace, options.num_experts)
    devices = options.devices or (4 if options.trace is None else 8)
    title = "bundled run" if options.trace is None else options.trace.stem
    trace_part(work, devices, options.batch, title)
    if options.trace is not None:
        mixed = work.requests(np.random.default_rng(0).permutation(work.num_requests))
        trace_part(mixed, devices, options.batch, f"{title}, requests in random order")
    print(f"\nload {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
