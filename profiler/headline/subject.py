"""A finished run with the parts that several metrics need, and the rows that results become."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

import store
from moescope import memory
from moescope.errors import InputError
from moescope.sizes import size
from profiler.headline.spool import Spool
from profiler.metrics import controls
from profiler.metrics._intervals import resample_weights
from profiler.metrics._trace import sequence_runs
from profiler.metrics.controls import uniform_tokens

SEGMENT_LENGTHS = (4, 16, 64, 256)
"""Segment lengths of the paper that introduced SRP and SCH, so that its published values stand beside a run's."""

REPLAY_COST = 5e9
"""Bound on tokens x requests per token x objects of one cache replay: about two seconds a policy on two cores."""

REPLAY_TOKENS = 20_000
"""Tokens that are replayed through a shared cache even where that costs more."""

MAX_GROUPS = 512
"""Sequences beyond so many are drawn anew in groups, so that intervals cost the same for a trace of any length."""

SEED = 0

Made = TypeVar("Made")

Rows = list[dict[str, Any]]
"""Rows of table ``metric_value``; what a row leaves out takes its default there."""


BLOCK_TOKENS = 1 << 20
"""Tokens that are in memory at once, of a layer or two: what metrics of a trace of any length are computed from."""

BLOCK_COPIES = 8
"""Times that a block's ids are in memory while they are unpacked and counted: with three blocks held, at most."""

NUM_RESAMPLES = 1000
"""Texts drawn anew for intervals of hit rates."""

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


@dataclass(frozen=True)
class Groups:
    """Sequences, or random groups of one domain's sequences, as what a bootstrap draws from.

    group (sequences,): group of each sequence in the order of the run; domain (groups,): whose domain it is.
    """

    group: NDArray[np.int64]
    domain: NDArray[np.str_]

    @property
    def count(self) -> int:
        """How many groups there are."""
        return len(self.domain)

    @classmethod
    def of(cls, domains: NDArray[np.str_], max_groups: int | None = None) -> Groups:
        """Every sequence by itself, or, of more than ``max_groups``, groups in proportion to the domains' sequences."""
        max_groups = max_groups or MAX_GROUPS
        if len(domains) <= max_groups:
            return cls(np.arange(len(domains)), domains)
        group = np.zeros(len(domains), np.int64)
        owners: list[str] = []
        for domain in np.unique(domains):
            members = np.flatnonzero(domains == domain)
            share = max(1, min(len(members), round(max_groups * len(members) / len(domains))))
            order = np.random.default_rng(SEED).permutation(len(members))
            group[members] = len(owners) + order % share
            owners += [str(domain)] * share
        return cls(group, np.array(owners))

    def of_block(self, blocks: Sequence[Block], number: int) -> NDArray[np.int64]:
        """(sequences,) groups of the sequences of one block."""
        first = sum(len(block.lengths) for block in blocks[:number])
        return self.group[first : first + len(blocks[number].lengths)]


class Shuffles:
    """The orders in which controls read the tokens of a block: the same for all of its layers."""

    def __init__(self) -> None:
        self._orders: dict[tuple[int, str], NDArray[np.int64]] = {}

    def order(self, block: Block, control: str) -> NDArray[np.int64]:
        """(tokens,) for "shuffled" or "shuffled_in_sequence"."""
        key = (block.number, control)
        if key not in self._orders:
            while len(self._orders) >= 2:
                del self._orders[next(iter(self._orders))]
            order = np.random.default_rng((SEED, block.number)).permutation(block.tokens)
            if control == "shuffled_in_sequence":
                owner = np.repeat(np.arange(len(block.lengths)), block.lengths)
                order = order[np.argsort(owner[order], kind="stable")]
            self._orders[key] = order
        return self._orders[key]


