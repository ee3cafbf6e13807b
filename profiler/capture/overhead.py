"""By how much the profiler slows a model down: interleaved rounds with and without it, and a bootstrap interval."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

BOOTSTRAP = 2000
"""Resamples behind an interval."""


@dataclass(frozen=True)
class Timing:
    """Times of one variant over the rounds, in seconds.

    Attributes:
        name: the variant.
        cpu: (rounds,) processor time of the process; what another process does on the machine hardly enters it.
        wall: (rounds,) elapsed time.
    """

    name: str
    cpu: NDArray[np.float64]
    wall: NDArray[np.float64]


@dataclass(frozen=True)
class Overhead:
    """Slow-down by the profiler, as a part of the bare forward's time (0.03 = 3 % slower).

    Attributes:
        level: what was recorded.
        value: the estimate, the median over the rounds.
        low: lower end of its 95 % interval.
        high: upper end.
        rounds: pairs of forwards that were timed.
        clock: ``process`` or ``wall``.
    """

    level: str
    value: float
    low: float
    high: float
    rounds: int
    clock: str

    def __str__(self) -> str:
        return (
            f"recording {self.level} slows the forwards down by {self.value:+.1%}"
            f" (95 % interval {self.low:+.1%} to {self.high:+.1%}, {self.rounds} rounds, {self.clock} time)"
        )

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return dict(self.__dict__)


def measure_overhead(
    model: nn.Module,
    forward: Callable[[], object],
    *,
    level: str = "routing",
    rounds: int = 9,
    watched: Callable[[], object] | None = None,
    stack: str | None = None,
) -> Overhead:
    """Slow-down of ``forward`` by the profiler, writing of shards included.

    Args:
        model: the model that ``forward`` runs.
        forward: runs one batch.
        level: what to record, a comma list.
        rounds: pairs of forwards.
        watched: what runs in its place with the profiler, where a level asks for more than a forward.
        stack: which layers are watched, see :func:`profiler.watch`.
    """
    timings = time_levels(model, forward, levels=[level], rounds=rounds, watched=watched, stack=stack)
    # A GPU works while the processor waits, so only elapsed time counts there.
    clock = "wall" if next(model.parameters()).device.type == "cuda" else "process"
    return compare(timings[0], timings[1], level=level, clock=clock)


def time_levels(
    model: nn.Module,
    forward: Callable[[], object],
    *,
    levels: Sequence[str],
    rounds: int,
    watched: Callable[[], object] | None = None,
    stack: str | None = None,
) -> list[Timing]:
    """Times of the bare forward and of one variant per level, in interleaved rounds.

    Each round runs every variant once, in an order that rotates. What the rounds of a level recorded is written as one
    shard at the end, and each round bears its part of that: shards are written every few seconds, not every batch.
    """
    from profiler.capture.watch import watch

    names, watched = ["bare", *levels], watched or forward
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="moescope-overhead-") as folder:
        sessions = {
            level: watch(model, store=folder, name=f"level{place}", level=level, flush_seconds=math.inf, stack=stack)
            for place, level in enumerate(levels)
        }
        for session in sessions.values():
            _time(watched, session.attached)  # sampled and recomputed, as the first forward of every run
            session.flush()
        _time(forward)
        for turn in range(rounds):
            for place in range(len(names)):
                name = names[(place + turn) % len(names)]
                run, around = (watched, sessions[name].attached) if name in sessions else (forward, nullcontext)
                times[name].append(_time(run, around))
        shares = {level: np.array(_time(session.flush)) / rounds for level, session in sessions.items()}
    return [Timing(name, *(np.array(measured) + shares.get(name, 0.0)).T) for name, measured in times.items()]


def compare(bare: Timing, other: Timing, *, level: str, clock: str = "process") -> Overhead:
    """Slow-down of one variant against the bare forward: the median over rounds, with a bootstrap interval.

    The two forwards of a round run one after the other, so what slows the machine for a while slows both.
    """
    before, after = (bare.cpu, other.cpu) if clock == "process" else (bare.wall, other.wall)
    ratios = after / before - 1
    picks = np.random.default_rng(0).integers(0, len(ratios), (BOOTSTRAP, len(ratios)))
    low, high = np.quantile(np.median(ratios[picks], axis=1), [0.025, 0.975])
    return Overhead(level, float(np.median(ratios)), float(low), float(high), len(ratios), clock)


def _time(
    work: Callable[[], object], around: Callable[[], AbstractContextManager[object]] = nullcontext
) -> tuple[float, float]:
    """Processor and elapsed seconds of some work and of what is put around it."""
    _wait()
    cpu, wall = time.process_time(), time.perf_counter()
    with around():
        work()
    _wait()
    return time.process_time() - cpu, time.perf_counter() - wall


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
