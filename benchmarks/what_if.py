"""What-if curves of a million token-layers, from the run file, against one sort of the same scores.

A run of 16 layers x 62,500 tokens, 8 of 64 experts, is written twice: with the 16 largest router scores of each token,
and with those of all experts for the Sinkhorn view. Every method is tried at its default values, reading included.
Bound: 2 s each.

Baselines of the same process: one ``np.sort`` of all layers' scores along the experts, and for top-p the same figures
by plain numpy, one value after the other, whose means must be equal. Ratios are of processor seconds.

    python benchmarks/what_if.py [--tokens N] [--layers L] [--rounds R] [--cores C] [--experts E]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

K, LENGTH, LIMIT = 8, 500, 2.0


def write(folder: Path, *, tokens: int, layers: int, stored: int, experts: int) -> Path:
    """A run whose router prefers some experts and stays with them for a while."""
    import store

    sequences = max(1, tokens // LENGTH)
    place = {
        "sequence": np.repeat(np.arange(sequences), LENGTH),
        "position": np.tile(np.arange(LENGTH), sequences),
    }
    writer = store.RunWriter.create(folder, f"scores{stored}", store.RunInfo(model="drawn", hidden_size=2048))
    for layer in range(layers):
        generator = np.random.default_rng(layer)
        logits = generator.normal(size=(sequences * LENGTH, experts)).astype(np.float32) * 1.5
        logits += np.repeat(generator.normal(size=(sequences * 10, experts)).astype(np.float32), LENGTH // 10, axis=0)
        logits += generator.normal(size=experts).astype(np.float32)
        order = np.argsort(-logits, axis=1)[:, :stored]
        values = np.take_along_axis(logits, order, axis=1)
        total = np.log(np.exp(logits).sum(1))
        share = np.exp(values[:, :K])
        share /= share.sum(1, keepdims=True)
        one: dict[str, Any] = {"layer": layer, **place}
        writer.write_shard(
            {
                "route_chunk": store.pack_trace(ids=order[:, :K], weights=share, num_experts=experts, **one),
                "score_chunk": store.pack_scores(ids=order, logits=values, log_partition=total, **one),
                "layer": pl.DataFrame(
                    {"layer": [layer], "step": [0], "num_experts": [experts], "top_k": [K], "expert_width": [1024]}
                ),
                "sequence": pl.DataFrame(
                    {"sequence": [*range(sequences)], "domain": ["text"] * sequences, "tokens": [LENGTH] * sequences}
                ),
            }
        )
    return writer.finish(seconds=1.0)


def seconds(work: Callable[[], Any], rounds: int) -> tuple[list[float], list[float]]:
    """Wall and processor seconds, both sorted."""
    wall, processor = [], []
    for _ in range(rounds):
        began, used = time.perf_counter(), time.process_time()
        work()
        wall.append(time.perf_counter() - began)
        processor.append(time.process_time() - used)
    return sorted(wall), sorted(processor)


def middle(found: list[float]) -> str:
    """Median, and the range."""
    return f"{statistics.median(found):6.2f} ({found[0]:.2f} to {found[-1]:.2f})"


def plain_top_p(run: Any, values: tuple[float, ...], experts: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(V,) mean active experts of plain numpy, value by value, with kept mass, flips and load beside it."""
    means = np.zeros(len(values))
    for layer in run.layers:
        scores = run.layer_scores(layer=layer.layer)
        share = np.exp(scores.logits.astype(np.float64) - scores.log_partition[:, None])
        reached = np.minimum(np.cumsum(share, axis=1), 1.0)
        for index, value in enumerate(values):
            active = np.minimum(1 + (reached <= value).sum(1), share.shape[1])
            taken = np.arange(share.shape[1]) < active[:, None]
            means[index] += active.mean() / len(run.layers)
            (share * taken).sum(), (active != K).mean(), np.bincount(scores.ids[taken], minlength=experts)
    return means


def main() -> None:
    """Print seconds and ratios; say what is over the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=62_500)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--experts", type=int, default=64)
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NUMBA_CACHE_DIR"] = folder
        measure(Path(folder), options)


def measure(folder: Path, options: argparse.Namespace) -> None:
    """All methods."""
    import store
    from planner.simulate.what_if import METHODS, what_if

    experts = options.experts
    shape = {"tokens": options.tokens, "layers": options.layers, "experts": experts}
    some = store.open_run(write(folder, stored=K + 8, **shape))
    whole = store.open_run(write(folder, stored=experts, **shape))
    count = int(some.table("sequence")["tokens"].sum()) * options.layers
    logits = np.random.default_rng(0).permutation(
        np.concatenate([some.layer_scores(layer=layer).logits for layer in range(options.layers)]).ravel()
    )
    wall, sort = seconds(lambda: np.sort(logits.reshape(-1, K + 8), axis=1), options.rounds)
    base = statistics.median(sort)
    print(f"{count:,} token-layers, {options.cores} cores")
    print(f"{'method':14} {'values':>6}  {'wall s':22}  {'processor s':22}  over one sort")
    print(f"{'one sort':14} {'':6}  {middle(wall):22}  {middle(sort):22}  {1:6.1f}")
    biases = {(layer, 0): np.linspace(-0.2, 0.2, experts) for layer in range(options.layers)}
    for method in METHODS:
        run = whole if method.name == "sinkhorn" else some
        trial = partial(what_if, run, method.name, bias=biases if method.name == "bias" else None)
        trial(limit_tokens=LENGTH)  # compiled
        values = len(trial().values)
        wall, used = seconds(trial, options.rounds)
        over = "" if statistics.median(wall) * 1e6 / count <= LIMIT else f"   OVER {LIMIT:g} s per million"
        ratio = statistics.median(used) / base
        print(f"{method.name:14} {values:6}  {middle(wall):22}  {middle(used):22}  {ratio:6.1f}{over}", flush=True)
    tried = METHODS[0].values
    began = time.process_time()
    expected = plain_top_p(some, tried, experts)
    took = time.process_time() - began
    found = what_if(some, "top_p", values=tried)
    difference = float(np.abs(found.mean_active.mean(1) - expected).max())
    print(f"top_p by plain numpy, value by value: {took:.2f} processor s; means differ by {difference:.1e} at most")


if __name__ == "__main__":
    main()
