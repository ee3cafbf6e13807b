"""What many machines need: bytes, network, merging and money for a collection on many GPUs, from rates measured here.

    python -m benchmarks.many_machines [--layers 48] [--experts 128] [--top-k 8] [--tokens 10e9] [--gpus 100]
        [--tokens-per-second 10000] [--price 2.5] [--network 10e9] [--part-tokens 4e6]

Measured in this run, at that shape, on generated routing: bytes that a shard and a run file take per token and layer,
bytes of the sums of one part, and how fast this machine merges both. Given, since nothing here can measure them: the
speed of one GPU, its price per hour, and the bits per second at which all machines together write. The rest is
multiplication.
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
    text, sums = 5.0, rates.sum_bytes / options.part_tokens
    print(
        f"measured: {rates.shard_bytes:.1f} bytes per token and layer in shards, {rates.run_bytes:.1f} in the run file"
    )
    print(f"measured: {rates.sum_bytes / 2**20:.2f} MiB of sums per part, merged in {rates.sum_seconds * 1e3:.0f} ms")
    print(f"measured: {rates.trace_rate / 1e6:.2f} M token-layers merged per second")
    cost = gpus * hours * options.price
    print(f"forwards: {hours:.2f} h on {gpus} GPUs at {speed:,.0f} tokens/s each, {cost:,.0f} in all;")
    print(f"  {cost / tokens * 1e9:,.2f} per billion tokens at {options.price:g} per GPU and hour")
    print(f"{'':28}{'with the trace':>18}{'sums alone':>14}")
    for words, whole, alone in (
        ("bytes per token", trace + text + sums, sums),
        ("MB/s of one GPU", (trace + text + sums) * speed / 1e6, sums * speed / 1e6),
        ("GB in all", (trace + text + sums) * tokens / 1e9, sums * tokens / 1e9),
        ("hours to write", (trace + text + sums) * tokens * 8 / options.network / 3600,
         sums * tokens * 8 / options.network / 3600),
        ("hours to merge", (tokens * options.layers / rates.trace_rate + parts * rates.sum_seconds) / 3600,
         parts * rates.sum_seconds / 3600),
        ("GB of the run file", (rates.run_bytes * options.layers + text) * tokens / 1e9, rates.sum_bytes / 1e9),
    ):  # fmt: skip
        print(f"{words:28}{whole:18,.3f}{alone:14,.3f}")


def main() -> None:
    """Measure, and print the arithmetic."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in (("--layers", 48), ("--experts", 128), ("--top-k", 8), ("--gpus", 100)):
        parser.add_argument(flag, type=int, default=default)
    for flag, size in (("--tokens", 10e9), ("--tokens-per-second", 10e3), ("--price", 2.5), ("--network", 10e9),
                       ("--part-tokens", 4e6)):  # fmt: skip
        parser.add_argument(flag, type=float, default=size)
    options = parser.parse_args()
    rates = measure(layers=options.layers, experts=options.experts, top_k=options.top_k)
    report(rates, options)


if __name__ == "__main__":
    main()
