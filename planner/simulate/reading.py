"""The requests of a run in the order in which they are replayed, read layer by layer and part by part.

What a whole workload would hold at once (layers x tokens x k) is held for one layer, or for some requests: that is how
a trace is replayed that is larger than memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

import store
from moescope.errors import PlanError
from planner.simulate.workload import Ids, Workload
from profiler.metrics._arrays import BoolArray, IntArray
from profiler.metrics._trace import check_selections

_KEPT_TOKENS = 1 << 18  # of a layer, that are looked through at once


@dataclass(frozen=True)
class Reading:
    """Requests of a run, and which of their tokens are replayed.

    Attributes:
        run: with a trace.
        numbers: (requests,) sequences of the run, in the order of the replay.
        lengths: (requests,) tokens of each.
        prompts: (requests,) tokens that the model was given; the others it generated.
        domains: (requests,) of each.
        phase: ``any``, ``prompt`` or ``decode``: which tokens count.
        known: (tokens,) those that are passes, where that was found out before; see :attr:`kept`.
    """

    run: store.Run
    numbers: IntArray
    lengths: IntArray
    prompts: IntArray
    domains: tuple[str, ...]
    phase: str = "any"
    known: BoolArray | None = None

    @staticmethod
    def of(
        run: store.Run, *, domains: Sequence[str] | None = None, phase: str = "any", max_tokens: int | None = None
    ) -> Reading:
        """The requests that :func:`planner.simulate.workload.workload_of` makes a workload of, by the same arguments.

        Domains take turns sequence by sequence, so that a stretch of the requests holds all of them in proportion.

        Raises:
            PlanError: the run has no trace or no such domain, or its layers are not of its decoder.
        """
        _require_trace(run)
        known = run.domains if domains is None else list(domains)
        for name in known:
            if name not in run.domains:
                raise PlanError(f"run {run.name!r} has no domain {name!r}; it has {', '.join(run.domains)}")
        table = _in_turn(run, known, max_tokens)
        return Reading(
            run, table["sequence"].to_numpy().astype(np.int64), table["tokens"].to_numpy().astype(np.int64),
            table["prompt_tokens"].fill_null(0).to_numpy().astype(np.int64), tuple(table["domain"].to_list()), phase,
        )  # fmt: skip

    @property
    def num_requests(self) -> int:
        """Requests, those without a token that counts too."""
        return len(self.numbers)

    @property
    def num_tokens(self) -> int:
        """Tokens of all of them."""
        return int(self.lengths.sum())

    @cached_property
    def kept(self) -> BoolArray:
        """(tokens,) those that are passes: of the phase, and using an expert in any layer."""
        if self.known is not None:
            return self.known
        if self.num_tokens > _KEPT_TOKENS and self.num_requests > 1:
            parts = [part.kept for _, part in self.parts(_KEPT_TOKENS)]
            return np.asarray(np.concatenate(parts), np.bool_)
        kept = np.ones(self.num_tokens, np.bool_)
        if self.phase != "any":
            position = np.arange(self.num_tokens) - np.repeat(np.cumsum(self.lengths) - self.lengths, self.lengths)
            kept = (position >= np.repeat(self.prompts, self.lengths)) == (self.phase == "decode")
        used = np.zeros(self.num_tokens, np.bool_)
        for layer in self.run.layers:
            used |= (self._read(layer, weights=False)[0] >= 0).any(axis=1)
            if used[kept].all():  # as a rule every token uses experts of the first layer
                break
        return kept & used

    @cached_property
    def passes(self) -> IntArray:
        """(requests,) passes of each."""
        sums = np.concatenate([[0], np.cumsum(self.kept)])
        ends = np.concatenate([[0], np.cumsum(self.lengths)])
        return np.asarray(np.diff(sums[ends]), np.int64)

    def some(self, chosen: Sequence[int] | IntArray) -> Reading:
        """Some of the requests, in the order given."""
        order = np.asarray(chosen, np.int64)
        return replace(
            self, numbers=self.numbers[order], lengths=self.lengths[order], prompts=self.prompts[order],
            domains=tuple(self.domains[one] for one in order.tolist()), known=None,
        )  # fmt: skip

    def with_passes(self) -> Reading:
        """Without requests that have no pass.

        Raises:
            PlanError: none is left.
        """
        left = np.flatnonzero(self.passes)
        if not len(left):
            raise PlanError("the trace holds no token that uses an expert; there is nothing to replay")
        return self if len(left) == self.num_requests else self.some(left)

    def parts(self, tokens: int, *, multiple: int = 1) -> Iterator[tuple[int, Reading]]:
        """Successive requests of about so many tokens together, each part with the number of its first request.

        Args:
            tokens: of a part; one of ``multiple`` requests may have more.
            multiple: a part holds so many requests, or several times as many; the last may hold fewer.
        """
        starts = np.arange(0, self.num_requests, multiple)
        sums = np.add.reduceat(self.lengths, starts)
        first = 0
        while first < len(starts):
            last = first + max(int(np.searchsorted(np.cumsum(sums[first:]), tokens, side="right")), 1)
            low, high = int(starts[first]), min(last * multiple, self.num_requests)
            yield low, self.some(np.arange(low, high))
            first = last

    def workload(self, layers: Sequence[int] | None = None, *, weights: bool = True) -> Workload:
        """Each token that counts as a pass of its own, in all layers or in those of these places in ``run.layers``.

        Args:
            layers: places, not numbers, of layers.
            weights: read the gate weights too.

        Raises:
            PlanError: no token is left.
            MetricError: selections out of range.
        """
        left = self.with_passes()
        known = self.run.layers
        wanted = [known[place] for place in (range(len(known)) if layers is None else layers)]
        count = max(layer.num_experts for layer in known)
        kept, whole = left.kept, bool(left.kept.all())
        shape = (len(wanted), int(kept.sum()), max(layer.top_k for layer in known))
        ids = np.full(shape, -1, np.int16)
        gates = np.zeros(shape, np.float32) if weights else None
        for at, layer in enumerate(wanted):
            mine, given = left._read(layer, weights=weights)
            checked = check_selections((mine if whole else mine[kept])[None, None], count)[0, 0]
            if (more := checked.shape[1] - ids.shape[2]) > 0:  # chunks may be wider than the layer says
                ids = np.pad(ids, ((0, 0), (0, 0), (0, more)), constant_values=-1)
                gates = None if gates is None else np.pad(gates, ((0, 0), (0, 0), (0, more)))
            ids[at, :, : checked.shape[1]] = checked
            if gates is not None and given is not None:
                gates[at, :, : checked.shape[1]] = np.where(
                    checked >= 0, given if whole else given[kept], np.float32(0)
                )
        return Workload(
            ids=ids, tokens=(ids >= 0).astype(np.uint16), weights=gates,
            offsets=np.concatenate([[0], np.cumsum(left.passes)]).astype(np.int64),
            pass_tokens=np.ones(shape[1], np.int64), domains=left.domains, sequences=left.numbers,
            layers=tuple((layer.layer, layer.step) for layer in wanted), num_experts=count,
            top_k=tuple(layer.top_k for layer in wanted),
        )  # fmt: skip

    def _read(self, layer: store.LayerInfo, *, weights: bool) -> tuple[Ids, NDArray[np.float32] | None]:
        """(tokens, k) of one layer, request after request in the order of the replay."""
        low, high = int(self.numbers.min(initial=0)), int(self.numbers.max(initial=0))
        whole = high - low + 1 == self.num_requests
        read = self.run.layer_selections(
            layer=layer.layer, step=layer.step, first=low, last=high, weights=weights,
            sequences=None if whole else np.sort(self.numbers).tolist(),
        )  # fmt: skip
        if np.array_equal(read.sequences, self.numbers):
            return read.ids, read.weights
        first = read.offsets[np.searchsorted(read.sequences, self.numbers)]
        rows = np.repeat(first - (np.cumsum(self.lengths) - self.lengths), self.lengths)
        rows += np.arange(len(rows))
        return read.ids[rows], None if read.weights is None else read.weights[rows]


def _require_trace(run: store.Run) -> None:
    if run.live:
        raise PlanError(f"run {run.name!r} is still being collected: replay it when it is finished")
    if not run.has_trace:
        raise PlanError(
            f"run {run.name!r} holds counts and no trace, so nothing can be replayed: caches depend on the order of"
            " tokens. Record or import selections token by token; placement needs counts alone"
        )
    other = [layer for layer in run.layers if layer.stack != "decoder"]
    if other:
        raise PlanError(f"run {run.name!r} has MoE layers in its {other[0].stack}; replays take decoder layers only")


def _in_turn(run: store.Run, domains: Sequence[str], max_tokens: int | None) -> pl.DataFrame:
    """Sequences of the domains, spread evenly by their place in their domain; as many as make ``max_tokens``."""
    order: dict[Any, int] = {name: at for at, name in enumerate(domains)}
    table = run.traced_sequences.filter(pl.col("domain").is_in(list(order)))
    place = (pl.int_range(pl.len()).over("domain") + 0.5) / pl.len().over("domain")
    table = table.with_columns(
        turn=place, owner=pl.col("domain").replace_strict(order, return_dtype=pl.Int64, default=None)
    ).sort("turn", "owner", "sequence")
    total = int(table["tokens"].sum())
    if max_tokens is None or total <= max_tokens:
        return table
    part = max_tokens / max(total, 1)  # every so many of them, so that the text stays mixed
    wanted = max(2, round(part * len(table)))
    places = np.linspace(0, len(table) - 1, min(wanted, len(table))).round().astype(np.int64)
    return table.select(pl.all().gather(places))
