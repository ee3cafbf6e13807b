"""Seconds and megabytes of ``moescope report``: the bundled run, and one of 48 layers x 128 experts x 1 M tokens.

    python -m benchmarks.report [--store DIR] [--only sample|large] [--layers 48] [--experts 128] [--tokens 1000000]

``--store`` keeps the generated run, so that it is made only once. Bounds, single thread: the bundled run in 10 s, the
large one in 60 s and under 7 MB; the run and its metrics are made before the clock starts. The large run holds load,
trace, outputs, residual stream and similarity of every pair; its numbers are drawn, its sizes are those of a real one.
Of the headline metrics it lacks the hit rates of caches: their replay takes minutes, and they add curves, no matrices.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

import store
from profiler.headline import PARTS, compute
from sample_data import RUN
from store import LayerInfo, RunInfo, RunWriter

LENGTH, DOMAINS, WIDTH = 512, tuple(f"domain {number}" for number in range(8)), 256
BOUNDS = {"sample": (10.0, 7.0), "large": (60.0, 7.0)}
"""Seconds and megabytes."""


def large_run(directory: Path, *, layers: int, experts: int, top_k: int, tokens: int) -> Path:
    """Write a run of that shape with its metrics; one that is there already is taken."""
    path = directory / f"large-{layers}x{experts}x{tokens}.duckdb"
    if path.exists():
        return path
    rng = np.random.default_rng(0)
    sequences = -(-tokens // LENGTH)
    info = RunInfo(
        model="generated", num_layers=layers, hidden_size=WIDTH, dtype="bfloat16", device="cuda", origin="collect",
        levels="routing,activations,similarity", text_kept=False, sequences=sequences, tokens=sequences * LENGTH,
    )  # fmt: skip
    writer = RunWriter.create(directory, path.stem, info)
    domain_of = np.arange(sequences) % len(DOMAINS)
    writer.write_shard({
        "layer": pl.DataFrame([vars(LayerInfo(at, 0, f"layers.{at}", "Experts", "Router", experts, top_k, 0, 768))
                               for at in range(layers)]),
        "sequence": pl.DataFrame({
            "sequence": np.arange(sequences), "domain": [DOMAINS[at] for at in domain_of],
            "source": ["generated"] * sequences, "tokens": [LENGTH] * sequences, "prompt_tokens": [LENGTH] * sequences,
        }),
        "residual": _residual(rng, layers),
        "check": pl.DataFrame([{"name": "layers_seen", "status": "pass", "detail": "generated"}]),
    })  # fmt: skip
    base = _selections(rng, sequences * LENGTH, experts, top_k)
    gates = np.sort(rng.dirichlet(np.full(top_k, 2.0), len(base)).astype(np.float32), axis=1)[:, ::-1]
    for layer in range(layers):
        writer.write_shard(_layer(rng, layer, base, gates, domain_of, experts))
    path = writer.finish(seconds=60.0)
    with store.open_run(path) as run:
        parts = [part for part in PARTS if part.__name__ != "hit_rate_rows"]
        values, vectors = compute(run, parts=parts, tell=lambda sentence: print(sentence, file=sys.stderr))
    store.write_metrics(path, values, vectors)
    return path


def _selections(rng: np.random.Generator, tokens: int, experts: int, top_k: int) -> np.ndarray:
    """(tokens, k) selections that neighbours share half of the time, some experts more often than others."""
    favour = rng.normal(0.0, 0.7, experts).astype(np.float32)
    ids = np.empty((tokens, top_k), np.int16)
    for start in range(0, tokens, 8192):
        rows = min(8192, tokens - start)
        scores = favour + rng.gumbel(size=(rows, experts)).astype(np.float32)
        ids[start : start + rows] = np.argpartition(-scores, top_k, axis=1)[:, :top_k]
    again = np.flatnonzero(rng.random(tokens) < 0.5)
    ids[again[again > 0]] = ids[again[again > 0] - 1]
    return ids


def _layer(
    rng: np.random.Generator, layer: int, base: np.ndarray, gates: np.ndarray, domain_of: np.ndarray, experts: int
) -> dict[str, pl.DataFrame]:
    """All tables of one layer: the base selections under other names, which differ by domain."""
    sequences = len(domain_of)
    names = np.stack([rng.permutation(experts) for _ in DOMAINS]).astype(np.int16)
    common = rng.permutation(experts).astype(np.int16)
    names[rng.random(names.shape) < 0.6] = -1
    for row in names:  # most experts keep a name that all domains share, the others are put in the places left
        free = np.setdiff1d(np.arange(experts), common[row < 0])
        row[row >= 0] = rng.permutation(free)
        row[row < 0] = common[row < 0]
    domain = np.repeat(domain_of, LENGTH)
    ids = names[domain[:, None], base]
    loads, routers, outputs = [], [], []
    for number, title in enumerate(DOMAINS):
        mine = domain == number
        counts = np.bincount(ids[mine].ravel(), minlength=experts)
        first = np.bincount(ids[mine][:, 0], minlength=experts)
        mass = np.bincount(ids[mine].ravel(), weights=gates[mine].ravel(), minlength=experts)
        key = {"layer": [layer] * experts, "step": [0] * experts, "expert": np.arange(experts),
               "kind": ["routed"] * experts, "domain": [title] * experts, "phase": ["prompt"] * experts}  # fmt: skip
        loads.append(pl.DataFrame({**key, "tokens": counts, "first_choices": first, "gate_sum": mass}))
        norms = rng.lognormal(0.0, 0.4, experts)
        outputs.append(pl.DataFrame({
            **key, "tokens": counts, "norm_sum": norms * counts, "norm_square_sum": norms**2 * counts,
            "gated_norm_sum": norms * mass, "output_max": rng.lognormal(2.0, 0.8, experts),
            "output_max_channel": [0] * experts, "output_max_sequence": [0] * experts,
            "output_max_position": [0] * experts, "first_routed_output_max": rng.lognormal(1.5, 0.8, experts),
        }))  # fmt: skip
        tokens = int(mine.sum())
        routers.append({"layer": layer, "step": 0, "domain": title, "phase": "prompt", "tokens": tokens,
                        "selections": tokens * ids.shape[1]})  # fmt: skip
    return {
        "route_chunk": store.pack_trace(
            layer=layer, sequence=np.repeat(np.arange(sequences), LENGTH),
            position=np.tile(np.arange(LENGTH), sequences), ids=ids, weights=gates, num_experts=experts,
        ),
        "expert_load": pl.concat(loads), "router_load": pl.DataFrame(routers), "expert_output": pl.concat(outputs),
        **_similarity(rng, layer, experts),
    }  # fmt: skip


def _similarity(rng: np.random.Generator, layer: int, experts: int) -> dict[str, pl.DataFrame]:
    """Router rows and the sums of similarity of one layer."""
    rows = (rng.normal(size=(experts, WIDTH)) + rng.normal(size=WIDTH)).astype(np.float32)
    products = rows.astype(float) @ rows.T
    lengths = np.sqrt(np.diag(products))
    cosine = np.clip(products / np.outer(lengths, lengths) + rng.normal(0.0, 0.02, products.shape), -1, 1)
    cosine = (cosine + cosine.T) / 2
    key = {"layer": [layer] * experts, "step": [0] * experts, "expert": np.arange(experts)}
    sampled = {**key, "domain": [DOMAINS[0]] * experts, "phase": ["prompt"] * experts, "tokens": [4096] * experts}
    return {
        "router_row": pl.DataFrame({**key, "weights": list(rows)}),
        "expert_similarity": pl.DataFrame({
            **sampled, "output_sum": list(rows), "cosine_sum": list(cosine * 4096),
            "product_sum": list(products * 4096),
        }),
    }  # fmt: skip


def _residual(rng: np.random.Generator, layers: int) -> pl.DataFrame:
    return pl.DataFrame({
        "layer": np.arange(layers), "domain": [DOMAINS[0]] * layers, "phase": ["prompt"] * layers,
        "tokens": [1000] * layers, "norm_sum": rng.lognormal(8.0, 0.2, layers),
        "absolute_max": rng.lognormal(4.0, 1.0, layers), "channel": [3] * layers, "sequence": [0] * layers,
        "position": [0] * layers, "median_there": [0.5] * layers, "later_max": rng.lognormal(3.0, 0.5, layers),
    })  # fmt: skip


def measure(name: str, run: Path) -> bool:
    """Write the report in a process of its own with one thread; print seconds, megabytes and peak memory."""
    seconds_bound, megabytes_bound = BOUNDS[name]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.html"
        threads = {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "app.cli", "report", str(run), "-o", str(out)], check=True,
            env={**os.environ, **threads}, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        seconds, megabytes = time.perf_counter() - began, out.stat().st_size / 1e6
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    good = seconds <= seconds_bound and megabytes <= megabytes_bound
    print(f"{name:8} {seconds:6.1f} s (<= {seconds_bound:g})   {megabytes:5.2f} MB (<= {megabytes_bound:g})"
          f"   peak {peak:.2f} GiB   {'ok' if good else 'OVER'}")  # fmt: skip
    return good


def main() -> None:
    """Print one line per run; exit code 1 where a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="where the generated run is kept")
    parser.add_argument("--only", choices=tuple(BOUNDS))
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    options = parser.parse_args()
    good = True
    if options.only != "large":
        good &= measure("sample", RUN)
    if options.only != "sample":
        with tempfile.TemporaryDirectory() as folder:
            shape = {name: getattr(options, name) for name in ("layers", "experts", "top_k", "tokens")}
            good &= measure("large", large_run(options.store or Path(folder), **shape))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
