"""A finished run with the parts that several metrics need, and the rows that results become."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

import store
from profiler.metrics import controls
from profiler.metrics._trace import sequence_runs
from profiler.metrics.controls import uniform_tokens

SEGMENT_LENGTHS = (4, 16, 64, 256)
"""Segment lengths of the paper that introduced SRP and SCH, so that its published values stand beside a run's."""

REPLAY_COST = 5e9
"""Bound on tokens x requests per token x objects of one cache replay: about two seconds a policy on two cores."""

SEED = 0

Rows = list[dict[str, Any]]
"""Rows of table ``metric_value``; what a row leaves out takes its default there."""


BLOCK_TOKENS = 1 << 20
"""Tokens that are in memory at once, of a layer or two: what metrics of a trace of any length are computed from."""

CONTROLS = ("observed", "shuffled_in_sequence", "shuffled", "uniform")
"""The trace as it is, and the three controls (:mod:`profiler.metrics.controls`)."""


@dataclass(frozen=True)
class Block:
    """Some successive sequences of a run: their numbers, lengths, domains, and where each begins in a layer's ids."""

    number: int
    sequences: NDArray[np.int64]
    lengths: NDArray[np.int64]
    domains: NDArray[np.str_]
    offsets: NDArray[np.int64]

    @property
    def tokens(self) -> int:
        """Real tokens of the block."""
        return int(self.offsets[-1])


@dataclass
class Subject:
    """A finished run with the parts that several metrics need."""

    run: store.Run
    _held: dict[tuple[int, int], NDArray[np.int16]] = field(default_factory=dict, repr=False)
    _shuffled: tuple[tuple[int, str], NDArray[np.int64]] | None = field(default=None, repr=False)

    @cached_property
    def trace(self) -> store.Trace:
        """The whole trace."""
        return self.run.selections()

    @property
    def has_trace(self) -> bool:
        """Whether the run holds selections; imported counts do not."""
        return self.run.has_trace

    @cached_property
    def num_experts(self) -> int:
        """The largest number of routed experts of any layer."""
        return max(layer.num_experts for layer in self.run.layers)

    @cached_property
    def replayed(self) -> store.Trace:
        """The trace, or as many of its sequences, drawn at random, as a cache replay can take in good time."""
        layers, _, _, width = self.trace.ids.shape
        affordable = REPLAY_COST / (layers * width * layers * self.num_experts)
        sequences = len(self.trace.sequences)
        count = max(2, int(sequences * min(1.0, affordable / max(self.trace.num_tokens, 1))))
        # At random, not every n-th: domains often alternate, and a stride could pick a single one.
        drawn = np.random.default_rng(SEED).permutation(sequences)[:count]
        return part_of(self.trace, np.sort(drawn))

    @cached_property
    def blocks(self) -> list[Block]:
        """The run's sequences in blocks of at most ``BLOCK_TOKENS`` tokens (or of one longer sequence)."""
        frame = self.run.table("sequence").select("sequence", "tokens", "domain").sort("sequence")
        numbers, lengths = frame["sequence"].to_numpy().astype(np.int64), frame["tokens"].to_numpy().astype(np.int64)
        domains = frame["domain"].to_numpy().astype(np.str_)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        blocks: list[Block] = []
        for low, high in sequence_runs(offsets, BLOCK_TOKENS):
            within = offsets[low : high + 1] - offsets[low]
            blocks.append(Block(len(blocks), numbers[low:high], lengths[low:high], domains[low:high], within))
        return blocks

    def ids(self, axis: int, block: Block, *, control: str = "observed") -> NDArray[np.int16]:
        """Selections of entry ``axis`` of ``run.layers`` in a block: (tokens, k), sequence after sequence, -1 = none.

        ``control`` destroys a property (:data:`CONTROLS`), for all layers of a block alike: tokens keep their layers
        together. "shuffled" shuffles over the sequences of the block. Do not change the result in place.
        """
        key = (axis, block.number)
        if key not in self._held:
            while len(self._held) >= 3:
                del self._held[next(iter(self._held))]
            layer = self.run.layers[axis]
            first, last = int(block.sequences[0]), int(block.sequences[-1])
            read = self.run.layer_selections(layer=layer.layer, step=layer.step, first=first, last=last)
            self._held[key] = read.ids
        ids = self._held[key]
        if control == "observed":
            return ids
        if control == "uniform":
            return uniform_tokens(ids, self.run.layers[axis].num_experts, seed=(SEED, axis, block.number))
        return ids[self._order(block, control)]

    def _order(self, block: Block, control: str) -> NDArray[np.int64]:
        """The order in which a control reads the tokens of a block; kept for the block's other layers."""
        if self._shuffled is None or self._shuffled[0] != (block.number, control):
            generator = np.random.default_rng((SEED, block.number))
            order = generator.permutation(block.tokens)
            if control == "shuffled_in_sequence":
                owner = np.repeat(np.arange(len(block.lengths)), block.lengths)
                order = order[np.argsort(owner[order], kind="stable")]
            self._shuffled = ((block.number, control), order)
        return self._shuffled[1]

    def tokens_of(self, domain: str | None) -> int:
        """Real tokens of one domain, or of all text."""
        frame = self.run.table("sequence")
        return int((frame if domain is None else frame.filter(pl.col("domain") == domain))["tokens"].sum())


def lengths_that_fit(trace: store.Trace) -> list[int]:
    """Segment lengths that at least two sequences reach: with fewer there is no interval."""
    return [length for length in SEGMENT_LENGTHS if int((trace.lengths >= length).sum()) >= 2]


def with_controls(trace: store.Trace, num_experts: int) -> Iterator[tuple[str, NDArray[np.int16]]]:
    """The trace, and the three traces that say what popularity alone, and chance alone, would give."""
    common: dict[str, Any] = {"selections": trace.ids, "num_experts": num_experts, "seed": SEED}
    yield "observed", trace.ids
    yield "shuffled_in_sequence", controls.shuffle_within_sequences(**common)
    yield "shuffled", controls.shuffle_across_sequences(**common)
    yield "uniform", controls.uniform_experts(**common)


def part_of(trace: store.Trace, index: NDArray[np.int64]) -> store.Trace:
    """Some of a trace's sequences."""
    return store.Trace(
        ids=trace.ids[:, index],
        weights=trace.weights[:, index],
        layers=trace.layers,
        sequences=trace.sequences[index],
        lengths=trace.lengths[index],
        domains=[trace.domains[place] for place in index],
    )


def as_text(parameters: dict[str, Any]) -> str:
    """Parameters as the text that identifies them."""
    return json.dumps(parameters, sort_keys=True)
