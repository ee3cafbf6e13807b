"""The recorders of a run by level, and how what one forward showed reaches them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
from torch import Tensor

from profiler.capture.batch import ExpertRows, LayerKey, ResidualBatch, Tokens
from profiler.capture.checks import Checks
from profiler.capture.discovery import MoELayer
from profiler.capture.provenance import describe_layer
from profiler.capture.routing import LayerRouting, RoutingBuffer
from profiler.recorders.load import LoadRecorder
from profiler.recorders.router import RouterRecorder
from profiler.recorders.text import TextRecorder
from profiler.recorders.trace import TraceRecorder


class Recording:
    """All recorders of a session. A forward counts when :meth:`commit` says so, or not at all.

    Args:
        layers: the MoE layers of the model.
        levels: what to record, see :data:`profiler.capture.levels.LEVELS`.
        tokenizer: keeps text if given.

    Attributes:
        checks: the proofs that are gathered while recording.
        sees_rows: whether what happens inside the experts is wanted.
        sees_residual: whether the residual stream is wanted.
    """

    def __init__(self, layers: Sequence[MoELayer], *, levels: Sequence[str], tokenizer: Any) -> None:
        self.checks = Checks(layers)
        self.sees_rows = self.sees_residual = "activations" in levels
        self._by_key = {layer.key: layer for layer in layers}
        self._top_k: dict[LayerKey, int] = {}
        self._text = TextRecorder(tokenizer) if tokenizer is not None else None
        self._trace = TraceRecorder(max(layer.num_experts for layer in layers))
        self._routing = [LoadRecorder(), RouterRecorder(), self._trace]
        self._buffer = RoutingBuffer([self.checks, *self._routing])
        self._inside, self._residual = _activation_recorders() if self.sees_rows else ([], [])

    @property
    def bytes_held(self) -> int:
        """What the trace holds in memory until the next drain."""
        return self._trace.bytes_held

    def add_rows(self, batch: ExpertRows) -> None:
        """Add what happened inside the experts of one layer."""
        for recorder in self._inside:
            recorder.update(batch)

    def add_residual(self, batch: ResidualBatch) -> None:
        """Add the residual stream after one layer."""
        for recorder in self._residual:
            recorder.update(batch)

    def commit(self, tokens: Tokens, routing: Mapping[LayerKey, LayerRouting], input_ids: Tensor | None) -> None:
        """The forward has ended well."""
        self.checks.saw_layers(routing)
        for key, entry in routing.items():
            self._top_k[key] = max(self._top_k.get(key, 0), entry.ids.shape[-1])
        self._buffer.add(tokens, routing)
        for recorder in (*self._inside, *self._residual):
            recorder.commit()
        if self._text is not None and input_ids is not None:
            self._text.update(tokens, input_ids)

    def discard(self) -> None:
        """The forward has failed."""
        for recorder in (*self._inside, *self._residual):
            recorder.discard()

    def drain(self) -> dict[str, list[pl.DataFrame]]:
        """The sums since the last drain, as parts of the tables of a shard."""
        self._buffer.flush()
        frames: dict[str, list[pl.DataFrame]] = defaultdict(list)
        text = [self._text] if self._text is not None else []
        for recorder in (*self._routing, *self._inside, *self._residual, *text):
            for table, frame in recorder.drain().items():
                frames[table].append(frame)
        if self._top_k:
            known = [describe_layer(self._by_key[key], top_k) for key, top_k in self._top_k.items()]
            frames["layer"] = [pl.DataFrame([layer.__dict__ for layer in known])]
        return frames


def _activation_recorders() -> tuple[list[Any], list[Any]]:
    from profiler.recorders.expert_output import ExpertOutputRecorder
    from profiler.recorders.neurons import NeuronRecorder
    from profiler.recorders.residual import ResidualRecorder

    return [ExpertOutputRecorder(), NeuronRecorder()], [ResidualRecorder()]
