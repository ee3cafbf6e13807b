"""Traces of 10 million, 100 million and a billion selections: time and peak of import and metrics, and their growth.

    python -m benchmarks.billion [--sizes 10M 100M 1B] [--keep FOLDER] [--limit 4GiB]

Traces are generated (32 layers x 64 experts x top-8, sequences of 2,048 tokens; benchmarks/import_trace.py), imported,
and measured, each step in a process of its own within a memory limit: load, SRP with its controls, co-activation, and
the LRU curve of every layer's own cache on every token. The baseline, in the same run: reading the selections of all
layers once. FOLDER keeps the files, tN.npz and store/bN.duckdb for N tokens; of a run that is there, the import is not
measured. Bounds: every peak within 4 GiB; processor time grows as tokens do: the exponent between the two largest sizes
is at most 1.15 (below 1 is what starting costs).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.import_trace import generate
from moescope import memory
from moescope.sizes import size

LAYERS, EXPERTS, TOP_K = 32, 64, 8
LIMIT, EXPONENT = "4GiB", 1.15
STEPS = ("read once", "load", "SRP", "co-activation", "LRU, every token")

Result = dict[str, float]


def main() -> None:
    """Measure every size, print as it goes, and end with 1 where a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=selections_of, default=[10**7, 10**8, 10**9], metavar="N")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="keep the files there, and use those that are there"
    )
    parser.add_argument("--limit", default=LIMIT, help=f"memory limit (default {LIMIT})")
    parser.add_argument("--only", nargs=2, metavar=("STEP", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measured(options.only[0], Path(options.only[1]), memory.size_of(options.limit))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = {count: measure(count, folder, options.limit) for count in sorted(options.sizes)}
    sys.exit(0 if verdict(found, memory.size_of(options.limit)) else 1)


def selections_of(text: str) -> int:
    """Selections of ``10M``, ``1B`` or a plain number."""
    factor = {"M": 10**6, "B": 10**9}.get(text[-1:].upper(), 1)
    return round(float(text[:-1] if factor > 1 else text) * factor)


def measure(count: int, folder: Path, limit: str) -> dict[str, Result]:
    """Every step on one size; the import too, where the run is not there yet."""
    tokens = math.ceil(count / (LAYERS * TOP_K))
    trace, run = folder / f"t{tokens}.npz", folder / "store" / f"b{tokens}.duckdb"
    print(f"{count:,} selections: {tokens:,} tokens", flush=True)
    found: dict[str, Result] = {}
    if not run.exists():
        if not trace.exists():
            began = time.perf_counter()
            generate(trace, tokens=tokens, layers=LAYERS, experts=EXPERTS, top_k=TOP_K)
            print(f"  {'generated':20} {time.perf_counter() - began:8.1f} s", flush=True)
        found["import"] = apart("import", trace, limit)
    for step in STEPS:
        found[step] = apart(step, run, limit)
    return found


def apart(step: str, path: Path, limit: str) -> Result:
    """One step in a process of its own; printed."""
    command = [sys.executable, "-m", "benchmarks.billion", "--limit", limit, "--only", step, str(path)]
    done = subprocess.run(command, check=True, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True)
    result: Result = json.loads(done.stdout.splitlines()[-1])
    print(
        f"  {step:20} {result['seconds']:8.1f} s   processor {result['processor']:8.1f} s   peak"
        f" {size(result['peak']):>9}   load {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    return result


def measured(step: str, path: Path, limit: int) -> Result:
    """Do a step here, within the limit."""
    with memory.limited(limit):
        work = _import(path) if step == "import" else _metric(step, path)
        clock, processor = time.perf_counter(), time.process_time()
        work()
        clock, processor = time.perf_counter() - clock, time.process_time() - processor
    return {"seconds": clock, "processor": processor, "peak": float(memory.peak())}


def _import(path: Path) -> Callable[[], object]:
    from profiler.importers.job import import_run
    from profiler.importers.recording import ImportOptions

    target, name = path.parent / "store", path.stem.replace("t", "b")
    options = ImportOptions(num_experts=EXPERTS)
    return lambda: import_run("npz", path, directory=target, name=name, options=options, metrics=False)


def _metric(step: str, path: Path) -> Callable[[], object]:
    import store
    from profiler.headline.flow import PAIRS
    from profiler.headline.hit_rates import own_curves
    from profiler.headline.load import LOAD
    from profiler.headline.local_consistency import SEGMENTS
    from profiler.headline.subject import Subject

    run = store.open_run(path)
    subject = Subject(run, whole=True)
    axes = range(len(run.layers))
    return {
        "read once": lambda: [subject.ids(axis, block).shape for axis in axes for block in subject.blocks],
        "load": lambda: LOAD(subject),
        "SRP": lambda: SEGMENTS(subject),
        "co-activation": lambda: PAIRS(subject),
        "LRU, every token": lambda: [own_curves(subject, axis, "observed", [("lru", None)]) for axis in axes],
    }[step]


def verdict(found: dict[int, dict[str, Result]], limit: int) -> bool:
    """Print ratios to reading, growth between the two largest sizes, and whether the bounds hold."""
    sizes = sorted(found)
    largest = found[sizes[-1]]
    print(f"\n{'':20} {'x reading':>10} {'exponent':>9}   of processor time")
    held = True
    for step, result in largest.items():
        ratio = f"{result['processor'] / largest['read once']['processor']:10.1f}"
        before = found[sizes[-2]].get(step) if len(sizes) > 1 else None
        growth = math.nan
        if before is not None:
            growth = math.log(result["processor"] / before["processor"]) / math.log(sizes[-1] / sizes[-2])
        held &= not growth > EXPONENT
        print(f"{step:20} {ratio} {growth:9.2f}")
    peak = max(result["peak"] for steps in found.values() for result in steps.values())
    held &= peak <= limit
    print(f"largest peak {size(peak)} of {size(limit)}; exponents at most {EXPONENT}: {'held' if held else 'BROKEN'}")
    return held


if __name__ == "__main__":
    main()
