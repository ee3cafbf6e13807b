"""The recorders of a run by level, and how what one forward showed reaches them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
from torch import Tensor

from profiler.capture.batch import BlockBatch, ExpertRows, LayerKey, ResidualBatch, Tokens
from profiler.capture.checks import Checks
from profiler.capture.discovery import MoELayer
from profiler.capture.levels import RecordingOptions
from profiler.capture.provenance import describe_experts, describe_layer
from profiler.capture.routing import LayerRouting, RoutingBuffer
from profiler.recorders.expert_output import ExpertOutputRecorder
from profiler.recorders.levels import level_probes
from profiler.recorders.load import LoadRecorder
from profiler.recorders.moe_output import MoEOutputRecorder
from profiler.recorders.neurons import NeuronRecorder
from profiler.recorders.pairs import OutputPairRecorder, PairRecorder
from profiler.recorders.parts import PartLoadRecorder, PartOutputRecorder
from profiler.recorders.predictions import PredictionRecorder
from profiler.recorders.ranks import RankRecorder
from profiler.recorders.residual import ResidualRecorder
from profiler.recorders.router import RouterRecorder
from profiler.recorders.scores import ScoreRecorder
from profiler.recorders.text import TextRecorder
from profiler.recorders.trace import TraceRecorder
from profiler.recorders.vectors import VectorRecorder
from profiler.recorders.weights import WeightRecorder


class Recording:
    """All recorders of a session. A forward counts when :meth:`commit` says so, or not at all.

    Args:
        layers: the MoE layers of the model.
        options: what to record.
        tokenizer: keeps text if given.

    Attributes:
        checks: the proofs that are gathered while recording.
        probes: recorders that put their own hooks on.
        predictions: the one of level ``predictions``; None at other levels.
        sees_rows: whether what happens inside the experts is wanted.
        sees_norms: whether the norms before the experts are wanted.
        sees_residual: whether the residual stream is wanted.
        keeps_text: False where the text has been kept already.
    """

    def __init__(self, layers: Sequence[MoELayer], *, options: RecordingOptions, tokenizer: Any) -> None:
        self.checks = Checks(layers)
        self.sees_residual = "activations" in options.levels
        self.probes = level_probes(options)
        self.predictions = next((probe for probe in self.probes if isinstance(probe, PredictionRecorder)), None)
        self.sees_rows = self.sees_residual or any(probe.needs_rows for probe in self.probes)
        self.sees_norms = self.sees_rows or "lookahead" in options.levels
        self._by_key = {layer.key: layer for layer in layers}
        self._top_k: dict[LayerKey, int] = {}
        self._described: set[LayerKey] = set()
        self._text = TextRecorder(tokenizer) if tokenizer is not None else None
        self.keeps_text = self._text is not None
        by_domain = options.vectors_per_domain
        self._routing: list[Any] = [
            LoadRecorder(),
            PartLoadRecorder(),
            RouterRecorder(),
            RankRecorder(),
            PairRecorder(by_domain),
        ]
        if options.keep_trace:
            self._routing.append(TraceRecorder(max(layer.num_experts for layer in layers), options.trace_every))
        if options.router_scores:
            self._routing.append(ScoreRecorder(options.router_scores, options.scores_every))
        self._buffer = RoutingBuffer([self.checks, *self._routing])
        inside = _activation_recorders(by_domain) if self.sees_residual else ([], [], [])
        self._inside, self._blocks, self._residual = inside
        self._weights = WeightRecorder() if self.sees_residual else None
        self._staged = (*self._inside, *self._blocks, *self._residual, *self.probes)

    @property
    def bytes_held(self) -> int:
        """What grows with every token until the next drain: the trace, scores of tokens, and text."""
        return sum(getattr(recorder, "bytes_held", 0) for recorder in (*self._routing, self._text))

    def add_block(self, layer: MoELayer, block: BlockBatch, rows: ExpertRows) -> None:
        """Add what the routed experts of one layer did."""
        if self._weights is not None:
            self._weights.update(layer)
        for recorder in self._blocks:
            recorder.update(block)
        self.add_rows(rows)

    def add_rows(self, batch: ExpertRows) -> None:
        """Add what happened inside the experts of one layer, routed or shared."""
        for recorder in self._inside:
            recorder.update(batch)
        for probe in self.probes:
            probe.saw_rows(batch)

    def add_residual(self, batch: ResidualBatch) -> None:
        """Add the residual stream after one layer."""
        for recorder in self._residual:
            recorder.update(batch)

    def commit(self, tokens: Tokens, routing: Mapping[LayerKey, LayerRouting], input_ids: Tensor | None) -> None:
        """The forward has ended well."""
        self.checks.saw_forward(tokens, routing)
        for key, entry in routing.items():
            self._by_key[key] = entry.layer
            self._top_k[key] = max(self._top_k.get(key, 0), _largest_k(tokens, entry))
        self._buffer.add(tokens, routing)
        for recorder in self._staged:
            recorder.commit()
        predicted = None if self.predictions is None else self.predictions.take(tokens)
        if self._text is not None and self.keeps_text and input_ids is not None:
            self._text.update(tokens, input_ids, predicted)

    def discard(self) -> None:
        """The forward has failed."""
        for recorder in self._staged:
            recorder.discard()

    def end_batch(self) -> None:
        """A batch of a corpus has ended: what is worked on together does not reach over it, wherever shards end."""
        self._buffer.flush()
        for probe in self.probes:
            probe.end_batch()

    def begin_part(self, *, of_model: bool) -> None:
        """A part of a corpus begins, whose shard is to depend on that part alone.

        Args:
            of_model: whether tables about the weights come with it: they are read once per corpus.
        """
        self._top_k.clear()
        self._described.clear()
        if self._text is not None:
            self._text.begin_part()
        if self._weights is not None:
            self._weights.wanted = of_model
        for probe in self.probes:
            probe.begin_part(of_model)

    def drain_tokens(self) -> dict[str, list[pl.DataFrame]]:
        """What grows with every token, packed; sums go on."""
        self._buffer.flush()
        frames: dict[str, list[pl.DataFrame]] = defaultdict(list)
        for recorder in (*self._routing, self._text):
            if hasattr(recorder, "bytes_held"):
                for table, frame in recorder.drain().items():
                    frames[table].append(frame)
        return frames

    def drain(self) -> dict[str, list[pl.DataFrame]]:
        """The sums since the last drain, as parts of the tables of a shard."""
        self._buffer.flush()
        frames: dict[str, list[pl.DataFrame]] = defaultdict(list)
        others = [recorder for recorder in (self._weights, self._text) if recorder is not None]
        for recorder in (*self._routing, *self._staged, *others):
            for table, frame in recorder.drain().items():
                frames[table].append(frame)
        self.checks.saw_sums(frames)
        if self._top_k:
            known = [describe_layer(self._by_key[key], top_k) for key, top_k in self._top_k.items()]
            frames["layer"] = [pl.DataFrame([layer.__dict__ for layer in known])]
        new = [key for key in self._top_k if key not in self._described]
        if new:
            self._described.update(new)
            frames["expert"] = [describe_experts(self._by_key[key]) for key in new]
        return frames


def _largest_k(tokens: Tokens, entry: LayerRouting) -> int:
    """The most experts that a token took; all take k unless their router may skip some."""
    if not entry.layer.traits.may_skip:
        return entry.ids.shape[-1]
    ids = (entry.tokens or tokens).select(entry.ids)
    return int((ids >= 0).sum(1).max()) if ids.numel() else 0


def _activation_recorders(by_domain: bool) -> tuple[list[Any], list[Any], list[Any]]:
    inside = [ExpertOutputRecorder(), PartOutputRecorder(), NeuronRecorder(by_domain), VectorRecorder(by_domain)]
    return inside, [MoEOutputRecorder(), OutputPairRecorder(by_domain)], [ResidualRecorder()]
