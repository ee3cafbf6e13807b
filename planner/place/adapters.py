"""Experts fine-tuned for several tasks on one base model, as ExpertWeave serves them (arXiv 2508.17624).

An adapter replaces some experts of each layer. All share one tensor per layer of M + N * Emax slots: the base's M
experts, then Emax for each of N adapters, of which only pages that hold an expert take memory. A map [N, E] per layer
says where a request of an adapter finds each expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from moescope.errors import PlanError
from planner.place.pairs import require_tokens
from planner.simulate.workload import Workload
from profiler.metrics._arrays import FloatArray, IntArray

BASE = -1
"""The adapter of requests that use none."""


@dataclass(frozen=True)
class AdapterMaps:
    """Where adapters' experts lie.

    Attributes:
        slots: (layers, N, E) slot of each expert for requests of each adapter: its own number where the adapter leaves
            it as it is, else a slot behind the base's.
        num_experts: M = E, of the base.
        most: Emax, slots kept for each adapter in a layer.
        tuned: (layers, N) experts that each adapter replaces.
    """

    slots: IntArray
    num_experts: int
    most: int
    tuned: IntArray

    @property
    def num_adapters(self) -> int:
        """N."""
        return int(self.tuned.shape[1])

    @property
    def num_slots(self) -> int:
        """M + N * Emax, slots of a layer that have an address."""
        return self.num_experts + self.num_adapters * self.most

    @property
    def memory_factor(self) -> float:
        """See :func:`memory_factor`."""
        return memory_factor(tuned=self.tuned, num_experts=self.num_experts, most=self.most)

    def sparsity(self) -> FloatArray:
        """(N,) part of an adapter's slots that hold no expert, 0..1."""
        return 1.0 - self.tuned.mean(axis=0) / self.most if self.most else np.zeros(self.num_adapters)


def memory_factor(*, tuned: ArrayLike, num_experts: int, most: int | None = None) -> float:
    """L (M + N Emax) / sum over layers of (M + sum over adapters of e): padded slots over those in use, 1 or more.

    Args:
        tuned: (layers, N) experts e that each adapter replaces in each layer.
        num_experts: M, experts of a layer of the base.
        most: Emax; None = the largest of ``tuned``.

    Raises:
        PlanError: counts that cannot be.
    """
    counts = np.asarray(tuned, np.int64)
    if counts.ndim != 2 or not counts.size or num_experts < 1:
        raise PlanError(f"adapters of shape {counts.shape} on {num_experts} experts: give one row of counts per layer")
    limit = int(counts.max()) if most is None else most
    if counts.min() < 0 or counts.max() > limit or limit > num_experts:
        raise PlanError(
            f"adapters replace {counts.min()} to {counts.max()} experts with room for {limit}, of {num_experts}: give"
            " counts from 0 to the room, and room for no more than there are"
        )
    layers, adapters = counts.shape
    return float(layers * (num_experts + adapters * limit) / (layers * num_experts + counts.sum()))


def adapter_maps(*, tuned: Sequence[Sequence[Sequence[int]]], num_experts: int, most: int | None = None) -> AdapterMaps:
    """Maps from the experts that adapters replace.

    Args:
        tuned: for each adapter, for each layer, its experts (such as the chosen experts of an ESFT configuration).
        num_experts: E of the base.
        most: Emax; None = the most that any adapter replaces in any layer.

    Raises:
        PlanError: adapters of different depth, an expert out of range or named twice, or more than there is room for.
    """
    depths = {len(layers) for layers in tuned}
    if len(depths) != 1 or depths == {0}:
        raise PlanError(f"adapters have {sorted(depths)} layers: give at least one adapter, all of as many layers")
    layers = depths.pop()
    counts = np.array([[len(adapter[layer]) for adapter in tuned] for layer in range(layers)], np.int64)
    limit = int(counts.max()) if most is None else most
    memory_factor(tuned=counts, num_experts=num_experts, most=limit)
    slots = np.tile(np.arange(num_experts), (layers, len(tuned), 1))
    for number, adapter in enumerate(tuned):
        for layer, chosen in enumerate(adapter):
            ids = sorted(set(chosen))
            if len(ids) < len(chosen) or (ids and not 0 <= ids[0] <= ids[-1] < num_experts):
                raise PlanError(
                    f"adapter {number} replaces experts {list(chosen)} of layer {layer}: name each once, of 0 to"
                    f" {num_experts - 1}"
                )
            slots[layer, number, ids] = num_experts + number * limit + np.arange(len(ids))
    return AdapterMaps(slots, num_experts, limit, counts)


def remapped(work: Workload, maps: AdapterMaps, adapters: Sequence[int]) -> Workload:
    """The workload that an engine with adapters sees: objects are slots, so that replays and placements work on it.

    Args:
        work: one token per pass, of the base's experts. Put it into batches afterwards, not before.
        maps: where adapters' experts lie.
        adapters: of each request; :data:`BASE` = none.

    Raises:
        PlanError: they do not fit together, or passes of several tokens.
    """
    require_tokens(work)
    if (work.num_layers, work.num_experts) != (len(maps.slots), maps.num_experts):
        raise PlanError(
            f"the workload has {work.num_layers} layers of {work.num_experts} experts, the adapters {len(maps.slots)}"
            f" of {maps.num_experts}"
        )
    chosen = np.asarray(adapters, np.int64)
    if len(chosen) != work.num_requests:
        raise PlanError(f"{len(chosen)} adapters for {work.num_requests} requests: name one for each, {BASE} for none")
    wrong = chosen[(chosen < BASE) | (chosen >= maps.num_adapters)]
    if len(wrong):
        raise PlanError(f"there is no adapter {wrong[0]}: there are {maps.num_adapters}, from 0, and {BASE} for none")
    if maps.num_slots > np.iinfo(np.int16).max:
        raise PlanError(f"{maps.num_slots} slots per layer are more than replays can number: keep fewer adapters")
    same = np.tile(np.arange(maps.num_experts), (len(maps.slots), 1, 1))
    table = np.concatenate([same, maps.slots], axis=1)  # shape: (layers, 1 + N, E), the base first
    mine = chosen[work.request_of_pass] + 1
    ids = np.stack(
        [np.where(layer >= 0, table[at, mine[:, None], layer], -1) for at, layer in enumerate(work.ids)]
    ).astype(np.int16)
    return replace(work, ids=ids, num_experts=maps.num_slots)
