"""Where a token's experts run: its home device, and which replica of an expert it is sent to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np

from moescope.errors import PlanError
from planner.place.pairs import require_tokens
from planner.place.slots import Placement
from planner.place.stream import Part
from planner.simulate.workload import Workload
from profiler.metrics._arrays import IntArray

Dispatch = Literal["local", "fair"]
"""``local`` = a replica on the home device where there is one (SGLang's static dispatch); ``fair`` = replicas in turn,
token by token, wherever they are (as EPLB reckons)."""


def routes(placement: Placement) -> IntArray:
    """(layers, D, E) the device that tokens of each home device are sent to for each expert.

    SGLang's static rule: a replica on the home device if there is one, else replicas are shared out fairly among the
    homes that have none. SGLang draws which home gets which at random; here homes take the replicas in turn.
    """
    device = placement.device_of_slot
    result = np.empty((placement.num_layers, placement.devices, placement.num_experts), np.int64)
    homes = np.arange(placement.devices)
    order = np.argsort(placement.experts, axis=1, kind="stable")  # slots, expert by expert
    for layer, count in enumerate(placement.counts()):
        first = np.cumsum(count) - count
        holder = device[order[layer]]
        single = count == 1
        result[layer][:, single] = holder[first[single]]
        for expert in np.flatnonzero(~single):
            mine = holder[first[expert] : first[expert] + count[expert]]
            own = np.isin(homes, mine)
            result[layer, own, expert] = homes[own]
            result[layer, ~own, expert] = mine[(np.arange((~own).sum()) + expert) % len(mine)]
    return result


def sent(
    part: Part, placement: Placement, *, home: IntArray, dispatch: Dispatch = "local"
) -> Iterator[tuple[IntArray, IntArray]]:
    """(pairs,) token and (pairs,) device of each pair of a token and one of its experts, layer after layer.

    Args:
        part: one token per pass.
        placement: of the same layers.
        home: (tokens,) home device of each token.
        dispatch: which replica is taken.

    Raises:
        PlanError: an unknown way to dispatch.
    """
    if dispatch not in get_args(Dispatch):
        raise PlanError(f"dispatch {dispatch!r} is unknown: choose local or fair")
    route = routes(placement)
    for layer, ids in enumerate(part.work.ids):
        token, rank = np.nonzero(ids >= 0)
        expert = ids[token, rank]
        if dispatch == "local":
            yield token, np.asarray(route[layer][home[token], expert])
            continue
        slots = placement.experts[layer]
        order = np.argsort(slots, kind="stable")
        count = np.bincount(slots, minlength=placement.num_experts)
        first = np.cumsum(count) - count
        turn = (token + part.before) % count[expert]
        yield token, np.asarray(placement.device_of_slot[order[first[expert] + turn]])


def homes_of(work: Workload, devices: int) -> IntArray:
    """(passes,) home device of each token: requests are dealt to devices in turn, as data-parallel attention has it."""
    return work.request_of_pass % devices


def passes_of(work: Workload, *, batch: int = 1, chunk: int | None = None) -> IntArray:
    """(tokens,) the forward pass that each token runs in, as ``batched`` and ``prefill`` put workloads together.

    Args:
        work: one token per pass.
        batch: requests decoded together, each until its end.
        chunk: instead, tokens of one request per pass, as prompts are read.

    Raises:
        PlanError: a batch or chunk below 1, or passes of several tokens.
    """
    require_tokens(work)
    owner = work.request_of_pass
    place = np.arange(work.num_passes) - work.offsets[owner]
    lengths = np.diff(work.offsets)
    if chunk is not None:
        if chunk < 1:
            raise PlanError(f"chunk {chunk} is no number of tokens: give at least 1")
        first = np.cumsum(-(-lengths // chunk)) - -(-lengths // chunk)
        return np.asarray(first[owner] + place // chunk)
    if batch < 1:
        raise PlanError(f"batch {batch} is no number of sequences: give at least 1")
    longest = np.maximum.reduceat(lengths, np.arange(0, len(lengths), batch))
    first = np.cumsum(longest) - longest
    return np.asarray(first[owner // batch] + place)
