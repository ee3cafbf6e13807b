"""What many machines need: bytes, network, merging and money for a collection on many GPUs, from rates measured here.

    python -m benchmarks.many_machines [--layers 48] [--experts 128] [--top-k 8] [--tokens 10e9] [--gpus 100]
        [--tokens-per-second 10000] [--price 2.5] [--network 10e9] [--part-tokens 4e6]
        [--weights 61e9] [--gpus-per-worker 1] [--trace-every 1000]

Measured in this run, at that shape, on generated routing: bytes that a shard and a run file take per token and layer,
bytes of the sums of one part, and how fast this machine merges both. Given, since nothing here can measure them: the
speed of one GPU, its price per hour, the bytes of the weights that each worker loads, and the bits per second at which
all machines together read and write. The rest is multiplication.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import polars as pl

import store
from benchmarks.import_trace import generate
from profiler.importers.job import import_run
from profiler.importers.recording import ImportOptions
from store.schema import tables

SAMPLE_TOKENS = 32_768
TRACE = "route_chunk"
TEXT_BYTES = 4
"""Of a token's id in a shard, before it is compressed."""

FEW, MANY = 8, 40
"""Parts that are merged: the difference of the two times is that of the parts, without what every merge takes."""


@dataclass(frozen=True)
class Rates:
    """What was measured.

    Attributes:
        shard_bytes: per token and layer of the trace, in a shard; run_bytes: in a run file.
        sum_bytes: of the sums of one part; sum_seconds: to merge them.
        trace_rate: token-layers merged per second.
    """

    shard_bytes: float
    run_bytes: float
    sum_bytes: float
    sum_seconds: float
    trace_rate: float


def measure(*, layers: int, experts: int, top_k: int) -> Rates:
    """Write and merge shards of generated routing."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generate(folder / "trace.npz", tokens=SAMPLE_TOKENS, layers=layers, experts=experts, top_k=top_k)
        options = ImportOptions(num_experts=experts)
        path = import_run("npz", folder / "trace.npz", directory=folder, name="run", options=options, metrics=False)
        with store.open_run(path) as run:
            frames = {table: run.table(table) for table in tables() if table not in ("run", "check")}
        trace = {TRACE: frames.pop(TRACE)}
        sums = {table: frame for table, frame in frames.items() if len(frame)}
        few, _, _ = merged(folder, "few", sums, FEW)
        many, sum_bytes, base = merged(folder, "many", sums, MANY)
        whole, trace_bytes, size = merged(folder, "whole", sums | trace, FEW)
        held = FEW * SAMPLE_TOKENS * layers
        return Rates(
            shard_bytes=(trace_bytes - FEW * sum_bytes / MANY) / held,
            run_bytes=(size - base) / held,
            sum_bytes=sum_bytes / MANY,
            sum_seconds=max(many - few, 0.0) / (MANY - FEW),
            trace_rate=held / max(whole - few, 1e-9),
        )


def merged(folder: Path, name: str, frames: dict[str, pl.DataFrame], parts: int) -> tuple[float, int, int]:
    """Seconds to merge so many equal parts, bytes of their shards, and bytes of the run file."""
    writer = store.RunWriter.create(folder, name, store.RunInfo(model="generated"))
    for _ in range(parts):
        writer.write_shard(frames)
    written = sum(file.stat().st_size for file in writer.folder.rglob("*.parquet"))
    started = time.perf_counter()
    path = writer.finish()
    return time.perf_counter() - started, written, path.stat().st_size


def report(rates: Rates, options: argparse.Namespace) -> None:
    """The arithmetic, line by line."""
    tokens, gpus, speed = options.tokens, options.gpus, options.tokens_per_second
    parts = -(-tokens // options.part_tokens)
    hours = tokens / (gpus * speed) / 3600
    trace = rates.shard_bytes * options.layers
    sums = rates.sum_bytes / options.part_tokens
    print(
        f"measured: {rates.shard_bytes:.1f} bytes per token and layer in shards, {rates.run_bytes:.1f} in the run file"
    )
    print(f"measured: {rates.sum_bytes / 2**20:.2f} MiB of sums per part, merged in {rates.sum_seconds * 1e3:.0f} ms")
    print(f"measured: {rates.trace_rate / 1e6:.2f} M token-layers merged per second")
    cost = gpus * hours * options.price
    print(f"forwards: {hours:.2f} h on {gpus} GPUs at {speed:,.0f} tokens/s each, {cost:,.0f} in all;")
    print(f"  {cost / tokens * 1e9:,.2f} per billion tokens at {options.price:g} per GPU and hour")
    kept = [1.0, 1.0 / options.trace_every, 0.0]
    heads = ["whole trace", f"one of {options.trace_every:,}", "sums alone"]
    print(f"{'':30}" + "".join(f"{head:>16}" for head in heads))
    bytes_each = [part * trace + (part > 0) * TEXT_BYTES + sums for part in kept]
    merging = [part * tokens * options.layers / rates.trace_rate + parts * rates.sum_seconds for part in kept]
    run = [(part * rates.run_bytes * options.layers + (part > 0) * TEXT_BYTES) * tokens for part in kept]
    for words, values in (
        ("bytes per token", bytes_each),
        ("MB/s of one GPU", [each * speed / 1e6 for each in bytes_each]),
        ("GB of shards", [each * tokens / 1e9 for each in bytes_each]),
        ("hours to write them", [each * tokens * 8 / options.network / 3600 for each in bytes_each]),
        (
            "hours to load the weights",
            [gpus / options.gpus_per_worker * options.weights * 8 / options.network / 3600] * 3,
        ),
        ("hours of forwards", [hours] * 3),
        ("hours to merge", [seconds / 3600 for seconds in merging]),
        ("GB of the run file", [(size + rates.sum_bytes) / 1e9 for size in run]),
    ):
        print(f"{words:30}" + "".join(f"{value:16,.3f}" for value in values))


def main() -> None:
    """Measure, and print the arithmetic."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in (("--layers", 48), ("--experts", 128), ("--top-k", 8), ("--gpus", 100),
                          ("--gpus-per-worker", 1), ("--trace-every", 1000)):  # fmt: skip
        parser.add_argument(flag, type=int, default=default)
    for flag, size in (("--tokens", 10e9), ("--tokens-per-second", 10e3), ("--price", 2.5), ("--network", 10e9),
                       ("--weights", 61e9), ("--part-tokens", 4e6)):  # fmt: skip
        parser.add_argument(flag, type=float, default=size)
    options = parser.parse_args()
    rates = measure(layers=options.layers, experts=options.experts, top_k=options.top_k)
    report(rates, options)


if __name__ == "__main__":
    main()
