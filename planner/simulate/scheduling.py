"""Which tokens run together, so that fewer experts are needed at a time.

- :func:`token_schedule`: the tokens of two batches, regrouped into two equal ones (ExpertFlow, arXiv 2410.17954).
- :func:`queue_schedule`: the tokens that wait for the most wanted expert run first (Read-ME, arXiv 2410.19123).

What they return is replayed beside the same tokens in order of arrival. Which requests follow each other:
:mod:`planner.simulate.grouping`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moescope.errors import PlanError
from planner.simulate.workload import Ids, Workload, united
from profiler.metrics._arrays import FloatArray, ratio

Bools = NDArray[np.bool_]
Whole = NDArray[np.int64]

ROUNDS = 50
"""Rounds of two-means at most; they end by themselves long before."""


@dataclass(frozen=True)
class TokenSchedule:
    """Two batches of tokens at a time, as they stood and regrouped.

    Attributes:
        before: passes in order of arrival.
        after: the same tokens, regrouped; as many passes, each of as many tokens.
    """

    before: Workload
    after: Workload

    @property
    def unique_before(self) -> FloatArray:
        """(layers,) experts that a pass needs, on average."""
        return unique_experts(self.before)

    @property
    def unique_after(self) -> FloatArray:
        """The same of the regrouped passes."""
        return unique_experts(self.after)


def unique_experts(workload: Workload) -> FloatArray:
    """(layers,) different experts that a pass needs, on average."""
    return ratio(workload.needed.sum(axis=1), np.full(workload.num_layers, workload.num_passes))


def token_schedule(workload: Workload, *, size: int, routes: Ids | None = None, swaps: bool = True) -> TokenSchedule:
    """Requests decoded two batches at a time, the tokens of both regrouped at every position.

    Two batches of ``size`` requests are decoded side by side. At every position their tokens run in two passes: first
    the earlier half, then the later half (before), or two halves chosen by :func:`two_batches` (after). Once no more
    than ``size`` requests are left, one pass takes them all.

    Args:
        workload: of one token per pass.
        size: tokens of a batch.
        routes: what the choice is made by: experts foreseen before the pass, (layers, passes, width), such as
            ``Predicted.ids``; None = the true ones, which flatters. ExpertFlow foresees them by a trained model.
        swaps: as in :func:`two_batches`.

    Raises:
        PlanError: a size below 1, passes of several tokens, or routes of other passes.
    """
    _check_single(workload, size)
    known = workload.ids if routes is None else routes
    if known.shape[:2] != workload.ids.shape[:2]:
        raise PlanError(
            f"routes of {known.shape[1]} passes for a workload of {workload.num_passes}: foresee these passes"
        )
    before: list[list[list[int]]] = []
    after: list[list[list[int]]] = []
    names, numbers = [], []
    for first in range(0, workload.num_requests, 2 * size):
        members = np.arange(first, min(first + 2 * size, workload.num_requests))
        plain: list[list[int]] = []
        chosen: list[list[int]] = []
        for tokens in _positions(workload, members):
            if len(tokens) <= size:
                plain.append(tokens.tolist())
                chosen.append(tokens.tolist())
                continue
            second = two_batches(known[:, tokens], num_experts=workload.num_experts, swaps=swaps)
            half = (len(tokens) + 1) // 2
            plain += [tokens[:half].tolist(), tokens[half:].tolist()]
            chosen += [tokens[~second].tolist(), tokens[second].tolist()]
        before.append(plain)
        after.append(chosen)
        names.append(_domain(workload, members))
        numbers.append(int(workload.sequences[first]))
    return TokenSchedule(united(workload, before, names, numbers), united(workload, after, names, numbers))


def two_batches(routes: Ids, *, num_experts: int, swaps: bool = True) -> Bools:
    """Tokens in two equal batches that need few experts together: (tokens,), True = the second batch.

    Balanced two-means on bit sets of (layer, expert) by Hamming distance, as ExpertFlow describes (not verified in its
    code). The first centres are the token farthest from the first one and the token farthest from that; the half of
    the tokens that leans most towards the first centre makes the first batch; centres are then the means. Of all
    rounds, and of the order of arrival, the grouping that needs the fewest experts is kept. Ties go to the earlier
    token. It is a local optimum; the least is found only by trying all halves.

    Args:
        routes: (layers, tokens, width) experts of each token, -1 = none.
        num_experts: E.
        swaps: then tokens are swapped while a swap saves experts. Ours; never worse.
    """
    bits = route_bits(routes, num_experts=num_experts).astype(np.float64)  # shape: (tokens, layers x E)
    half = (len(bits) + 1) // 2
    best = np.arange(len(bits)) >= half
    if len(bits) < 2:
        return best
    start = _farthest(bits, bits[0])
    centres = np.stack([bits[start], bits[_farthest(bits, bits[start])]])
    least, last = _union(bits, best), np.zeros(0, np.bool_)
    for _ in range(ROUNDS):
        nearer = (bits @ (centres[0] - centres[1])).round(9)  # half the difference of the distances, but for a constant
        second = np.ones(len(bits), np.bool_)
        second[np.argsort(-nearer, kind="stable")[:half]] = False
        if np.array_equal(second, last):
            break
        cost = _union(bits, second)
        if cost < least:
            best, least = second, cost
        centres, last = np.stack([bits[~second].mean(axis=0), bits[second].mean(axis=0)]), second
    if swaps:
        from planner.simulate._scheduling import swap_tokens

        layers = np.arange(len(routes), dtype=np.int32)[:, None, None] * num_experts
        objects = np.where(routes >= 0, routes + layers, -1).transpose(1, 0, 2).reshape(len(bits), -1)
        swap_tokens(np.ascontiguousarray(objects, np.int32), best)
    return best


def route_bits(routes: Ids, *, num_experts: int) -> Bools:
    """(tokens, layers x E) which experts each token uses; routes (layers, tokens, width), -1 = none."""
    layers, tokens, _ = routes.shape
    bits = np.zeros((tokens, layers, num_experts + 1), np.bool_)
    bits[np.arange(tokens)[:, None], np.arange(layers)[:, None, None], routes] = True  # -1 falls into the last column
    return bits[:, :, :-1].reshape(tokens, -1)


def queue_schedule(workload: Workload, *, size: int, window: int) -> Workload:
    """Requests whose next tokens run together by the expert that most of them wait for, as Read-ME batches.

    ``window`` requests are open; each has one token ready. The (layer, expert) that most ready tokens use is the
    longest queue; the tokens in it run in one pass, at most ``size`` of them, those that waited longest first. When a
    token was passed over ``window`` times, the longest of the queues that it stands in runs (ours: what the original
    does against starvation is not verified). An ended request makes room for the next. Routes have to be known
    beforehand, as Read-ME's are.

    Args:
        workload: of one token per pass.
        size: tokens of a pass at most.
        window: requests that are open at a time, at least ``size``.

    Raises:
        PlanError: a size below 1, a window below it, or passes of several tokens.
    """
    _check_single(workload, size)
    if window < size:
        raise PlanError(f"{window} open requests cannot fill passes of {size} tokens: open at least {size}")
    position, ends = workload.offsets[:-1].copy(), workload.offsets[1:]
    waited = np.zeros(workload.num_requests, np.int64)
    opened = list(range(min(window, workload.num_requests)))
    next_one = len(opened)
    passes: list[list[int]] = []
    while opened:
        chosen = _longest_queue(workload, np.array(opened), position, waited, size, window)
        passes.append(position[chosen].tolist())
        waited[opened] += 1
        waited[chosen] = 0
        position[chosen] += 1
        for request in [one for one in chosen.tolist() if position[one] == ends[one]]:
            opened.remove(request)
            if next_one < workload.num_requests:
                opened.append(next_one)
                next_one += 1
    everyone = np.arange(workload.num_requests)
    return united(workload, [passes], [_domain(workload, everyone)], workload.sequences[:1].tolist())


def _longest_queue(workload: Workload, opened: Whole, position: Whole, waited: Whole, size: int, window: int) -> Whole:
    """Open requests whose tokens run next: of the longest queue, those that waited longest; ties to the smaller."""
    order = opened[np.lexsort((opened, -waited[opened]))]
    bits = route_bits(workload.ids[:, position[order]], num_experts=workload.num_experts)
    queue = int(bits.sum(axis=0).argmax())
    if waited[order[0]] >= window:  # starved: the longest queue of those that it stands in
        queue = int((bits.sum(axis=0) * bits[0]).argmax())
    chosen = bits[:, queue] if bits.any() else np.ones(len(order), np.bool_)
    return order[chosen][:size]


def _positions(workload: Workload, members: Whole) -> list[Whole]:
    """Passes of the same position of several requests, position after position, in order of the requests."""
    starts, lengths = workload.offsets[members], np.diff(workload.offsets)[members]
    return [starts[lengths > at] + at for at in range(int(lengths.max()))]


def _farthest(bits: FloatArray, centre: FloatArray) -> int:
    return int(np.abs(bits - centre).sum(axis=1).argmax())


def _union(bits: FloatArray, second: Bools) -> int:
    """Experts that both batches need, over all layers."""
    return sum(int(bits[part].any(axis=0).sum()) for part in (second, ~second) if part.any())


def _domain(workload: Workload, members: Whole) -> str:
    names = {workload.domains[one] for one in members}
    return names.pop() if len(names) == 1 else "mixed"


def _check_single(workload: Workload, size: int) -> None:
    if size < 1:
        raise PlanError(f"batch {size} is no number of tokens: give at least 1")
    if (workload.pass_tokens > 1).any():
        raise PlanError("passes of several tokens cannot be put together again: start from single tokens")
