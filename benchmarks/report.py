"""Seconds and megabytes of ``moescope report``: the bundled run, and one of 48 layers x 128 experts x 1 M tokens.

    python -m benchmarks.report [--store DIR] [--only sample|large] [--hit-rates] [--layers 48] [--experts 128]
                                [--tokens 1000000]

``--store`` keeps the generated run, so that it is made only once. Bounds, single thread: the bundled run in 10 s, the
large one in 60 s and under 7 MB; the run and its metrics are made before the clock starts. The large run holds load,
trace, outputs, residual stream and similarity of every pair; its numbers are drawn, its sizes are those of a real one.
``--hit-rates``: with those of caches too, whose computation takes minutes.
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

from benchmarks.shaped_run import SEQUENCE, Shape, write
from profiler.headline import PARTS
from profiler.headline.hit_rates import OWN_CACHES, shared_cache_rows
from sample_data import RUN

BOUNDS = {"sample": (10.0, 7.0), "large": (60.0, 7.0)}
"""Seconds and megabytes."""


def large_run(directory: Path, *, layers: int, experts: int, top_k: int, tokens: int, hit_rates: bool) -> Path:
    """A run of that shape with its metrics; one that is there already is taken."""
    name = f"large-{layers}x{experts}x{tokens}{'-hit-rates' if hit_rates else ''}"
    path = directory / f"{name}.duckdb"
    if path.exists():
        return path
    shape = Shape(layers, experts, top_k, tokens, traced=max(tokens // SEQUENCE, 1), similarity=True)
    parts = [part for part in PARTS if hit_rates or part not in (OWN_CACHES, shared_cache_rows)]
    return write(directory, name, shape, parts=parts, tell=lambda sentence: print(sentence, file=sys.stderr))


def measure(name: str, run: Path) -> bool:
    """Write the report in a process of its own with one thread; print what it took."""
    seconds_bound, megabytes_bound = BOUNDS[name]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.html"
        threads = {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "app.cli", "report", str(run), "-o", str(out)], check=True,
            env={**os.environ, **threads}, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        seconds, megabytes = time.perf_counter() - began, out.stat().st_size / 1e6
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    good = seconds <= seconds_bound and megabytes <= megabytes_bound
    sizes = f"{megabytes:5.2f} MB (<= {megabytes_bound:g})   peak {used.ru_maxrss / 2**20:.2f} GiB"
    print(f"{name:8} {seconds:6.1f} s (<= {seconds_bound:g}), of the processor {processor:.1f} s   {sizes}"
          f"   {'ok' if good else 'OVER'}")  # fmt: skip
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
    parser.add_argument("--hit-rates", action="store_true")
    options = parser.parse_args()
    good = True
    if options.only != "large":
        good &= measure("sample", RUN)
    if options.only != "sample":
        with tempfile.TemporaryDirectory() as folder:
            shape = {name: getattr(options, name) for name in ("layers", "experts", "top_k", "tokens", "hit_rates")}
            good &= measure("large", large_run(options.store or Path(folder), **shape))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
