"""Small traces for the importers' tests, as arrays, and what a run of them must say, counted in plain Python."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import store
from profiler.importers.job import import_run
from profiler.importers.recording import ImportOptions


@dataclass(frozen=True)
class Arrays:
    """A trace: experts (tokens, layers, k), weights of the same shape, offsets (sequences + 1,)."""

    experts: NDArray[np.int64]
    weights: NDArray[np.float32]
    offsets: NDArray[np.int64]
    num_experts: int


def arrays(*, lengths: tuple[int, ...] = (3, 700, 1, 40), layers: int = 3, experts: int = 6, k: int = 2) -> Arrays:
    """Random distinct experts with weights in descending order; the same every time."""
    generator = np.random.default_rng(7)
    tokens = sum(lengths)
    ids = np.argsort(generator.random((tokens, layers, experts)), axis=-1)[..., :k]
    weights = np.sort(generator.random((tokens, layers, k)).astype(np.float32), axis=-1)[..., ::-1]
    return Arrays(ids, np.ascontiguousarray(weights), np.cumsum([0, *lengths]), experts)


def write_npz(path: Path, trace: Arrays, **more: Any) -> Path:
    """The trace as the plain .npz format."""
    content = {"experts": trace.experts.astype(np.uint8), "weights": trace.weights, "offsets": trace.offsets}
    np.savez(path, **(content | {"num_experts": np.int64(trace.num_experts)} | more))
    return path


def bring_in(format_name: str, path: Path, directory: Path, *, name: str = "mine", **options: Any) -> store.Run:
    """Import without metrics and open the run."""
    target = import_run(
        format_name, path, directory=directory, name=name, options=ImportOptions(**options), metrics=False
    )
    return store.open_run(target)


def selections_of(run: store.Run) -> dict[tuple[int, int], int]:
    """Selections per (layer, expert), by table ``expert_load``; experts without any are left out."""
    counts: Counter[tuple[int, int]] = Counter()
    for layer, expert, tokens in run.table("expert_load").select("layer", "expert", "tokens").iter_rows():
        counts[layer, expert] += tokens
    return {key: count for key, count in counts.items() if count}


def left_behind(directory: Path) -> list[str]:
    """What stands in a store."""
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []
