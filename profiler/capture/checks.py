"""The capture's proofs of itself: what is checked while watching, and the rows of table ``check`` that say so."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import polars as pl
import torch
from torch import Tensor

from profiler.capture.batch import LayerKey, RoutingBatch, Tokens
from profiler.capture.check_rows import SCHEMA, CheckRow, Status, finding_rows, measured
from profiler.capture.discovery import MoELayer
from profiler.capture.score_checks import ScoreEvidence, tie_row
from profiler.capture.tap import ExpertsCall, TappedRows, recompute

if TYPE_CHECKING:
    from profiler.capture.frame import Frame
    from profiler.capture.routing import LayerRouting

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2, torch.float64: 1e-4}
"""Largest difference of the experts' output from its recomputation, relative to the output's norm, by weight type."""

SAMPLED_TOKENS = 256
"""Real tokens of a sampled forward whose expert outputs are recomputed."""

SAMPLE_EVERY = 100
"""The first forward is sampled, and then every so many."""

FEW_TOKENS = 32
"""From so many tokens on it is strange that all of them use the same expert."""


@dataclass
class _Layer:
    """What was counted for one MoE layer."""

    tokens: int = 0
    top_k: int = 0
    selections: int = 0
    strange_ids: int = 0
    repeated: int = 0
    weightless: int = 0
    broken_weights: int = 0
    nonfinite: int = 0
    saw_logits: bool = False
    logit_tokens: int = 0
    ties: int = 0
    used: set[int] = field(default_factory=set)
    missed: int = 0
    sampled: int = 0
    broken_outputs: int = 0
    difference: float | None = None
    rebuilt: float | None = None
    unlike_router: int | None = None
    scores: ScoreEvidence = field(default_factory=ScoreEvidence)


@dataclass
class Checks:
    """Counts and measures while watching; :meth:`table` draws the conclusions.

    Attributes:
        layers: the MoE layers of the model.
        findings: things that happened, by name, with how often.
        unchanged: number of values by which the outputs with and without the profiler differ; None where nobody looked.
        not_compared: why nobody looked.
        forwards: forwards watched.
        padding: rows that forwards had beside their real tokens.
        empty_sequences: sequences of only padding.
        steered_by: per layer, what else than the scores decides, see :func:`~profiler.capture.score_checks.steering`.
        left_out: what else of the model holds experts, each in one sentence.
        running: the decoder layer that runs, where they run one at a time; None where all run.
    """

    layers: Sequence[MoELayer]
    findings: Counter[str] = field(default_factory=Counter)
    unchanged: int | None = None
    not_compared: str = "not checked: only collect runs a batch twice"
    forwards: int = 0
    padding: int = 0
    tokens: int = 0
    empty_sequences: int = 0
    steered_by: Mapping[LayerKey, str] = field(default_factory=dict)
    left_out: Sequence[str] = ()
    running: int | None = None

    def __post_init__(self) -> None:
        self._layers: dict[LayerKey, _Layer] = defaultdict(_Layer)
        self._known = {layer.key: layer for layer in self.layers}

    def begin_layer(self, layer: int) -> None:
        """The text runs through one decoder layer from here on: what is counted per forward starts anew."""
        self.running = layer
        self.forwards = self.tokens = self.padding = 0

    def wants_sample(self) -> bool:
        """Whether the forward that begins now is to be recomputed."""
        return self.forwards % SAMPLE_EVERY == 0

    def update(self, batch: RoutingBatch) -> None:
        """Count the selections of a batch."""
        ids, weights = batch.ids, batch.weights
        if not ids.shape[1]:
            return
        selections = (ids >= 0).sum((1, 2)).tolist()
        repeated = ((ids[..., 1:] == ids[..., :-1]) & (ids[..., 1:] >= 0)).any(-1).sum(1).tolist()
        weightless = (weights == 0).all(-1).sum(1).tolist()
        strange = batch.strange_ids.tolist() if batch.strange_ids is not None else [0] * len(selections)
        broken, nonfinite = _not_finite(weights), _not_finite(batch.logits)
        for index, key in enumerate(batch.keys):
            layer = self._layers[key]
            layer.tokens += len(batch.tokens)
            layer.top_k = max(layer.top_k, ids.shape[-1])
            layer.selections += selections[index]
            layer.repeated += repeated[index]
            layer.weightless += weightless[index]
            layer.strange_ids += strange[index]
            layer.broken_weights += broken[index] if broken else 0
            layer.nonfinite += nonfinite[index] if nonfinite else 0
            layer.saw_logits |= batch.logits is not None

    def saw_forward(self, tokens: Tokens, seen: Mapping[LayerKey, LayerRouting]) -> None:
        """A forward has ended; what experts modules were called with in it. One call per decoder layer is enough."""
        self.forwards += 1
        self.tokens += len(tokens)
        self.padding += tokens.rows - len(tokens)
        for key in seen.keys() - self._known.keys():
            self._known[key] = seen[key].layer  # a further call of the same experts
        called = {layer for layer, _ in seen}
        for layer in self.layers:
            if layer.layer not in called and self.running in (None, layer.layer):
                self._layers[layer.key].missed += 1

    def saw_sums(self, frames: Mapping[str, Sequence[pl.DataFrame]]) -> None:
        """Tables that were drained: which experts were used, and ties, are counted there already."""
        for frame in frames.get("router_load", ()):
            sums = frame.group_by("layer", "step").agg(pl.col("boundary_ties", "logit_tokens").sum())
            for layer, step, ties, tokens in sums.iter_rows():
                self._layers[layer, step].ties += ties or 0
                self._layers[layer, step].logit_tokens += tokens or 0
        for frame in frames.get("expert_load", ()):
            if "tokens" in frame.columns:
                used = frame.filter(pl.col("tokens") > 0).select("layer", "step", "expert").unique()
                for layer, step, expert in used.iter_rows():
                    self._layers[layer, step].used.add(expert)

    def compare(
        self, frame: Frame, layer: MoELayer, call: ExpertsCall, output: Tensor, rows: TappedRows | None
    ) -> None:
        """Look closely at some real tokens of one layer of a sampled forward.

        Their expert output is recomputed from what went in, and from the rows that were seen inside; the ids are
        compared with those that the router returned, and its scores with the selection.
        """
        state = self._layers[layer.key]
        chosen = _sample(frame.tokens, call.hidden.device)
        output = output.detach().reshape(-1, output.shape[-1])
        result = output[chosen].float()
        state.sampled += len(result)
        state.broken_outputs += int((~torch.isfinite(result)).any(1).sum())
        scale = float(torch.nan_to_num(result, 0.0, 0.0, 0.0).norm()) or 1.0
        if layer.layout is not None and not any(tensor.is_meta for tensor in call.module.parameters()):
            difference = float((recompute(call, layer.layout, chosen) - result).norm()) / scale
            state.difference = _larger(state.difference, difference)
        if rows is not None:
            total = torch.zeros_like(output, dtype=torch.float32)
            total.index_add_(0, rows.token, rows.output.float() * rows.gate.float()[:, None])
            state.rebuilt = _larger(state.rebuilt, float((total[chosen] - result).norm()) / scale)
        if layer.rerouted:  # what ran is not what the router chose, nor what follows from its scores
            return
        logits = frame.routing[layer.key].logits
        shown = None if logits is None else logits[chosen]
        state.scores.update(shown, call.ids[chosen], call.weights[chosen])
        returned = frame.chosen.get(layer.key, (None, None))[1]
        if returned is not None and returned.numel() == call.ids.numel():
            unlike = int((returned.reshape(call.ids.shape) != call.ids).sum())
            state.unlike_router = (state.unlike_router or 0) + unlike

    def table(self, others: Sequence[CheckRow] = ()) -> pl.DataFrame:
        """Table ``check``; ``others`` are rows about the run that were made elsewhere."""
        layers = [self._known[key] for key in sorted(self._known)]
        rows = [row for layer in layers for row in self._rows_of(layer, self._layers[layer.key])]
        rows += [*self._rows_of_run(), *others]
        return pl.DataFrame([row.as_dict() for row in rows], schema=SCHEMA)

    def _rows_of(self, layer: MoELayer, state: _Layer) -> list[CheckRow]:
        steered_by = self.steered_by.get(layer.key) or self.steered_by.get((layer.layer, layer.step % layer.stride), "")
        missed = f"missing in {state.missed} of {self.forwards} forwards"
        strange = f"{state.strange_ids} selected ids are no expert of the layer"
        rows = [
            measured("layer seen", state.missed, 0, missed, layer=layer),
            _count_row(layer, state),
            measured("expert ids in range", state.strange_ids, 0, strange, layer=layer),
            *_selection_rows(layer, state),
            *_output_rows(layer, state),
        ]
        if state.saw_logits:
            broken = f"{state.nonfinite} of {state.tokens} tokens have router logits that are NaN or infinite"
            rows.append(measured("router logits finite", state.nonfinite, 0, broken, layer=layer))
        rows += state.scores.rows(layer, steered_by)
        if state.logit_tokens and layer.num_experts > state.top_k:
            rows.append(tie_row(layer, state.ties, state.logit_tokens, state.top_k, steered_by))
        return rows

    def _rows_of_run(self) -> list[CheckRow]:
        rows = finding_rows(self.findings)
        fed = f"{self.padding} of {self.padding + self.tokens} places were padding or came after the end: left out"
        rows.append(CheckRow("padding left out", "pass", self.padding, None, fed))
        unchanged = self.not_compared
        if self.unchanged is not None:
            unchanged = f"{self.unchanged} values differ between a forward with and one without the profiler"
        rows.append(measured("outputs unchanged", self.unchanged, 0, unchanged))
        if self.empty_sequences:
            detail = f"{self.empty_sequences} sequences have no token but padding"
            rows.append(CheckRow("empty sequences", "pass", self.empty_sequences, None, detail))
        return rows + [CheckRow("other experts", "skipped", None, None, sentence) for sentence in self.left_out]


def _count_row(layer: MoELayer, state: _Layer) -> CheckRow:
    expected = state.tokens * state.top_k
    lost = expected - state.selections
    detail = f"{state.selections} selections of {state.tokens} tokens x {state.top_k}"
    if layer.traits.may_skip and lost >= 0:
        return CheckRow("selections add up", "pass", lost, None, f"{detail}; the others chose no expert", layer)
    return measured("selections add up", abs(lost), 0, detail, layer=layer)


def _selection_rows(layer: MoELayer, state: _Layer) -> list[CheckRow]:
    """Signs of a kernel that routes inside and leaves its buffers empty, and of tokens that no expert worked on."""
    repeated = f"{state.repeated} of {state.tokens} tokens name one expert twice"
    repeated += ", as an empty buffer would" if state.repeated else ""
    rows = [measured("experts distinct", state.repeated, 0, repeated, layer=layer)]
    if state.tokens >= FEW_TOKENS and state.top_k < layer.num_experts and state.used:
        detail = f"{len(state.used)} of {layer.num_experts} experts are used by {state.tokens} tokens"
        if alone := len(state.used) <= state.top_k:
            detail += ": a collapsed router, or ids that are not the ones which were chosen"
        rows.append(measured("expert ids vary", int(alone), 0, detail, layer=layer, otherwise="warning"))
    weightless = f"{state.weightless} of {state.tokens} tokens have no gate weight but 0"
    if layer.traits.may_skip:
        weightless += ", by which this router skips its experts"
        rows.append(CheckRow("tokens reach experts", "pass", state.weightless, None, weightless, layer))
    else:
        weightless += ": dropped by their experts, or weights that were not filled in" if state.weightless else ""
        empty = state.tokens > 0 and state.weightless == state.tokens
        status: Status = "fail" if empty else "warning"
        rows.append(measured("tokens reach experts", state.weightless, 0, weightless, layer=layer, otherwise=status))
    broken = f"{state.broken_weights} of {state.tokens} tokens have gate weights that are NaN or infinite"
    rows.append(measured("gate weights finite", state.broken_weights, 0, broken, layer=layer))
    return rows


def _output_rows(layer: MoELayer, state: _Layer) -> list[CheckRow]:
    weight = next(layer.experts.parameters(), None)
    plain = weight is not None and layer.layout is not None  # beside packed weights, biases may be of any type
    tolerance = TOLERANCES.get(weight.dtype, 4e-2) if weight is not None and plain else 4e-2
    recomputed = "experts' output recomputed from inputs, ids and weights; difference relative to its norm"
    if state.difference is None:
        recomputed = "not recomputed: the weights could not be read where they are, or no forward was sampled"
    rows = [measured("output recomputed", state.difference, tolerance, recomputed, layer=layer)]
    if state.rebuilt is not None:
        rebuilt = "experts' output rebuilt from the rows seen inside; difference relative to its norm"
        rows.append(measured("rows rebuild output", state.rebuilt, tolerance, rebuilt, layer=layer))
    if state.sampled:
        broken = f"{state.broken_outputs} of {state.sampled} sampled tokens have outputs that are NaN or infinite"
        rows.append(measured("outputs finite", state.broken_outputs, 0, broken, layer=layer))
    if state.unlike_router is not None:
        unlike = f"{state.unlike_router} executed ids of sampled tokens differ from those that the router returned"
        rows.append(measured("router's choice ran", state.unlike_router, 0, unlike, layer=layer))
    return rows


def _sample(tokens: Tokens, device: torch.device) -> Tensor:
    """(sampled,) places of the first real tokens among the rows of a forward: padding may hold anything."""
    if tokens.keep is None:
        return torch.arange(min(SAMPLED_TOKENS, tokens.rows), device=device)
    return tokens.keep[:SAMPLED_TOKENS].to(device)


def _not_finite(values: Tensor | None) -> list[int] | None:
    """(layers) tokens with a value that is no finite number; None where a sum shows that there is none."""
    if values is None or bool(torch.isfinite(values.sum())):
        return None
    counts: list[int] = (~torch.isfinite(values).all(-1)).sum(1).tolist()
    return counts


def _larger(before: float | None, now: float) -> float:
    """The larger of both; NaN, once measured, stays."""
    return now if before is None or not now <= before else before
