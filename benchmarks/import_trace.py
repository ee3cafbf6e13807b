"""Time and peak memory of importing a trace, in a process of its own.

    python -m benchmarks.import_trace [--tokens 1000000] [--layers 48] [--experts 128] [--top-k 8]
    python -m benchmarks.import_trace --trace FILE.npz --experts 32

Without ``--trace`` the file is generated: skewed and sticky routing with descending half-precision weights, in
sequences of 2,048 tokens, deflated. The baseline, in the same run: inflating the file, which no importer can save.
Bounds: 48 layers x 128 experts x top-8 x 1,000,000 tokens within 2 minutes and 6 GiB.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

SEQUENCE = 2048
ROWS = 1 << 14
SECONDS, GIBIBYTES = 120.0, 6.0


def generate(path: Path, *, tokens: int, layers: int, experts: int, top_k: int) -> None:
    """Write the .npz piece by piece, so that it may be larger than memory."""
    shape = (tokens, layers, top_k)
    kind = np.dtype(np.uint8 if experts <= 255 else np.uint16)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, dtype in (("experts", kind), ("weights", np.dtype(np.float16))):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(stream, header)
                last = np.tile(np.arange(top_k), (layers, 1))
                for first in range(0, tokens, ROWS):
                    rows = min(ROWS, tokens - first)
                    block = _ids(rows, last, experts, first) if name == "experts" else _weights(rows, shape, first)
                    stream.write(block.astype(dtype).tobytes())
        bounds = np.append(np.arange(0, tokens, SEQUENCE), tokens)
        for name, values in (("offsets", bounds), ("num_experts", np.array(experts))):
            with archive.open(f"{name}.npy", "w") as stream:
                np.lib.format.write_array(stream, values)


def _ids(rows: int, last: NDArray[np.int64], experts: int, seed: int) -> NDArray[np.int64]:
    result = np.empty((rows, *last.shape), np.int64)
    _draw(result, last, experts, np.random.default_rng(seed))
    return result


@numba.njit(cache=True)
def _draw(result: Any, last: Any, experts: int, generator: Any) -> None:
    """Distinct experts, popular ones more often; every second one is that of the token before."""
    tokens, layers, k = result.shape
    taken = np.zeros(experts, np.bool_)
    for token in range(tokens):
        for layer in range(layers):
            row = result[token, layer]
            for rank in range(k):
                expert = last[layer, rank] if generator.random() < 0.5 else int(experts * generator.random() ** 1.5)
                while taken[expert]:
                    expert = int(experts * generator.random() ** 1.5)
                row[rank] = expert
                taken[expert] = True
            for rank in range(k):
                taken[row[rank]] = False
            last[layer] = row


def _weights(rows: int, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    drawn = np.random.default_rng(seed).random((rows, *shape[1:]), np.float32)
    return -np.sort(-drawn, axis=-1)


def measure(path: Path, experts: int, *, metrics: bool) -> None:
    """Import the file here, and print what it took."""
    from profiler.importers.job import import_run
    from profiler.importers.recording import ImportOptions

    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        target = import_run(
            "npz", path, directory=folder, name="run", options=ImportOptions(num_experts=experts), metrics=metrics
        )
        seconds = time.perf_counter() - started
        print(f"import {seconds:.1f} s, peak {_peak():.2f} GiB, run file {target.stat().st_size / 2**20:.0f} MiB")


def read_alone(path: Path) -> float:
    """Seconds to inflate every member once."""
    started = time.perf_counter()
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            with archive.open(info) as stream:
                while stream.read(1 << 22):
                    pass
    return time.perf_counter() - started


def _peak() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 2**20 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """Print size, the time to inflate the file, and time and peak of its import."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in (("--tokens", 1_000_000), ("--layers", 48), ("--experts", 128), ("--top-k", 8)):
        parser.add_argument(flag, type=int, default=default)
    parser.add_argument("--trace", type=Path, help="a file of your own instead of a generated one")
    parser.add_argument("--metrics", action="store_true", help="with the metrics that follow an import")
    parser.add_argument("--keep", type=Path, help="keep the generated file under this name, and use it if it is there")
    parser.add_argument("--only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        measure(options.trace, options.experts, metrics=options.metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        path: Path = options.trace or options.keep or Path(folder, "trace.npz")
        if not path.exists():
            generate(path, tokens=options.tokens, layers=options.layers, experts=options.experts, top_k=options.top_k)
        print(f"{path.name}: {path.stat().st_size / 2**20:.0f} MiB, inflated in {read_alone(path):.1f} s", flush=True)
        command = [sys.executable, "-m", "benchmarks.import_trace", "--only", "--trace", str(path)]
        command += ["--experts", str(options.experts), *(["--metrics"] if options.metrics else [])]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    if not options.trace and (options.layers, options.experts, options.top_k) == (48, 128, 8):
        print(f"bounds: {SECONDS:.0f} s and {GIBIBYTES:.0f} GiB for 1,000,000 tokens")


if __name__ == "__main__":
    main()
