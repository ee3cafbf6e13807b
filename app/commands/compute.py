"""``moescope runs compute``: the metrics of a finished run again, on its whole trace, within a limit, or on Ray."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from app import line
from app.commands.on_ray import add_ray, on_ray, require_ray
from app.commands.options import add_memory_limit


def add_compute(parser: argparse.ArgumentParser) -> None:
    """Options of ``runs compute``."""
    group = parser.add_argument_group("compute")
    group.add_argument(
        "--whole", action="store_true",
        help="hit rates of every layer's own cache on every token, instead of a sample of 262,144",
    )  # fmt: skip
    add_ray(group, "layers go over workers")
    add_memory_limit(parser)


def require_compute(options: argparse.Namespace) -> None:
    """Refuse these options with another action, and workers without a Ray.

    Raises:
        InputError: the first of them, by name.
    """
    from moescope.errors import InputError

    given = {
        "--whole": options.whole,
        "--ray": options.ray is not None,
        "--workers": options.workers is not None,
        "--memory-limit": options.memory_limit is not None,
    }
    found = [name for name, there in given.items() if there]
    if options.action != "compute" and found:
        raise InputError(f"{found[0]} belongs to runs compute NAME: leave it out of runs {options.action}")
    require_ray(options)


def compute(options: argparse.Namespace, path: Path) -> None:
    """Compute the metrics of one run, and say where they are and what it took."""
    from moescope import memory
    from profiler.headline import compute_and_store

    with memory.limited(options.memory_limit), on_ray(options) as joined:
        target = compute_and_store(path, whole=options.whole, joined=joined, tell=None if options.json else tell)
    peaks = {} if options.memory_limit is None else {"peak_memory": memory.peak()}
    if joined is not None:
        peaks["worker_peak_memory"] = memory.worker_peak()
    if options.json:
        print(json.dumps({"metrics": str(target), **peaks}))
        return
    tell("")
    print(f"metrics: {target}")
    if peaks:
        print(memory.summary(options.memory_limit), file=sys.stderr)


def tell(words: str) -> None:
    """One line on stderr, printed over itself."""
    if words:
        line.over(words)
    else:
        line.clear()
