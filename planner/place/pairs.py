"""Pairs of experts that one token uses, in a layer and in adjacent ones: what placements by affinity go by."""

from __future__ import annotations

import numpy as np

from moescope.errors import PlanError
from planner.place.stream import Part, Requests, over_parts
from planner.simulate.workload import Workload
from profiler.metrics._arrays import IntArray


def transitions(work: Requests) -> IntArray:
    """R of MoETuner: (layers - 1, E, E) tokens that use expert i of a layer and j of the next; all k x k pairs count.

    Raises:
        PlanError: passes hold several tokens, so that pairs are not known.
    """
    counts = np.zeros((max(work.num_layers - 1, 0), work.num_experts, work.num_experts), np.int64)
    for found in over_parts(work, _transitions):
        counts += found
    return counts


def coactivations(work: Requests) -> IntArray:
    """(layers, E, E) tokens that use both experts of a layer; symmetric, 0 on the diagonal.

    Raises:
        PlanError: as :func:`transitions`.
    """
    counts = np.zeros((work.num_layers, work.num_experts, work.num_experts), np.int64)
    for found in over_parts(work, _coactivations):
        counts += found
    both: IntArray = counts + counts.transpose(0, 2, 1)
    both[:, np.arange(work.num_experts), np.arange(work.num_experts)] = 0
    return both


def _transitions(part: Part) -> IntArray:
    from profiler.metrics._pairs import count_pairs

    mine = part.work
    require_tokens(mine)
    counts = np.zeros((max(mine.num_layers - 1, 0), 1, mine.num_experts, mine.num_experts), np.int64)
    alike = np.zeros(mine.num_requests, np.int64)
    for first, second, table in zip(mine.ids[:-1], mine.ids[1:], counts, strict=True):
        count_pairs(np.ascontiguousarray(first), np.ascontiguousarray(second), mine.offsets, alike, table)
    return counts[:, 0]


def _coactivations(part: Part) -> IntArray:
    """(layers, E, E) tokens that use both experts, each pair once."""
    from profiler.metrics._pairs import count_own_pairs

    mine = part.work
    require_tokens(mine)
    counts = np.zeros((mine.num_layers, 1, mine.num_experts, mine.num_experts), np.int64)
    alike = np.zeros(mine.num_requests, np.int64)
    for ids, table in zip(mine.ids, counts, strict=True):
        count_own_pairs(np.ascontiguousarray(ids), mine.offsets, alike, table)
    return counts[:, 0]


def require_tokens(work: Workload) -> None:
    """Refuse passes of several tokens.

    Raises:
        PlanError: which token used which expert is no longer known.
    """
    if (work.pass_tokens > 1).any():
        raise PlanError("passes of several tokens do not say which token used which expert: start from single tokens")
