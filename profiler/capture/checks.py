"""The capture's proofs of itself: what is checked while watching, and the rows of table ``check`` that say so."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import polars as pl
import torch
from torch import Tensor

from profiler.capture.batch import LayerKey, RoutingBatch
from profiler.capture.discovery import MoELayer
from profiler.capture.tap import ExpertsCall, TappedRows, recompute

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2, torch.float64: 1e-4}
"""Largest difference of the experts' output from its recomputation, relative to the output's norm, by weight type."""

SAMPLED_TOKENS = 256
"""Tokens of a sampled batch whose expert outputs are recomputed."""

SAMPLE_EVERY = 100
"""The first forward is sampled, and then every so many."""

_FINDINGS = {
    "mask unknown": (
        "mask known",
        "forwards had an attention mask that is not 2-D: padding could not be told from text and was counted; pass a"
        " 2-D mask, or session.label(mask=...)",
    ),
    "cached prefix": (
        "whole sequences",
        "sequences began with a cache that was filled before: their prefix was not seen",
    ),
    "rows changed": (
        "whole sequences",
        "batches changed their number of rows under one cache (beam search?): they were taken for new sequences",
    ),
    "rejected": (
        "tokens kept",
        "tokens were recorded and then taken back from the cache (speculative decoding): they are counted",
    ),
    "fed again": (
        "text fed once",
        "forwards fed the text of the one before again with one token more (generation without a cache?): what they"
        " repeat is counted each time",
    ),
    "went on after the end": (
        "end of sequence",
        "rows went on after their end token: the step of the end token itself is not counted",
    ),
    "failed forward": ("forwards completed", "forwards ended with an exception and are not counted"),
    "outside a forward": (
        "calls inside a forward",
        "calls of experts outside a forward of the watched model (gradient checkpointing?) are not counted",
    ),
    "rows unlike tokens": (
        "rows match tokens",
        "calls of experts had another number of rows than the forward has tokens: they could not be attributed and are"
        " not counted",
    ),
}
_FATAL = ("rows unlike tokens",)
_HARMLESS = ("failed forward", "outside a forward")


@dataclass
class _Layer:
    """What was counted for one MoE layer."""

    tokens: int = 0
    top_k: int = 0
    selections: int = 0
    strange_ids: int = 0
    nonfinite: int = 0
    saw_logits: bool = False
    missed: int = 0
    difference: float | None = None
    rebuilt: float | None = None
    unlike_router: int | None = None


@dataclass
class Checks:
    """Counts and measures while watching; :meth:`table` draws the conclusions.

    Attributes:
        layers: the MoE layers of the model.
        findings: things that happened, by name, with how often.
        unchanged: number of values by which the outputs with and without the profiler differ; None where nobody looked.
        forwards: forwards watched.
        empty_sequences: sequences of only padding.
    """

    layers: Sequence[MoELayer]
    findings: Counter[str] = field(default_factory=Counter)
    unchanged: int | None = None
    forwards: int = 0
    empty_sequences: int = 0

    def __post_init__(self) -> None:
        self._layers: dict[LayerKey, _Layer] = defaultdict(_Layer)

    def wants_sample(self) -> bool:
        """Whether the forward that begins now is to be recomputed."""
        return self.forwards % SAMPLE_EVERY == 0

    def update(self, batch: RoutingBatch) -> None:
        """Count the selections of a batch."""
        selections = (batch.ids >= 0).sum((1, 2)).tolist()
        strange = batch.strange_ids.tolist() if batch.strange_ids is not None else [0] * len(selections)
        nonfinite = [0] * len(selections)
        if batch.logits is not None and not bool(torch.isfinite(batch.logits.sum())):
            nonfinite = (~torch.isfinite(batch.logits).all(-1)).sum(1).tolist()
        for index, key in enumerate(batch.keys):
            layer = self._layers[key]
            layer.tokens += len(batch.tokens)
            layer.top_k = max(layer.top_k, batch.ids.shape[-1])
            layer.selections += selections[index]
            layer.strange_ids += strange[index]
            layer.nonfinite += nonfinite[index]
            layer.saw_logits |= batch.logits is not None

    def saw_layers(self, seen: Mapping[LayerKey, object]) -> None:
        """A forward has ended; which experts modules were called in it. One per decoder layer is enough."""
        self.forwards += 1
        called = {layer for layer, _ in seen}
        for layer in self.layers:
            if layer.layer not in called:
                self._layers[layer.key].missed += 1

    def compare(self, layer: MoELayer, call: ExpertsCall, output: Tensor, rows: TappedRows | None) -> None:
        """Recompute the experts' output of some tokens from what went in, and from the rows that were seen inside."""
        state = self._layers[layer.key]
        output = output.detach().reshape(call.hidden.shape)
        result = output[:SAMPLED_TOKENS].float()
        scale = float(result.norm()) or 1.0
        if layer.layout is not None and not any(tensor.is_meta for tensor in call.module.parameters()):
            difference = float((recompute(call, layer.layout, SAMPLED_TOKENS) - result).norm()) / scale
            state.difference = max(state.difference or 0.0, difference)
        if rows is not None:
            total = torch.zeros_like(output, dtype=torch.float32)
            total.index_add_(0, rows.token, rows.output.float() * rows.gate.float()[:, None])
            state.rebuilt = max(state.rebuilt or 0.0, float((total[:SAMPLED_TOKENS] - result).norm()) / scale)

    def compare_selection(self, layer: MoELayer, chosen: Tensor, executed: Tensor) -> None:
        """Compare the ids that the router returned with those that the experts were called with."""
        state = self._layers[layer.key]
        unlike = int((chosen.reshape(executed.shape) != executed).sum())
        state.unlike_router = (state.unlike_router or 0) + unlike

    def table(self) -> pl.DataFrame:
        """Rows of table ``check``."""
        rows: list[dict[str, object]] = []
        for layer in self.layers:
            rows += self._rows_of(layer, self._layers[layer.key])
        rows += self._rows_of_run()
        types = {"name": pl.String, "layer": pl.Int32, "step": pl.Int32, "status": pl.String}
        types |= {"value": pl.Float64, "tolerance": pl.Float64, "detail": pl.String}
        return pl.DataFrame(rows, schema=types)

    def _rows_of(self, layer: MoELayer, state: _Layer) -> list[dict[str, object]]:
        tolerance = TOLERANCES.get(next(layer.experts.parameters()).dtype, 4e-2)
        missed = f"missing in {state.missed} of {self.forwards} forwards"
        unlike = "executed ids that differ from those that the router returned, on sampled forwards"
        nonfinite = f"{state.nonfinite} of {state.tokens} tokens have router logits that are NaN or infinite"
        recomputed = "experts' output recomputed from inputs, ids and weights; difference relative to its norm"
        if state.difference is None:
            recomputed = "not recomputed: the weights could not be read where they are, or no forward was sampled"
        rebuilt = "experts' output rebuilt from the rows seen inside; difference relative to its norm"
        rows = [
            _measured("layer seen", layer, state.missed, 0, missed),
            self._count_row(layer, state),
            _measured("expert ids in range", layer, state.strange_ids, 0, "selected ids that are no expert"),
            _measured("output recomputed", layer, state.difference, tolerance, recomputed),
        ]
        if state.rebuilt is not None:
            rows.append(_measured("rows rebuild output", layer, state.rebuilt, tolerance, rebuilt))
        if state.unlike_router is not None:
            rows.append(_measured("router's choice ran", layer, state.unlike_router, 0, unlike))
        if state.saw_logits:
            rows.append(_measured("router logits finite", layer, state.nonfinite, 0, nonfinite))
        return rows

    def _count_row(self, layer: MoELayer, state: _Layer) -> dict[str, object]:
        expected = state.tokens * state.top_k
        lost = expected - state.selections
        good = lost >= 0 if layer.traits.zero_weight_is_none else lost == 0
        detail = f"{state.selections} selections of {state.tokens} tokens x {state.top_k}"
        return _row("selections add up", layer, good, lost, 0, detail)

    def _rows_of_run(self) -> list[dict[str, object]]:
        rows: list[dict[str, object]] = []
        for finding, (name, detail) in _FINDINGS.items():
            count = self.findings[finding]
            if count:
                status = "fail" if finding in _FATAL else "pass" if finding in _HARMLESS else "warning"
                rows.append(_row(name, None, status, count, 0, f"{count} {detail}"))
            elif finding == "mask unknown":
                rows.append(_row(name, None, True, 0, 0, "every forward said which tokens are padding, or had none"))
        if self.unchanged is None:
            rows.append(_row("outputs unchanged", None, None, None, 0, "not checked: only collect runs a batch twice"))
        else:
            detail = "values that differ between a forward with and one without the profiler"
            rows.append(_row("outputs unchanged", None, self.unchanged == 0, self.unchanged, 0, detail))
        if self.empty_sequences:
            detail = f"{self.empty_sequences} sequences have no token but padding"
            rows.append(_row("empty sequences", None, True, self.empty_sequences, None, detail))
        return rows


def _measured(
    name: str, layer: MoELayer | None, value: float | None, tolerance: float, detail: str
) -> dict[str, object]:
    """A row that passes if the value is within the tolerance, and is skipped if nothing was measured."""
    return _row(name, layer, None if value is None else value <= tolerance, value, tolerance, detail)


def _row(
    name: str,
    layer: MoELayer | None,
    good: bool | str | None,
    value: float | None,
    tolerance: float | None,
    detail: str,
) -> dict[str, object]:
    status = good if isinstance(good, str) else {True: "pass", False: "fail", None: "skipped"}[good]
    return {
        "name": name,
        "layer": layer.layer if layer else None,
        "step": layer.step if layer else None,
        "status": status,
        "value": None if value is None else float(value),
        "tolerance": None if tolerance is None else float(tolerance),
        "detail": f"layer {layer.layer}: {detail}" if layer else detail,
    }
