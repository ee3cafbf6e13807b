"""Tables keyed by what was seen, such as sets of experts: which experts followed, how often. Only seen keys cost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.simulate.workload import Ids

Keys = NDArray[np.uint64]


@dataclass(frozen=True)
class SeenSets:
    """Rows of counts, one per key: memory grows with the passes that were seen, never with all possible sets.

    Attributes:
        keys: (rows,) ascending.
        starts: (rows + 1,) where each row begins in ``experts`` and ``counts``.
        experts: those that followed.
        counts: how many tokens chose them.
        passes: (rows,) how often the key was seen.
    """

    keys: Keys
    starts: NDArray[np.int64]
    experts: Ids
    counts: NDArray[np.int64]
    passes: NDArray[np.int64]

    def rows_of(self, keys: Keys) -> NDArray[np.int64]:
        """(passes,) the row of each key, -1 = never seen; key 0 stands for nothing at all."""
        if not len(self.keys):
            return np.full(len(keys), -1, np.int64)
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where((self.keys[at] == keys) & (keys != 0), at, -1).astype(np.int64)


def set_keys(ids: Ids, *, num_experts: int) -> Keys:
    """(passes,) one 64-bit number per set of experts (passes, width), whatever their order; 0 = the empty set.

    Sums of fixed random numbers: among n sets two share a number with probability n^2 / 2^65, 3e-8 for a million.
    """
    words = np.random.default_rng(20_230_814).integers(1, 2**64, num_experts + 1, dtype=np.uint64)
    words[-1] = 0  # what -1 finds
    keys: Keys = words[ids].sum(axis=-1, dtype=np.uint64)
    return keys


def pair_keys(first: Keys, second: Keys) -> Keys:
    """Keys of two sets in order; 0 where either is empty."""
    pair: Keys = first * np.uint64(0x9E3779B97F4A7C15) + (second ^ (second >> np.uint64(29)))
    return np.where((first == 0) | (second == 0), np.uint64(0), pair)


def count_after(keys: Keys, ids: Ids, tokens: NDArray[np.uint16], *, num_experts: int) -> SeenSets:
    """Which experts (passes, width) were chosen after each key (passes,), by how many tokens; key 0 is left out."""
    known, row, passes = np.unique(keys, return_inverse=True, return_counts=True)
    cells = row[:, None].astype(np.int64) * num_experts + ids
    used = (ids >= 0) & (keys != 0)[:, None]
    found, place = np.unique(cells[used], return_inverse=True)
    counts = np.bincount(place, weights=tokens[used], minlength=len(found)).astype(np.int64)
    starts = np.searchsorted(found // num_experts, np.arange(len(known) + 1)).astype(np.int64)
    return SeenSets(known, starts, (found % num_experts).astype(np.int16), counts, passes.astype(np.int64))


def joined(tables: list[SeenSets]) -> tuple[NDArray[np.int64], Ids, NDArray[np.int64], NDArray[np.int64]]:
    """(starts, experts, counts, passes) of several tables, the rows of one after those of another."""
    ends = np.cumsum([0] + [len(one.experts) for one in tables])
    starts = [one.starts[:-1] + end for one, end in zip(tables, ends, strict=False)]
    return (
        np.concatenate([*starts, ends[-1:]]).astype(np.int64),
        np.concatenate([one.experts for one in tables] or [np.empty(0, np.int16)]),
        np.concatenate([one.counts for one in tables] or [np.empty(0, np.int64)]),
        np.concatenate([one.passes for one in tables] or [np.empty(0, np.int64)]),
    )
