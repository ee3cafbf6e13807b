"""The part of a run that a method reads, block by block, so that memory does not grow with the trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

import store
from planner.simulate.what_if.outcome import Refused
from planner.source import gated_experts
from profiler.metrics._arrays import FloatArray, IntArray
from profiler.metrics._trace import sequence_runs

BLOCK_TOKENS = 1 << 16
"""Tokens of a layer that are in memory at once, or one longer sequence."""

COLLECT_SCORES = "collect it again with --router-scores"


@dataclass(frozen=True)
class Scores:
    """The largest router logits of the tokens of a block, in descending order.

    Attributes:
        ids: (tokens, m) int16, -1 = none.
        logits: (tokens, m) float32.
        log_partition: (tokens,) float32, logsumexp over all experts.
    """

    ids: NDArray[np.int16]
    logits: NDArray[np.float32]
    log_partition: NDArray[np.float32]


@dataclass(frozen=True)
class Block:
    """Tokens of one layer that used an expert.

    Attributes:
        ids: (tokens, k) int16 in descending gate weight, -1 = none.
        weights: (tokens, k) float32; 0 where there is none.
        rounding: (tokens,) float32, by what each weight may be wrong at most.
        scores: of the same tokens, where they are wanted.
        sequence: (tokens,) which of the block's sequences each token belongs to.
    """

    ids: NDArray[np.int16]
    weights: NDArray[np.float32]
    rounding: NDArray[np.float32]
    scores: Scores | None
    sequence: IntArray

    @property
    def own(self) -> IntArray:
        """(tokens,) experts that each used."""
        used: IntArray = (self.ids >= 0).sum(1).astype(np.int64)
        return used

    @property
    def shares(self) -> FloatArray:
        """(tokens, k) gate weights over their sum; alike where all are 0."""
        weights = np.where(self.ids >= 0, self.weights.astype(np.float64), 0.0)
        total = weights.sum(1, keepdims=True)
        alike = np.where(self.ids >= 0, 1.0, 0.0) / np.maximum(self.own, 1)[:, None]
        return np.where(total > 0, weights / np.where(total > 0, total, 1.0), alike)


@dataclass(frozen=True)
class Layer:
    """One layer and what its experts cost.

    Attributes:
        info: the layer.
        flops: (E,) operations of each expert for one token: 0 for those without weights, NaN where sizes are unknown.
    """

    info: store.LayerInfo
    flops: FloatArray

    @property
    def key(self) -> tuple[int, int]:
        """(layer, step)"""
        return self.info.layer, self.info.step


@dataclass(frozen=True)
class Subject:
    """What is asked about.

    Attributes:
        run: the run.
        layers: of these.
        sequences: on these (sequence, domain, tokens), in order.
        run_tokens: tokens of the domain, whether the sequences hold them or not.
        scored: read router scores, too.
        gated_known: the run says whether experts have a gate projection.
    """

    run: store.Run
    layers: tuple[Layer, ...]
    sequences: pl.DataFrame
    run_tokens: int
    scored: bool
    gated_known: bool

    @classmethod
    def of(
        cls,
        run: store.Run,
        *,
        scored: bool,
        domain: str | None,
        layers: Sequence[int] | None,
        limit_tokens: int | None,
    ) -> Subject:
        """The subject, or why there is none.

        Raises:
            Refused: no trace, no router scores where they are wanted, no such layer or domain.
        """
        if not run.has_trace:
            raise Refused(f"run {run.name!r} holds counts, not the experts of each token: there is nothing to try on")
        if scored and not run.has_scores:
            raise Refused(f"run {run.name!r} holds no router scores: {COLLECT_SCORES}")
        if domain is not None and domain not in run.domains:
            raise Refused(f"run {run.name!r} has no domain {domain!r}; it has {', '.join(run.domains)}")
        known = {layer.layer for layer in run.layers}
        missing = sorted(set(layers or ()) - known)
        if missing:
            there = ", ".join(map(str, sorted(known)))
            raise Refused(f"run {run.name!r} has no MoE layer {missing[0]}; it has {there}")
        frame = run.traced_sequences
        chosen = run.scored_sequences if scored else frame
        if domain is not None:
            frame, chosen = (one.filter(pl.col("domain") == domain) for one in (frame, chosen))
        if chosen.is_empty():
            raise Refused(
                f"no sequence of domain {domain!r} of run {run.name!r} has router scores: {COLLECT_SCORES}, and with a"
                " smaller --scores-every"
            )
        gated = gated_experts(run)
        costs = _costs(run, 4.0 if gated is False else 6.0)
        wanted = [layer for layer in run.layers if layers is None or layer.layer in set(layers)]
        return cls(
            run,
            tuple(Layer(layer, costs[layer.layer, layer.step]) for layer in wanted),
            _limited(chosen.select("sequence", "domain", "tokens"), limit_tokens),
            int(frame["tokens"].sum()),
            scored,
            gated is not None,
        )

    def part(self, keep: NDArray[np.bool_]) -> Subject:
        """Only some of the sequences."""
        return replace(self, sequences=self.sequences.filter(pl.Series(keep)))

    def of_layers(self, layers: Sequence[Layer]) -> Subject:
        """Only some of the layers."""
        return replace(self, layers=tuple(layers))

    def halves(self) -> tuple[Subject, Subject]:
        """Every other sequence, domain by domain, and the others; twice the same where there is but one.

        Domains often take turns: every other sequence of all would be one domain, and the rest the other.
        """
        if len(self.sequences) < 2:
            return self, self
        even = np.zeros(len(self.sequences), bool)
        even[np.argsort(self.sequences["domain"].to_numpy(), kind="stable")[::2]] = True
        return self.part(even), self.part(~even)

    def blocks(self, layer: Layer, *, tokens: int = BLOCK_TOKENS) -> Iterator[Block]:
        """The tokens of one layer, some sequences at a time."""
        for numbers in self.pieces(tokens=tokens):
            block = self.read(layer, numbers)
            if len(block.ids):
                yield block

    def pieces(self, *, tokens: int = BLOCK_TOKENS) -> list[IntArray]:
        """Numbers of successive sequences of about so many tokens together."""
        numbers, lengths = (self.sequences[name].to_numpy().astype(np.int64) for name in ("sequence", "tokens"))
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return [numbers[low:high] for low, high in sequence_runs(offsets, tokens)]

    def read(self, layer: Layer, numbers: IntArray) -> Block:
        """One layer's tokens of the sequences of these numbers; from any thread."""
        gapless = numbers[-1] - numbers[0] + 1 == len(numbers)
        of = {"layer": layer.info.layer, "step": layer.info.step, "first": int(numbers[0]), "last": int(numbers[-1])}
        only = None if gapless else numbers.tolist()
        read = self.run.layer_selections(**of, sequences=only, weights=True)
        assert read.weights is not None and read.rounding is not None
        keep = read.ids[:, 0] >= 0 if read.ids.shape[1] else np.zeros(len(read.ids), bool)
        sequence = np.repeat(np.arange(len(read.sequences)), np.diff(read.offsets))
        scores = None
        if self.scored:
            found = self.run.layer_scores(**of, sequences=only)
            here = np.isin(read.sequences, found.sequences)[sequence]
            at = np.flatnonzero(here)
            known = found.ids[:, 0] >= 0 if found.ids.shape[1] else np.zeros(len(found.ids), bool)
            keep &= False if not len(at) else here
            keep[at] &= known
            rows = np.full(len(read.ids), -1)
            rows[at] = np.arange(len(at))
            rows = rows[keep]
            scores = Scores(found.ids, found.logits, found.log_partition)
            if not _all(keep) or len(rows) != len(found.ids):
                scores = Scores(found.ids[rows], found.logits[rows], found.log_partition[rows])
        if _all(keep):
            return Block(read.ids, read.weights, read.rounding, scores, sequence)
        return Block(read.ids[keep], read.weights[keep], read.rounding[keep], scores, sequence[keep])


def _all(keep: NDArray[np.bool_]) -> bool:
    return bool(keep.all())


def _limited(sequences: pl.DataFrame, limit: int | None) -> pl.DataFrame:
    """Evenly spread sequences, as many as the limit of tokens lets in, and one at least."""
    total = int(sequences["tokens"].sum())
    if limit is None or total <= limit:
        return sequences
    every = max(1, int(np.ceil(total / max(limit, 1))))
    return sequences.gather_every(every)


def _costs(run: store.Run, per_weight_row: float) -> dict[tuple[int, int], FloatArray]:
    """(E,) operations of each expert for one token, by (layer, step): 2 for each weight."""
    hidden, costs = run.info.hidden_size, {}
    for layer in run.layers:
        size = per_weight_row * hidden * layer.expert_width
        costs[layer.layer, layer.step] = np.full(layer.num_experts, size if size > 0 else np.nan)
    bare = run.table("expert").filter(pl.col("kind") != "routed")
    for number, step, expert in bare.select("layer", "step", "expert").iter_rows():
        if 0 <= expert < len(costs.get((number, step), ())):
            costs[number, step][expert] = 0.0
    return costs