@dataclass
class Sample:
    """Some sequences of a run, drawn at random over all blocks; all of them where they are few enough.

    block: their numbers, lengths and domains, as if they were the run's only ones; group (sequences,): of ``Groups``.
    """

    subject: Subject
    block: Block
    group: NDArray[np.int64]
    _chosen: list[NDArray[np.int64]]
    _shuffles: Shuffles = field(default_factory=Shuffles)

    @classmethod
    def of(cls, subject: Subject, tokens: int) -> Sample:
        """At least two sequences of about so many tokens in all."""
        lengths = subject.lengths
        # At random, not every n-th: domains often alternate, and a stride could pick a single one.
        order = np.random.default_rng(SEED).permutation(len(lengths))
        count = max(2, int(np.searchsorted(np.cumsum(lengths[order]), tokens, side="right")))
        mine = np.zeros(len(lengths), bool)
        mine[order[:count]] = True
        edges = np.cumsum([0, *(len(block.lengths) for block in subject.blocks)])
        chosen = [np.flatnonzero(mine[low:high]) for low, high in itertools.pairwise(edges)]
        picked = [(block, index) for block, index in zip(subject.blocks, chosen, strict=True)]
        numbers = np.concatenate([block.sequences[index] for block, index in picked])
        domains = np.concatenate([block.domains[index] for block, index in picked])
        offsets = np.concatenate([[0], np.cumsum(lengths[mine])]).astype(np.int64)
        block = Block(subject.usual_blocks, numbers, lengths[mine], domains, offsets)
        return cls(subject, block, subject.groups.group[mine], chosen)

    @cached_property
    def drawn(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """What texts are drawn anew from: (sequences,) group of each, without groups that have none here, from 0; and
        (1 + resamples, groups) how often each is drawn, the first row all once.
        """
        present, group = np.unique(self.group, return_inverse=True)
        return group, resampled(np.ones(len(present), bool))

    def pieces(self, axis: int, control: str = "observed") -> Iterator[tuple[slice, Block, NDArray[np.int16]]]:
        """What a layer is read in: which of these sequences, their block, and their ids.

        All sequences come block by block; fewer, and controls, which shuffle over sequences, at once.
        """
        if not self.is_all or control != "observed":
            yield slice(0, len(self.block.lengths)), self.block, self.ids(axis, control=control)
            return
        first = 0
        for block in self.subject.blocks:
            yield slice(first, first + len(block.lengths)), block, self.subject.ids(axis, block)
            first += len(block.lengths)

    @property
    def is_all(self) -> bool:
        """Whether no sequence was left out."""
        return len(self.block.lengths) == len(self.subject.lengths)

    def ids(self, axis: int, *, control: str = "observed") -> NDArray[np.int16]:
        """Selections of entry ``axis`` of ``run.layers``: (tokens, k), as ``Subject.ids``."""
        parts = []
        for block, index in zip(self.subject.blocks, self._chosen, strict=True):
            kept = np.zeros(len(block.lengths), bool)
            kept[index] = True
            ids = self.subject.ids(axis, block)
            parts.append(ids if kept.all() else ids[np.repeat(kept, block.lengths)])
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if control == "observed":
            return whole
        if control == "uniform":
            return uniform_tokens(whole, self.subject.run.layers[axis].num_experts, seed=(SEED, axis))
        return whole[self.order(control)]

    def order(self, control: str) -> NDArray[np.int64]:
        """(tokens,) the order in which control "shuffled" or "shuffled_in_sequence" reads the tokens."""
        return self._shuffles.order(self.block, control)


@dataclass
class Subject:
    """A finished run with the parts that several metrics need.

    whole: hit rates of every layer's own cache rest on all tokens, not on a sample.
    """

    run: store.Run
    whole: bool = False
    _held: dict[tuple[int, int], NDArray[np.int16]] = field(default_factory=dict, repr=False)
    _samples: dict[int, Sample] = field(default_factory=dict, repr=False)
    _spool: Spool = field(default_factory=Spool, repr=False)
    _made: dict[Callable[[Subject], Any], Any] = field(default_factory=dict, repr=False)

    @property
    def has_trace(self) -> bool:
        """Whether the run holds selections; imported counts do not."""
        return self.run.has_trace

    @property
    def has_whole_trace(self) -> bool:
        """Whether it holds those of every sequence (``--trace-every``), as its sums do."""
        return self.has_trace and int(self.lengths.sum()) == self.tokens_of(None)

    @cached_property
    def num_experts(self) -> int:
        """The largest number of routed experts of any layer."""
        return max(layer.num_experts for layer in self.run.layers)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(sequences,) tokens of every sequence, in the order of the blocks."""
        return np.concatenate([block.lengths for block in self.blocks]) if self.blocks else np.zeros(0, np.int64)

    @cached_property
    def groups(self) -> Groups:
        """What is drawn anew for intervals: sequences, or random groups of one domain's where there are many."""
        domains = np.concatenate([block.domains for block in self.blocks])
        return Groups.of(domains)

    def once(self, make: Callable[[Subject], Made]) -> Made:
        """What ``make`` gives for this run, made for the first layer that asks."""
        if make not in self._made:
            self._made[make] = make(self)
        found: Made = self._made[make]
        return found

    @property
    def replay_tokens(self) -> int:
        """Tokens that can be replayed through a cache that all layers share in good time."""
        layers = len(self.run.layers)
        width = max(layer.top_k for layer in self.run.layers)
        return max(int(REPLAY_COST / (layers * width * layers * self.num_experts)), REPLAY_TOKENS)

    @property
    def everything(self) -> Sample:
        """All sequences."""
        return self.sample(int(self.lengths.sum()))

    def sample(self, tokens: int) -> Sample:
        """Sequences of about so many tokens, drawn at random; the same for the same number."""
        if tokens not in self._samples:
            self._samples[tokens] = Sample.of(self, tokens)
        return self._samples[tokens]

    @cached_property
    def blocks(self) -> list[Block]:
        """The run's sequences in blocks of at most ``BLOCK_TOKENS`` tokens, or what a memory limit leaves (or of one
        longer sequence).

        Raises:
            InputError: a sequence is too long for the memory limit.
        """
        frame = self.run.traced_sequences
        numbers, lengths = frame["sequence"].to_numpy().astype(np.int64), frame["tokens"].to_numpy().astype(np.int64)
        domains = frame["domain"].to_numpy().astype(np.str_)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        blocks: list[Block] = []
        for low, high in sequence_runs(offsets, self._block_tokens(int(lengths.max(initial=0)))):
            within = offsets[low : high + 1] - offsets[low]
            blocks.append(Block(len(blocks), numbers[low:high], lengths[low:high], domains[low:high], within))
        return blocks

    @cached_property
    def usual_blocks(self) -> int:
        """Blocks that there would be without a memory limit: of this number is the order of controls drawn."""
        return sum(1 for _ in sequence_runs(np.concatenate([[0], np.cumsum(self.lengths)]), BLOCK_TOKENS))

    def _block_tokens(self, longest: int) -> int:
        width = max((layer.top_k for layer in self.run.layers), default=1) * BLOCK_COPIES * np.dtype(np.int16).itemsize
        tokens = memory.share(memory.BLOCKS, BLOCK_TOKENS * width) // width
        if memory.limit() is not None and longest > tokens:
            needed = memory.needed(longest * width, memory.BLOCKS)
            raise InputError(
                f"a sequence of {longest:,} tokens, which are replayed together, does not fit into a memory limit of "
                f"{size(memory.limit() or 0)}: give --memory-limit {needed >> 20}MiB"
            )
        return tokens

    def ids(self, axis: int, block: Block) -> NDArray[np.int16]:
        """Selections of entry ``axis`` of ``run.layers`` in a block: (tokens, k), sequence after sequence, -1 = none.

        Do not change the result in place.
        """
        key = (axis, block.number)
        if key not in self._held:
            while len(self._held) >= 3:
                del self._held[next(iter(self._held))]
            self._held[key] = self._read(axis, block)
        return self._held[key]

    def _read(self, axis: int, block: Block) -> NDArray[np.int16]:
        """One layer's ids in a block, from the spool or the run file."""
        kept = self._spool.get((axis, block.number))
        if kept is not None:
            return kept
        layer = self.run.layers[axis]
        first, last = int(block.sequences[0]), int(block.sequences[-1])
        read = self.run.layer_selections(layer=layer.layer, step=layer.step, first=first, last=last)
        self._spool.put((axis, block.number), read.ids)
        return read.ids

    def tokens_of(self, domain: str | None) -> int:
        """Real tokens of one domain, or of all text."""
        found = self._domain_tokens
        return sum(found.values()) if domain is None else found.get(domain, 0)

    @cached_property
    def _domain_tokens(self) -> dict[str, int]:
        """Of all sequences, whether their selections were kept or not."""
        summed = self.run.table("sequence").group_by("domain").agg(tokens=pl.col("tokens").sum())
        return {domain: int(tokens) for domain, tokens in summed.select("domain", "tokens").iter_rows()}


def resampled(used: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(1 + resamples, texts) how often each text is drawn, of those that are used; the first row all once."""
    weights = np.zeros((NUM_RESAMPLES, len(used)))
    weights[:, used] = resample_weights(num_sequences=int(used.sum()), num_resamples=NUM_RESAMPLES, seed=SEED)
    return np.concatenate([np.ones((1, len(used))), weights])


def lengths_that_fit(lengths: NDArray[np.int64]) -> list[int]:
    """Segment lengths that at least two sequences reach: with fewer there is no interval."""
    return [length for length in SEGMENT_LENGTHS if int((lengths >= length).sum()) >= 2]


def trace_controls(
    ids: NDArray[np.int16], num_experts: int, wanted: Sequence[str] = CONTROLS
) -> Iterator[tuple[str, NDArray[np.int16]]]:
    """A trace that is held whole, and the three controls that say what popularity, and chance, alone would give."""
    makers = {
        "shuffled_in_sequence": controls.shuffle_within_sequences,
        "shuffled": controls.shuffle_across_sequences,
        "uniform": controls.uniform_experts,
    }
    for control in wanted:
        if control == "observed":
            yield control, ids
        else:
            yield control, makers[control](selections=ids, num_experts=num_experts, seed=SEED)


def as_text(parameters: dict[str, Any]) -> str:
    """Parameters as the text that identifies them."""
    return json.dumps(parameters, sort_keys=True)
