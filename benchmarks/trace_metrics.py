"""What the metrics of a run cost, part by part, and the peak of memory, each part as a ratio to reading the trace once.

    python -m benchmarks.trace_metrics RUN.duckdb
    python -m benchmarks.trace_metrics --trace FILE.npz --config MODEL

RUN is a finished run; an .npz trace is imported first, which is timed too. The baseline, in the same run: unpacking the
selections of every layer. Bounds on 2 cores: gpt-oss-20b over 141,788 tokens imported in 20 s and computed in 60 s; 48
layers x 128 experts x top-8 x 1,000,000 tokens computed in 5 minutes within 6 GiB.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import store
from profiler.headline import PARTS, words
from profiler.headline.subject import Subject
from profiler.importers.job import import_run
from profiler.importers.model_config import read_config
from profiler.importers.recording import ImportOptions


def main() -> None:
    """Print seconds and ratios of every part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--trace", type=Path, help="an .npz trace instead of a run")
    parser.add_argument("--config", type=Path, help="the model of the trace, where it does not name its experts")
    parser.add_argument("--num-experts", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.run
        if options.trace is not None:
            config = read_config(options.config) if options.config else {}
            given = ImportOptions(config=config, num_experts=options.num_experts)
            started = time.perf_counter()
            path = import_run("npz", options.trace, directory=folder, name="run", options=given, metrics=False)
            print(f"import {time.perf_counter() - started:8.1f} s")
        if path is None:
            parser.error("give a run, or --trace FILE.npz")
        measure(path)


def measure(path: Path) -> None:
    """Time the parts on one run."""
    with store.open_run(path) as run:
        info = run.info
        print(f"{info.model}: {len(run.layers)} layers x {run.layers[0].num_experts} experts x {info.tokens:,} tokens")
        once = timed(lambda: [run.layer_selections(layer=one.layer, step=one.step) for one in run.layers])
        print(f"{'reading the trace once':24} {once[0]:7.1f} s   processor {once[1]:7.1f} s")
        subject = Subject(run)
        total = [0.0, 0.0]
        for part in PARTS:
            wall, processor = timed(lambda part=part: part(subject))  # type: ignore[misc]
            total = [total[0] + wall, total[1] + processor]
            ratio = f"{wall / once[0]:6.1f} x"
            print(f"{words(part):24} {wall:7.1f} s   processor {processor:7.1f} s   {ratio}", flush=True)
        print(f"{'all':24} {total[0]:7.1f} s   processor {total[1]:7.1f} s   {total[0] / once[0]:6.1f} x")
        print(f"peak {_peak():.2f} GiB, load {os.getloadavg()[0]:.1f}")


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


def _peak() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 2**20 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
