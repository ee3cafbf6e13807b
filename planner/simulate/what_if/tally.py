"""The sums over the tokens of one layer from which a result is made."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from planner.simulate.what_if.blocks import Block
from profiler.metrics._arrays import FloatArray, IntArray

GATE_SLACK = 0.01
"""Relative: gate weights and logits in 16 bits of a model are each off by up to 0.4 %."""


@dataclass
class Tally:
    """Sums of one layer. V values, W entries per token at most, E experts.

    Attributes:
        tokens: counted.
        selections: before.
        counts: (V, W + 1) tokens by active experts.
        counts_before: (W + 1,) the same before.
        load: (V, E) tokens of each expert.
        load_before: (E,) the same before.
        kept: (V,) mass on active experts.
        kept_before: mass before.
        same: (V,) tokens whose set is the same.
        kept_own: (V,) selections before that are still made.
        added: (V,) selections that are new.
        unknown: (V,) tokens whose answer the data do not prove.
        doubts: (V,) tokens whose answer the rounding of gate weights may have changed.
        agreeing: tokens whose recorded choice is that of the largest stored logits.
        same_agreeing: (V,) of these, tokens whose set is the same.
        gated: tokens on whose two largest gate weights and their logits a gate can be told.
        softmax: of these, tokens on which it is a softmax.
        figures: (V,) further sums by name.
    """

    tokens: int
    selections: int
    counts: IntArray
    counts_before: IntArray
    load: IntArray
    load_before: IntArray
    kept: FloatArray
    kept_before: float
    same: IntArray
    kept_own: IntArray
    added: IntArray
    unknown: IntArray
    doubts: IntArray
    same_agreeing: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    agreeing: int = 0
    gated: int = 0
    softmax: int = 0
    figures: dict[str, FloatArray] = field(default_factory=dict)

    @classmethod
    def empty(cls, values: int, width: int, experts: int) -> Tally:
        """Nothing counted yet."""
        same, kept_own, added, unknown, doubts = (np.zeros(values, np.int64) for _ in range(5))
        return cls(
            tokens=0,
            selections=0,
            counts=np.zeros((values, width + 1), np.int64),
            counts_before=np.zeros(width + 1, np.int64),
            load=np.zeros((values, experts), np.int64),
            load_before=np.zeros(experts, np.int64),
            kept=np.zeros(values),
            kept_before=0.0,
            same=same,
            kept_own=kept_own,
            added=added,
            unknown=unknown,
            doubts=doubts,
            same_agreeing=np.zeros(values, np.int64),
        )

    def add_before(self, ids: NDArray[np.int16], mass: FloatArray, own: IntArray) -> None:
        """Count the choice before: of each token the first ``own`` entries."""
        first = (np.arange(ids.shape[1]) < own[:, None]) & (ids >= 0)
        self.tokens += int((own > 0).sum())
        self.selections += int(first.sum())
        self.counts_before += np.bincount(own[own > 0], minlength=len(self.counts_before))
        self.load_before += np.bincount(ids[first], minlength=len(self.load_before))
        self.kept_before += float(mass[first].sum())

    def add_router(self, block: Block) -> IntArray:
        """Count how the router chose and weighed; (tokens,) 1 where its choice is that of the largest stored logits."""
        from planner.simulate.what_if._scores import gates

        assert block.scores is not None
        found, counted = agreement(block), np.zeros(2, np.int64)
        gates(
            np.ascontiguousarray(block.ids), block.weights, block.rounding, np.ascontiguousarray(block.scores.ids),
            block.scores.logits, GATE_SLACK, counted,
        )  # fmt: skip
        self.agreeing += int(found.sum())
        self.gated += int(counted[0])
        self.softmax += int(counted[1])
        return found

    def merge(self, other: Tally) -> None:
        """Add the sums of other tokens of the same layer."""
        self.counts = _added(self.counts, other.counts)
        self.counts_before = _added(self.counts_before, other.counts_before)
        for name in ("tokens", "selections", "load", "load_before", "kept", "kept_before", "same", "kept_own", "added",
                     "unknown", "doubts", "same_agreeing", "agreeing", "gated", "softmax"):  # fmt: skip
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name, values in other.figures.items():
            self.figures[name] = self.figures.get(name, 0.0) + values


def _added(first: IntArray, second: IntArray) -> IntArray:
    """The sum of two whose last axes may differ in length."""
    wide, narrow = (first, second) if first.shape[-1] >= second.shape[-1] else (second, first)
    total = wide.copy()
    total[..., : narrow.shape[-1]] += narrow
    return total


def prefix_tally(
    *,
    ids: NDArray[np.int16],
    critical: FloatArray,
    mass: FloatArray,
    own: IntArray,
    values: FloatArray,
    experts: int,
    beyond: FloatArray | None = None,
    block: Block | None = None,
    bounds: tuple[FloatArray, FloatArray] | None = None,
) -> Tally:
    """Count a rule under which each entry of a token's list is active at all values up to a critical one.

    Args:
        ids: (tokens, width) experts, -1 = none.
        critical: (tokens, width) float64.
        mass: (tokens, width) of each entry.
        own: (tokens,) so many first entries make the choice before; 0 leaves a token out.
        values: (V,) in any order.
        experts: E.
        beyond: (tokens,) at values up to it more is active than is listed; None: never.
        block: the tokens, where the router's own choice is to be held against their logits.
        bounds: (tokens, width) twice: where the critical value lies at least and at most.
    """
    from planner.simulate.what_if._prefix import doubtful, prefix

    size, width = len(values), ids.shape[1]
    order = np.argsort(values, kind="stable")
    rising = np.ascontiguousarray(values[order], np.float64)
    tally = Tally.empty(size, width, experts)
    tally.add_before(ids, mass, own)
    counts = np.zeros((size, width + 1), np.int64)
    load, kept = np.zeros((experts, size + 1), np.int64), np.zeros(size + 1)
    same, same_agreeing, kept_own, added, unknown = (np.zeros(size + 1, np.int64) for _ in range(5))
    agreeing = tally.add_router(block) if block is not None else np.zeros(len(ids), np.int64)
    beyond = np.full(len(ids), -np.inf) if beyond is None else beyond
    sums = (counts, load, kept, same, same_agreeing, kept_own, added, unknown)
    prefix(np.ascontiguousarray(ids), critical, mass, own, agreeing, beyond, rising, *sums)
    doubts = np.zeros(size, np.int64)
    if bounds is not None:
        doubtful(*bounds, own, rising, doubts)
    tally.counts[order], tally.load[order] = counts, _from_right(load).T
    tally.kept[order] = _from_right(kept)
    tally.doubts[order] = doubts
    others = {"same": same, "same_agreeing": same_agreeing, "kept_own": kept_own, "added": added, "unknown": unknown}
    for name, found in others.items():
        getattr(tally, name)[order] = _from_right(found)
    return tally


def _from_right(sums: NDArray[np.generic]) -> NDArray[np.generic]:
    """(.., V) of (.., V + 1): what stands at higher places than each."""
    return np.cumsum(sums[..., ::-1], axis=-1)[..., ::-1][..., 1:]


def agreement(block: Block) -> IntArray:
    """(tokens,) 1 where the recorded choice is that of the largest stored logits, ties either way; else 0."""
    from planner.simulate.what_if._scores import agrees

    assert block.scores is not None
    found = np.zeros(len(block.ids), np.int64)
    agrees(np.ascontiguousarray(block.ids), np.ascontiguousarray(block.scores.ids), block.scores.logits, found)
    return found
