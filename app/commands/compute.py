"""``moescope runs compute``: the metrics of a finished run again, on its whole trace, within a limit, or on Ray."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.commands.options import add_memory_limit, positive

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

WORKERS = 2


def add_compute(parser: argparse.ArgumentParser) -> None:
    """Options of ``runs compute``."""
    group = parser.add_argument_group("compute")
    group.add_argument(
        "--whole", action="store_true",
        help="hit rates of every layer's own cache on every token, instead of a sample of 262,144",
    )  # fmt: skip
    group.add_argument(
        "--ray", metavar="ADDRESS", help="layers go over workers: local (this machine), or HOST:PORT of a Ray cluster"
    )
    group.add_argument("--workers", type=positive, metavar="N", help=f"how many, each with a CPU (default {WORKERS})")
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
    if options.workers is not None and options.ray is None:
        raise InputError("--workers is about workers on Ray: give --ray local or --ray HOST:PORT too")


def compute(options: argparse.Namespace, path: Path) -> None:
    """Compute the metrics of one run, and say where they are and what it took."""
    from moescope import memory
    from profiler.headline import compute_and_store

    with memory.limited(options.memory_limit), _joined(options) as joined:
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
    from app.text import progress_line

    end = "\r" if not words else ""
    print("\r" + progress_line(words), end=end, file=sys.stderr, flush=True)


def _joined(options: argparse.Namespace) -> AbstractContextManager[Any]:
    if options.ray is None:
        return nullcontext()
    from moescope import cluster

    return cluster.connected(options.ray, workers=options.workers or WORKERS)
