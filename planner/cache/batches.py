"""Sequences put together: in order of arrival, or so that what runs together needs few experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.cache.setting import Setting
from planner.simulate.grouping import grouped_requests
from planner.simulate.replay import replay
from planner.simulate.scheduling import queue_schedule, token_schedule
from planner.simulate.split import equal_split
from planner.simulate.timeline import timeline
from planner.simulate.workload import Workload, batched

SIZE = 8
"""Sequences at once where the setting has one alone."""

PROMPT = 32
"""Tokens by which requests are grouped: what is known of them before they run."""


@dataclass(frozen=True)
class BatchFigures:
    """One way to put sequences together, replayed with an LRU cache per layer.

    Attributes:
        title: in words.
        source: where it was published.
        size: tokens of a pass at most.
        unique: different experts that a layer reads per token: those of a pass by its tokens.
        hit_rate: 0..1.
        loads_per_token: bytes over the link.
        ms: per token.
    """

    title: str
    source: str
    size: int
    unique: float
    hit_rate: float
    loads_per_token: float
    ms: float


def batches(setting: Setting, *, slots: int, size: int | None = None) -> list[BatchFigures]:
    """Ways to put sequences together, order of arrival first. True routes are known to all: an upper end of each.

    Args:
        setting: model, machine and requests.
        slots: experts that the device holds.
        size: sequences at once; None = the setting's, or :data:`SIZE`.
    """
    work = setting.apart[1] if setting.apart is not None else setting.test
    size = size or (setting.batch if setting.batch > 1 else SIZE)
    pairs, swapped = (token_schedule(work, size=size, swaps=swaps) for swaps in (False, True))
    grouped = work.requests(grouped_requests(work, first=PROMPT))
    ways = (
        ("in order of arrival", "", batched(work, size=size)),
        ("two batches at a time, in order of arrival", "", pairs.before),
        ("two batches at a time, tokens regrouped by two-means", "ExpertFlow, arXiv 2410.17954", pairs.after),
        ("the same, then swapped while it helps", "ours", swapped.after),
        ("tokens that wait for the same expert", "Read-ME, arXiv 2410.19123",
         queue_schedule(work, size=size, window=2 * size)),
        (f"requests of like experts in their first {PROMPT} tokens", "after Symbolic-MoE", batched(grouped, size=size)),
    )  # fmt: skip
    return [_figures(setting, passes, title, source, size, slots) for title, source, passes in ways]


def _figures(setting: Setting, work: Workload, title: str, source: str, size: int, slots: int) -> BatchFigures:
    each = np.minimum(equal_split(num_layers=work.num_layers, slots=slots), work.num_experts)
    outcome = replay(work, policy="lru", layer_slots=each.tolist())
    clock = timeline(work, outcome, setting.costs_of(work), link=setting.machine.link)
    tokens = max(int(work.pass_tokens.sum()), 1)
    unique = int(work.needed.sum()) / (tokens * work.num_layers)
    return BatchFigures(
        title=title, source=source, size=size, unique=unique, hit_rate=outcome.hit_rate,
        loads_per_token=clock.bytes / tokens, ms=clock.ms_per_token,
    )  # fmt: skip
