"""A workload cut in order: what placements are fitted on, and the later windows that they are scored on."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from moescope.errors import PlanError
from planner.simulate.workload import Workload

By = Literal["requests", "passes"]


def windows(work: Workload, count: int, *, by: By = "requests") -> list[Workload]:
    """Consecutive windows.

    Args:
        work: the workload.
        count: windows.
        by: ``requests`` = whole ones, as many in each window; ``passes`` = as many forward passes in each, so that a
            request may begin in one window and end in the next.

    Raises:
        PlanError: there are fewer requests or passes than windows.
    """
    whole = work.num_requests if by == "requests" else work.num_passes
    if not 1 <= count <= whole:
        raise PlanError(f"{whole} {by} cannot be cut into {count} windows: give 1 to {whole}")
    edges = [whole * one // count for one in range(count + 1)]
    return [_between(work, first, last, by) for first, last in zip(edges[:-1], edges[1:], strict=True)]


def split(work: Workload, part: float, *, by: By = "requests") -> tuple[Workload, Workload]:
    """The first part of a workload, and the rest.

    Raises:
        PlanError: a part outside 0..1, or one side would be empty.
    """
    if not 0 < part < 1:
        raise PlanError(f"part {part:g} is outside (0, 1): give the part to fit on, such as 0.5")
    whole = work.num_requests if by == "requests" else work.num_passes
    if whole < 2:
        raise PlanError(f"{whole} of the {by} cannot be split into a first part and a later one: record more text")
    edge = min(max(round(part * whole), 1), whole - 1)
    return _between(work, 0, edge, by), _between(work, edge, whole, by)


def routed_only(work: Workload, num_experts: int) -> Workload:
    """The workload without experts that hold no weights (ids from E on), which every device has."""
    if work.num_experts <= num_experts:
        return work
    there = (work.ids >= 0) & (work.ids < num_experts)
    return replace(
        work, ids=np.where(there, work.ids, np.int16(-1)), tokens=np.where(there, work.tokens, np.uint16(0)),
        weights=None if work.weights is None else np.where(there, work.weights, np.float32(0)),
        num_experts=num_experts,
    )  # fmt: skip


def _between(work: Workload, first: int, last: int, by: By) -> Workload:
    if by == "requests":
        return work.requests(range(first, last))
    owner = work.request_of_pass[first:last]
    kept, lengths = np.unique(owner, return_counts=True)
    return replace(
        work, ids=work.ids[:, first:last], tokens=work.tokens[:, first:last],
        weights=None if work.weights is None else work.weights[:, first:last],
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), pass_tokens=work.pass_tokens[first:last],
        domains=tuple(work.domains[one] for one in kept), sequences=work.sequences[kept],
    )  # fmt: skip
