"""The work of a serving engine: which experts every forward pass needs, layer by layer, in the order of a trace.

The unit of every simulation is a *step*: one MoE layer of one forward pass, and the **set** of experts that it needs.
One token decoded alone needs its k; several tokens together need the union of theirs.

Sources of a workload: :func:`workload_of` (a run), :func:`decode` (selections), :func:`batched` (sequences decoded
together), :func:`prefill` (prompts in chunks).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

import store
from compressor.plan import LayerKey
from moescope.errors import PlanError
from profiler.metrics._trace import check_selections

Ids = NDArray[np.int16]

_MOST_TOKENS = 65_535  # tokens of a pass are counted in 16 bits


@dataclass(frozen=True)
class Workload:
    """Forward passes one after another, and what each needs.

    Attributes:
        ids: (layers, passes, width) experts that a pass needs, each once, -1 = none. Of one token, in descending gate
            weight; of several, ascending.
        tokens: (layers, passes, width) uint16 tokens of the pass that use the expert; 0 where there is none.
        weights: (layers, passes, width) float32 largest gate weight that one of them gives it; 0 where there is none.
            None where the source has none.
        offsets: (requests + 1,) first pass of each request. Passes of several sequences count as one request: their
            batch.
        pass_tokens: (passes,) tokens of each pass.
        domains: (requests,) of each.
        sequences: (requests,) number of the sequence in the run, or of the first of a batch.
        layers: (layer, step) of each entry of axis 0.
        num_experts: E, of the layer that has most.
        top_k: (layers,) k of each layer.
    """

    ids: Ids
    tokens: NDArray[np.uint16]
    weights: NDArray[np.float32] | None
    offsets: NDArray[np.int64]
    pass_tokens: NDArray[np.int64]
    domains: tuple[str, ...]
    sequences: NDArray[np.int64]
    layers: tuple[LayerKey, ...]
    num_experts: int
    top_k: tuple[int, ...]

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return int(self.ids.shape[0])

    @property
    def num_passes(self) -> int:
        """Forward passes over all requests."""
        return int(self.ids.shape[1])

    @property
    def num_requests(self) -> int:
        """Requests, or batches of them."""
        return len(self.offsets) - 1

    @property
    def request_of_pass(self) -> NDArray[np.int64]:
        """(passes,) the request that each belongs to."""
        return np.repeat(np.arange(self.num_requests), np.diff(self.offsets))

    @property
    def needed(self) -> NDArray[np.int64]:
        """(layers, passes) experts that each step needs at once."""
        needed: NDArray[np.int64] = np.count_nonzero(self.ids >= 0, axis=-1)
        return needed

    def counts(self) -> NDArray[np.int64]:
        """(layers, E) tokens that used each expert."""
        result = np.zeros((self.num_layers, self.num_experts), np.int64)
        for layer, (ids, tokens) in enumerate(zip(self.ids, self.tokens, strict=True)):
            used = ids >= 0
            result[layer] = np.bincount(ids[used], weights=tokens[used], minlength=self.num_experts).astype(np.int64)
        return result

    def requests(self, chosen: Sequence[int] | NDArray[np.integer[Any]]) -> Workload:
        """The workload of some requests, in the order given.

        Raises:
            PlanError: none are given.
        """
        order = np.asarray(chosen, np.int64)
        if not len(order):
            raise PlanError("no request is left to replay: choose other domains, or record more sequences")
        parts = [np.arange(self.offsets[one], self.offsets[one + 1]) for one in order]
        passes = np.concatenate(parts)
        lengths = np.array([len(part) for part in parts], np.int64)
        return replace(
            self, ids=self.ids[:, passes], tokens=self.tokens[:, passes],
            weights=None if self.weights is None else self.weights[:, passes],
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), pass_tokens=self.pass_tokens[passes],
            domains=tuple(self.domains[one] for one in order), sequences=self.sequences[order],
        )  # fmt: skip

    def of_domain(self, *names: str) -> Workload:
        """The requests of some domains."""
        return self.requests([one for one, domain in enumerate(self.domains) if domain in names])

    def without_domain(self, *names: str) -> Workload:
        """The requests of all other domains."""
        return self.requests([one for one, domain in enumerate(self.domains) if domain not in names])

    def halves(self) -> tuple[Workload, Workload]:
        """The first half of the requests of every domain, and the rest, each in order.

        Raises:
            PlanError: there are fewer than two requests.
        """
        first: list[int] = []
        for name in dict.fromkeys(self.domains):
            mine = [one for one, domain in enumerate(self.domains) if domain == name]
            first += mine[: (len(mine) + 1) // 2]
        chosen = set(first)
        return self.requests(sorted(chosen)), self.requests(sorted(set(range(self.num_requests)) - chosen))


def workload_of(
    run: store.Run,
    *,
    domains: Sequence[str] | None = None,
    phase: str = "any",
    max_tokens: int | None = None,
    weights: bool = True,
) -> Workload:
    """Each token of a run as a pass of its own, as an engine decodes it: sequences one after another.

    Domains take turns sequence by sequence, so that a stretch of the workload holds all of them in proportion.

    Args:
        run: with a trace.
        domains: whose sequences count; None = all.
        phase: ``any`` = all tokens; ``decode`` = those that the model generated; ``prompt`` = all others.
        max_tokens: about as many tokens at most: whole sequences, spread over all domains; None = all.
        weights: read the gate weights too.

    Raises:
        PlanError: the run has no trace or no such domain, its layers are not of its decoder, or no token is left.
    """
    from planner.simulate.reading import Reading

    return Reading.of(run, domains=domains, phase=phase, max_tokens=max_tokens).workload(weights=weights)


def decode(
    *,
    selections: NDArray[Any],
    num_experts: int,
    weights: NDArray[Any] | None = None,
    domains: Sequence[str] | None = None,
    sequences: NDArray[Any] | None = None,
    layers: Sequence[LayerKey] | None = None,
    top_k: Sequence[int] | None = None,
) -> Workload:
    """A workload of selections: every token is a pass.

    Args:
        selections: int (layers, sequences, tokens, k) in descending gate weight, -1 = none.
        num_experts: E.
        weights: gate weights, of the same shape.
        domains: (sequences,); None = all alike.
        sequences: (sequences,) their numbers; None = counted from 0.
        layers: (layer, step) of axis 0; None = 0, 1, 2, ...
        top_k: (layers,); None = k.

    Raises:
        PlanError: no sequence has a token that uses an expert.
        MetricError: selections out of shape or range.
    """
    checked = check_selections(selections, num_experts)
    used = np.asarray((checked >= 0).any(axis=(0, 3)))  # tokens before a prompt's end may be masked: they are no pass
    lengths = used.sum(axis=1)
    kept = np.flatnonzero(lengths)
    if not len(kept):
        raise PlanError("the trace holds no token that uses an expert; there is nothing to replay")
    mask = used[kept]
    ids = np.stack([layer[kept][mask] for layer in checked]).astype(np.int16)
    gates = None if weights is None else np.stack([layer[kept][mask] for layer in weights]).astype(np.float32)
    names = ["all"] * checked.shape[1] if domains is None else list(domains)
    numbers = np.arange(checked.shape[1]) if sequences is None else np.asarray(sequences)
    return Workload(
        ids=ids, tokens=(ids >= 0).astype(np.uint16),
        weights=None if gates is None else np.where(ids >= 0, gates, np.float32(0)),
        offsets=np.concatenate([[0], np.cumsum(lengths[kept])]).astype(np.int64),
        pass_tokens=np.ones(ids.shape[1], np.int64), domains=tuple(names[one] for one in kept),
        sequences=numbers[kept].astype(np.int64),
        layers=tuple(layers) if layers is not None else tuple((one, 0) for one in range(len(ids))),
        num_experts=num_experts, top_k=tuple(top_k) if top_k is not None else (int(ids.shape[2]),) * len(ids),
    )  # fmt: skip


def strata(domains: Sequence[str]) -> tuple[str, ...]:
    """(requests,) what each is halved and drawn with: its domain; domains of one request each count as one together."""
    requests = Counter(domains)
    return tuple(name if requests[name] > 1 else "" for name in domains)


def batched(workload: Workload, *, size: int) -> Workload:
    """Requests decoded ``size`` at a time, in order, each until its end; a pass needs the union of its tokens' experts.

    A batch lasts as long as its longest request. size 1 gives the workload back.

    Raises:
        PlanError: a size below 1, or a workload whose passes hold several tokens already.
    """
    if size < 1:
        raise PlanError(f"batch {size} is no number of sequences: give at least 1")
    if size == 1:
        return workload
    if (workload.pass_tokens > 1).any():
        raise PlanError("passes of several tokens cannot be put together again: start from single tokens")
    groups, domains, sequences = [], [], []
    for first in range(0, workload.num_requests, size):
        members = range(first, min(first + size, workload.num_requests))
        spans = [np.arange(workload.offsets[one], workload.offsets[one + 1]) for one in members]
        longest = max(map(len, spans))
        groups.append([[span[at] for span in spans if at < len(span)] for at in range(longest)])
        names = {workload.domains[one] for one in members}
        domains.append(names.pop() if len(names) == 1 else "mixed")
        sequences.append(workload.sequences[first])
    return united(workload, groups, domains, sequences)


def prefill(workload: Workload, *, chunk: int) -> Workload:
    """Each request's tokens in chunks, all tokens of a chunk in one pass, as engines read prompts.

    Raises:
        PlanError: as :func:`batched`.
    """
    if chunk < 1:
        raise PlanError(f"chunk {chunk} is no number of tokens: give at least 1")
    if (workload.pass_tokens > 1).any():
        raise PlanError("passes of several tokens cannot be put together again: start from single tokens")
    groups = []
    for one in range(workload.num_requests):
        first, last = int(workload.offsets[one]), int(workload.offsets[one + 1])
        groups.append([list(range(at, min(at + chunk, last))) for at in range(first, last, chunk)])
    return united(workload, groups, list(workload.domains), list(workload.sequences))


def united(workload: Workload, groups: list[list[list[int]]], domains: list[str], sequences: Sequence[Any]) -> Workload:
    """Passes put together: groups[request][pass] = passes of the workload that run as one."""
    passes = [members for request in groups for members in request]
    most = max(map(len, passes))
    if most > _MOST_TOKENS:
        raise PlanError(f"a pass of {most:,} tokens is too long: give {_MOST_TOKENS:,} at most")
    owner = np.repeat(np.arange(len(passes)), [len(members) for members in passes])
    flat = np.concatenate([np.asarray(members, np.int64) for members in passes])
    experts, width = workload.num_experts, 0
    layers = []
    for layer in range(workload.num_layers):
        ids = workload.ids[layer][flat]  # shape: (tokens, k)
        used = ids >= 0
        keys = (owner[:, None] * experts + ids)[used]
        found, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
        gates = np.zeros(len(found), np.float32)
        if workload.weights is not None:
            np.maximum.at(gates, inverse, workload.weights[layer][flat][used])
        at = found // experts
        rank = np.arange(len(found)) - np.searchsorted(at, at)
        layers.append((at, rank, (found % experts).astype(np.int16), counts, gates))
        width = max(width, int(rank.max(initial=-1)) + 1)
    shape = (workload.num_layers, len(passes), width)
    ids, tokens, weights = np.full(shape, -1, np.int16), np.zeros(shape, np.uint16), np.zeros(shape, np.float32)
    for layer, (at, rank, mine, counts, gates) in enumerate(layers):
        ids[layer, at, rank], tokens[layer, at, rank], weights[layer, at, rank] = mine, counts, gates
    lengths = [len(request) for request in groups]
    return replace(
        workload, ids=ids, tokens=tokens, weights=None if workload.weights is None else weights,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        pass_tokens=np.array([len(members) for members in passes], np.int64), domains=tuple(domains),
        sequences=np.asarray(sequences, np.int64),
    )  # fmt: skip
