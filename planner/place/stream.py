"""The text that placements are made from and scored on, read in parts of whole batches of requests.

A pass runs some requests together, and nothing that placements count reaches from one batch into another: sums over
parts are those over the whole, to the last digit, memory does not grow with the trace, and parts can go over the
workers of a Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np

import store
from moescope import memory
from moescope.cluster import Cluster
from moescope.errors import PlanError
from moescope.sizes import size
from planner.place.windows import routed_only
from planner.simulate.reading import Reading
from planner.simulate.workload import Workload
from profiler.metrics._arrays import IntArray
from profiler.metrics.controls import uniform_tokens

PART_BYTES = 128 << 20
"""What a part may take, if that is a whole batch, unless a memory limit leaves less."""

PER_WORKER = 4
"""Parts of a worker, nearly: few enough that Ray's part is small, and enough that all end at about the same time."""

_PART = 0.4  # of what a memory limit leaves
_PER_SELECTION = 6  # bytes of an id and its count of tokens in a workload, and of an id while it is read
_PER_PAIR = 72  # bytes of a token and one of its experts while a layer is counted


Result = TypeVar("Result")


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
        cluster: whose workers read and count the parts; None = this process.
        tell: told how far it is, where there are several parts.
        name: of the text, as it is told.
    """

    reading: Reading
    num_experts: int
    seed: int | None = None
    cluster: Cluster | None = None
    tell: Callable[[str], None] | None = field(default=None, repr=False, compare=False)
    name: str = "the text"
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
        pieces = list(self.reading.parts(self._tokens(multiple), multiple=multiple))
        for number, (first, part) in enumerate(pieces, 1):
            self.say(number, len(pieces))
            work = _drawn(routed_only(part.workload(weights=False), self.num_experts), self.seed, first)
            found = Part(first, before, work)
            if part.num_requests == self.num_requests:
                self._held.append(found)  # all of it: the next who asks need not read it again
            yield found
            before = int(ends[first + part.num_requests])

    def say(self, number: int, of: int) -> None:
        """Tell that a part is under way."""
        if self.tell is not None and of > 1:
            self.tell(f"reading {self.name}, part {number} of {of}")

    def jobs(self, function: Callable[[Part], Result], *, multiple: int = 1) -> list[PartJob[Result]]:
        """The parts as they are sent to workers, a few for each.

        Raises:
            PlanError: as :meth:`parts`.
        """
        assert self.cluster is not None, "asked for where there is one"
        tokens = min(self._tokens(multiple), -(-self.reading.num_tokens // (PER_WORKER * self.cluster.workers)))
        shared, ends = store.SharedRun.of(self.reading.run.path), np.concatenate([[0], np.cumsum(self.reading.passes)])
        return [
            PartJob(function, shared, part.numbers, part.lengths, part.prompts, part.domains, part.phase,
                    self.num_experts, self.seed, first, int(ends[first]))
            for first, part in self.reading.parts(tokens, multiple=multiple)
        ]  # fmt: skip

    def counts(self) -> IntArray:
        """(layers, E) tokens that used each expert."""
        counts = np.zeros((self.num_layers, self.num_experts), np.int64)
        for found in over_parts(self, _counts):
            counts += found
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
        """The first requests, and the later ones.

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
        first, later = self.some(np.arange(edge)), self.some(np.arange(edge, self.num_requests))
        return replace(first, name="the first text"), replace(later, name="the later text")

    def uniform(self, *, seed: int = 0) -> Stream:
        """The control: see :func:`uniform`."""
        return replace(self, seed=seed, _held=[])

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


@dataclass(frozen=True)
class PartJob(Generic[Result]):
    """One part of a text, as it is sent to a worker: what :func:`counted` takes.

    Attributes:
        function: of the part.
        run: with a trace.
        numbers, lengths, prompts, domains, phase: as in :class:`planner.simulate.reading.Reading`.
        num_experts, seed: as in :class:`Stream`.
        first, before: as in :class:`Part`.
    """

    function: Callable[[Part], Result]
    run: store.SharedRun
    numbers: IntArray
    lengths: IntArray
    prompts: IntArray
    domains: tuple[str, ...]
    phase: str
    num_experts: int
    seed: int | None
    first: int
    before: int


def counted(job: PartJob[Result]) -> Result:
    """The function's result on a part; from any process that reaches the run.

    Raises:
        StoreError: it cannot be read, or is another one.
    """
    with job.run.opened() as run:
        reading = Reading(run, job.numbers, job.lengths, job.prompts, job.domains, job.phase)
        work = _drawn(routed_only(reading.workload(weights=False), job.num_experts), job.seed, job.first)
        return job.function(Part(job.first, job.before, work))


def over_parts(text: Requests, function: Callable[[Part], Result], *, multiple: int = 1) -> Iterator[Result]:
    """What a function makes of each part of a text, in order; a whole workload is one part.

    Args:
        function: importable, or a ``functools.partial`` of one: it may run on a worker.
        multiple: as for :meth:`Stream.parts`.
    """
    if isinstance(text, Workload):
        yield function(Part(0, 0, text))
    elif text.cluster is None:
        yield from map(function, text.parts(multiple=multiple))
    else:
        jobs = text.jobs(function, multiple=multiple)
        for number, result in enumerate(text.cluster.in_order(counted, jobs), 1):
            text.say(number, len(jobs))
            yield result


def _counts(part: Part) -> IntArray:
    return part.work.counts()


def _drawn(work: Workload, seed: int | None, first: int) -> Workload:
    return work if seed is None else uniform(work, seed=seed, first=first)


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
