"""Bytes per token-layer of a finished run file, and the time to read one layer back.

    python benchmarks/trace_size.py

Baseline, in the same run: the same selections as one long table (a row per token, layer and rank), which is what most
tools write. The routing is synthetic: skewed, sticky within a sequence, top-8.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import duckdb
import numpy as np
from numpy.typing import NDArray

import store
from store import RunInfo, RunWriter

LAYERS, SEQUENCES, LENGTH, TOP_K = 16, 196, 512, 8
LIMITS = {64: 15.5, 128: 15.5, 384: 18.0}


def sticky_routing(*, num_experts: int, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Selections and gate weights (layers, tokens, k): experts have unequal popularity, and sequences favourites."""
    generator = np.random.default_rng(seed)
    ids = np.empty((LAYERS, SEQUENCES * LENGTH, TOP_K), np.int64)
    weights = np.empty(ids.shape)
    for layer in range(LAYERS):
        popularity = np.log(generator.dirichlet(np.full(num_experts, 0.7)) + 1e-6)
        taste = generator.normal(size=(SEQUENCES, 1, num_experts))
        noise = generator.gumbel(size=(SEQUENCES, LENGTH, num_experts))
        score = (popularity + taste + noise).reshape(-1, num_experts)
        ids[layer] = np.argsort(-score, axis=1)[:, :TOP_K]
        logits = np.take_along_axis(score, ids[layer], 1)
        weights[layer] = np.exp(logits - logits.max(1, keepdims=True))
        weights[layer] /= weights[layer].sum(1, keepdims=True)
    return ids, weights


def write_run(directory: Path, ids: NDArray[np.int64], weights: NDArray[np.float64], num_experts: int) -> Path:
    """A run of these selections, collected in shards of 8 sequences."""
    writer = RunWriter.create(directory, f"experts-{num_experts}", RunInfo(model="synthetic"))
    position = np.tile(np.arange(LENGTH), 8)
    writer.write_shard({"layer": {"layer": range(LAYERS), "step": [0] * LAYERS, "num_experts": [num_experts] * LAYERS}})
    for first in range(0, SEQUENCES, 8):
        count = min(8, SEQUENCES - first)
        part = slice(first * LENGTH, (first + count) * LENGTH)
        for layer in range(LAYERS):
            frame = store.pack_trace(
                layer=layer,
                sequence=np.repeat(np.arange(first, first + count), LENGTH),
                position=position[: count * LENGTH],
                ids=ids[layer, part],
                weights=weights[layer, part],
                num_experts=num_experts,
            )
            writer.write_shard({"route_chunk": frame})
        numbers = np.arange(first, first + count)
        writer.write_shard({"sequence": {"sequence": numbers, "domain": ["a"] * count, "tokens": [LENGTH] * count}})
    return writer.finish()


def long_table_bytes(directory: Path, ids: NDArray[np.int64], weights: NDArray[np.float64]) -> int:
    """Size of a DuckDB file with a row per (token, layer, rank)."""
    path = directory / "long.duckdb"
    layer, token, rank = (axis.ravel() for axis in np.indices(ids.shape, np.uint32))
    expert, weight = ids.ravel().astype(np.uint16), weights.ravel().astype(np.float16).astype(np.float32)
    with duckdb.connect(str(path)) as connection:
        connection.execute(
            "create table route as select layer::utinyint as layer, token, rank::utinyint as rank, expert, weight"
            " from (select unnest(layer) as layer, unnest(token) as token, unnest(rank) as rank,"
            " unnest(expert) as expert, unnest(weight) as weight from (select $layer as layer, $token as token,"
            " $rank as rank, $expert as expert, $weight as weight))",
            {"layer": layer, "token": token, "rank": rank, "expert": expert, "weight": weight},
        )
    size = path.stat().st_size
    path.unlink()
    return size


def main() -> None:
    """Print one row per number of experts."""
    print(f"{LAYERS} layers x {SEQUENCES * LENGTH:,} tokens x top-{TOP_K}; bytes per token-layer, whole file")
    print("experts  run file  limit  long table  ratio  read a layer  ids exact")
    for num_experts, limit in LIMITS.items():
        ids, weights = sticky_routing(num_experts=num_experts)
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder)
            path = write_run(directory, ids, weights, num_experts)
            cells = ids.shape[0] * ids.shape[1]
            packed, long = path.stat().st_size / cells, long_table_bytes(directory, ids, weights) / cells
            with store.open_run(path) as run:
                run.selections(layers=[0])
                begin = time.perf_counter()
                trace = run.selections(layers=[3])
                seconds = time.perf_counter() - begin
            exact = np.array_equal(trace.ids[0].reshape(-1, TOP_K), ids[3])
        verdict = "" if packed <= limit and exact else "   OVER THE LIMIT"
        print(
            f"{num_experts:7d}  {packed:8.2f}  {limit:5.1f}  {long:10.2f}  {long / packed:4.1f}x"
            f"  {seconds * 1e3:9.0f} ms  {exact}{verdict}"
        )


if __name__ == "__main__":
    main()
