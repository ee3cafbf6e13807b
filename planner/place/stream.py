"""The text that placements are made from and scored on, read in parts of whole batches of requests.

A pass runs some requests together, and nothing that placements count reaches from one batch into another: sums over
parts are those over the whole, to the last digit, and memory does not grow with the trace.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from moescope import memory
from moescope.errors import PlanError
from moescope.sizes import size
from planner.place.windows import routed_only
from planner.simulate.reading import Reading
from planner.simulate.workload import Workload
from profiler.metrics._arrays import IntArray
from profiler.metrics.controls import uniform_tokens

PART_BYTES = 128 << 20
"""What a part may take, if that is a whole batch, unless a memory limit leaves less."""

_PART = 0.4  # of what a memory limit leaves
_PER_SELECTION = 6  # bytes of an id and its count of tokens in a workload, and of an id while it is read
_PER_PAIR = 72  # bytes of a token and one of its experts while a layer is counted


@dataclass(frozen=True)
class Part:
    """Some requests of a text: ``first`` is the number of the first of them, ``before`` that of its first pass."""

    first: int
    before: int
    work: Workload


@dataclass(frozen=True)
class Stream:
    """Requests of a run, one token per pass; what placements take where they also take a whole workload.

    Attributes:
        reading: the requests.
        num_experts: E; experts from E on hold no weights, and every device has them.
        seed: of experts drawn at random in place of those recorded; None = as recorded.
    """

    reading: Reading
    num_experts: int
    seed: int | None = None
    _held: list[Part] = field(default_factory=list, repr=False, compare=False)

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return len(self.reading.run.layers)

    @property
    def num_requests(self) -> int:
        """Requests."""
        return self.reading.num_requests

    @property
    def num_passes(self) -> int:
        """Tokens that use an expert."""
        return int(self.reading.passes.sum())

    @property
    def domains(self) -> tuple[str, ...]:
        """(requests,) of each."""
        return self.reading.domains

    def parts(self, *, multiple: int = 1) -> Iterator[Part]:
        """Successive requests; all but the last part hold a multiple of so many.

        Raises:
            PlanError: so many requests are more than the memory limit lets in.
        """
        if self._held:
            yield from self._held
            return
        before = 0
        ends = np.concatenate([[0], np.cumsum(self.reading.passes)])
        for first, part in self.reading.parts(self._tokens(multiple), multiple=multiple):
            found = Part(first, before, self._drawn(first, routed_only(part.workload(weights=False), self.num_experts)))
            if part.num_requests == self.num_requests:
                self._held.append(found)  # all of it: the next who asks need not read it again
            yield found
            before = int(ends[first + part.num_requests])

    def counts(self) -> IntArray:
        """(layers, E) tokens that used each expert."""
        counts = np.zeros((self.num_layers, self.num_experts), np.int64)
        for part in self.parts():
            counts += part.work.counts()
        return counts

    def of_domain(self, *names: str) -> Stream:
        """The requests of some domains."""
        return self.some(np.flatnonzero(np.isin(self.domains, names)))

    def some(self, chosen: IntArray) -> Stream:
        """Some of the requests, in the order given.

        Raises:
            PlanError: none are given.
        """
        if not len(chosen):
            raise PlanError("no request is left to replay: choose other domains, or record more sequences")
        return replace(self, reading=self.reading.some(chosen), _held=[])

    def split(self, part: float) -> tuple[Stream, Stream]:
        """The first part of the requests, and the rest.

        Raises:
            PlanError: a part outside 0..1, or fewer than two requests.
        """
        if not 0 < part < 1:
            raise PlanError(f"part {part:g} is outside (0, 1): give the part to fit on, such as 0.5")
        if self.num_requests < 2:
            raise PlanError(
                f"{self.num_requests} of the requests cannot be split into a first part and a later one: record more"
                " text"
            )
        edge = min(max(round(part * self.num_requests), 1), self.num_requests - 1)
        return self.some(np.arange(edge)), self.some(np.arange(edge, self.num_requests))

    def uniform(self, *, seed: int = 0) -> Stream:
        """The control: see :func:`uniform`."""
        return replace(self, seed=seed, _held=[])

    def _drawn(self, first: int, work: Workload) -> Workload:
        return work if self.seed is None else uniform(work, seed=self.seed, first=first)

    @cached_property
    def _token_bytes(self) -> int:
        """Bytes that one token takes, while one of its layers is counted."""
        wide = max(layer.top_k for layer in self.reading.run.layers)
        return wide * (self.num_layers * _PER_SELECTION + _PER_PAIR)

    def _tokens(self, multiple: int) -> int:
        """Tokens of a part."""
        least = int(np.add.reduceat(self.reading.lengths, np.arange(0, self.num_requests, multiple)).max())
        held = memory.share(_PART, max(PART_BYTES, least * self._token_bytes))
        if held < least * self._token_bytes:
            raise PlanError(
                f"{multiple:,} requests that run together hold {least:,} tokens, which take"
                f" {size(least * self._token_bytes)}, and the memory limit leaves {size(held)}: give a larger limit,"
                " fewer requests at a time (--batch) or a part of the trace (--max-tokens)"
            )
        return max(held // self._token_bytes, 1)


Requests = Workload | Stream
"""One token per pass, at once or part by part."""


def parts_of(text: Requests, *, multiple: int = 1) -> Iterator[Part]:
    """The parts of a text; a whole workload is one."""
    if isinstance(text, Workload):
        yield Part(0, 0, text)
    else:
        yield from text.parts(multiple=multiple)


def chance(text: Requests, *, seed: int = 0) -> Requests:
    """The control of a text at once or in parts: see :func:`uniform`."""
    return uniform(text, seed=seed) if isinstance(text, Workload) else text.uniform(seed=seed)


def uniform(work: Workload, *, seed: int = 0, first: int = 0) -> Workload:
    """The control: as many experts for every token, all distinct, drawn uniformly; what chance alone unbalances.

    Each request is drawn by its number, so that its experts are the same whichever part of a text it is read with.

    Args:
        work: one token per pass.
        seed: of the draws.
        first: number of its first request.
    """
    ids = work.ids.copy()
    bounds = list(zip(work.offsets[:-1].tolist(), work.offsets[1:].tolist(), strict=True))
    for request, (low, high) in enumerate(bounds, first):
        mine = ids[:, low:high]
        drawn = uniform_tokens(mine.reshape(-1, mine.shape[2]), work.num_experts, seed=[seed, request])
        ids[:, low:high] = drawn.reshape(mine.shape)
    return replace(work, ids=ids)
