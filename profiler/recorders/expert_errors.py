"""What narrower weights of an expert do to its output: tables ``expert_error`` and ``expert_grid``.

On a sample of the tokens that were routed to it, each expert runs with its weights on the grid of every width that a
plan may ask for: all projections at once, and one at a time. The squared norm of what its output changes by, times the
squared gate weight, is what mixed widths are chosen by; MC-MoE (arXiv 2410.06270, ICLR 2025) takes the norm of the same
over the block's output. Weights and inputs are taken in float32, so that the width is measured and not the rounding of
the model's own type. Shared experts are multiplied with the gate that their block gives them (Qwen), else with 1.

Putting a matrix on its grids costs more than running a few tokens, so sampled inputs wait on the host and are worked
off expert by expert whenever a shard is written: each matrix is put on each grid once per shard. A layer takes at most
``MAX_TOKENS`` sampled tokens per session; what comes later is left out, and a check says how many. So at most that many
inputs of each layer wait, and as many of its shared experts. Layers with more than ``MAX_EXPERTS`` experts, which have
a few neurons each, are left out, as in ``expert_pair``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from profiler.capture.batch import BlockBatch, Group, LayerKey, Tokens
from profiler.capture.check_rows import CheckRow, measured
from profiler.capture.discovery import MoELayer
from profiler.capture.hooks import Hooks
from profiler.capture.shared import watch_shared
from profiler.capture.tap import ExpertsCall, TappedRows
from profiler.recorders.base import finite
from profiler.recorders.narrowed import WHOLE, Narrowed, NarrowedRouted, RoutedExperts, SharedTogether, WeightedExperts
from profiler.recorders.pairs import MAX_EXPERTS
from profiler.recorders.similarity import in_sample
from profiler.recorders.staged import Staged
from profiler.recorders.widths import Changes, grids_of, outlier, try_widths

if TYPE_CHECKING:
    from profiler.capture.observer import Observer

MAX_TOKENS = 8192
"""Sampled tokens that a layer takes per session: 131,000 tokens of text at one of 16."""

TOLERANCE = 1e-4
"""Largest relative difference between an expert put together from its projections and as its layout runs it."""

CHECK = "errors of widths"

_Name = tuple[LayerKey, str]
"""((layer, step), kind)"""

_LIST = pl.List(pl.Float64)
_TYPES: dict[str, dict[str, pl.DataType]] = {
    "expert_error": {"gated_error_square_sum": _LIST, "nested_error_square_sum": _LIST},
    "expert_grid": {"error_square": _LIST},
}


@dataclass
class _Sample:
    """Sampled tokens of the experts of one layer and kind, which wait on the host.

    Attributes:
        experts: whom they went to.
        weights_input: gate weights multiply the inputs, not the outputs (Llama 4).
        inputs: (tokens, width) per forward.
        ids: (tokens, k) per forward.
        gates: (tokens, k) per forward.
        groups: (tokens,) per forward, index into the session's (domain, phase) groups.
    """

    experts: WeightedExperts
    weights_input: bool = False
    inputs: list[Tensor] = field(default_factory=list)
    ids: list[Tensor] = field(default_factory=list)
    gates: list[Tensor] = field(default_factory=list)
    groups: list[Tensor] = field(default_factory=list)


class ExpertErrorRecorder(Staged):
    """Keeps sampled inputs of routed and shared experts, and tries every width on them when a shard is written.

    Args:
        every: one token of so many is in the sample.
        by_domain: keep errors of single projections apart by domain, too.
    """

    needs_rows = False

    def __init__(self, every: int = 16, by_domain: bool = False) -> None:
        super().__init__()
        self._every, self._by_domain = every, by_domain
        self._observer: Observer | None = None
        self._chosen: tuple[Tokens, Tensor] | None = None
        self._groups: list[Group] = []
        self._samples: dict[_Name, _Sample] = {}
        self._layers: dict[LayerKey, MoELayer] = {}
        self._taken: dict[_Name, int] = {}
        self._left_out: dict[_Name, int] = {}
        self._gridded: set[_Name] = set()
        self._grids = True
        self._differences: dict[LayerKey, float] = {}

    def attach(self, observer: Observer, hooks: Hooks, stack: ExitStack) -> None:
        """Remember whose forwards these are, and watch the shared experts."""
        self._observer = observer
        for layer in observer.found.layers:
            watch_shared(layer, hooks, self._saw_shared)

    def saw_experts(
        self, layer: MoELayer, call: ExpertsCall, rows: TappedRows | None, block: BlockBatch | None
    ) -> None:
        """Keep the sampled tokens of the forward."""
        frame = self._observer.frame if self._observer is not None else None
        tokens = frame.tokens_of(layer, len(call.ids)) if frame is not None else None
        if tokens is None or layer.layout is None:
            return
        if layer.num_experts > MAX_EXPERTS:
            self.later(lambda: self._layers.update({layer.key: layer}))
            return
        sample = _Sample(RoutedExperts(layer.layout, call.module), call.adapter.weights_input)
        self._keep(layer, "routed", sample, tokens, call.hidden, call.ids, call.weights)

    def _saw_shared(
        self, layer: MoELayer, inputs: Tensor | None, gate: Tensor | None, activation: Tensor | None, output: Tensor
    ) -> None:
        frame = self._observer.frame if self._observer is not None else None
        if frame is None or inputs is None or layer.shared is None or len(output) != frame.tokens.rows:
            return
        sample = _Sample(SharedTogether(layer.shared))
        gates = torch.ones(len(inputs), device=inputs.device) if gate is None else gate
        ids = torch.zeros(len(inputs), 1, dtype=torch.int64, device=inputs.device)
        if sample.experts.count:
            self._keep(layer, "shared", sample, frame.tokens, inputs, ids, gates[:, None])

    def _keep(
        self, layer: MoELayer, kind: str, sample: _Sample, tokens: Tokens, inputs: Tensor, ids: Tensor, gates: Tensor
    ) -> None:
        """Take the sampled tokens to the host; they count when the forward has ended well."""
        name, places = (layer.key, kind), self._places(tokens)
        kept = places[: max(0, MAX_TOKENS - self._taken.get(name, 0))]
        rows = kept if tokens.keep is None else tokens.keep[kept.to(tokens.keep.device)]
        chosen = [values.detach()[rows.to(values.device)].cpu() for values in (inputs, ids, gates.float())]
        chosen.append(tokens.group[kept.to(tokens.group.device)].cpu())

        def take() -> None:
            self._layers[layer.key], self._groups = layer, tokens.groups
            self._taken[name] = self._taken.get(name, 0) + len(kept)
            self._left_out[name] = self._left_out.get(name, 0) + len(places) - len(kept)
            held = self._samples.setdefault(name, sample)
            for values, value in zip((held.inputs, held.ids, held.gates, held.groups), chosen, strict=True):
                values.append(value)

        self.later(take)

    def _places(self, tokens: Tokens) -> Tensor:
        """(sampled,) indices into the tokens of the forward; worked out once for all layers."""
        if self._chosen is None or self._chosen[0] is not tokens:
            self._chosen = (tokens, in_sample(tokens.sequence, tokens.position, self._every).nonzero()[:, 0])
        return self._chosen[1]

    def commit(self) -> None:
        """The forward has ended well."""
        super().commit()
        self._chosen = None

    def begin_part(self, of_model: bool) -> None:
        """See :meth:`~profiler.recorders.staged.Staged.begin_part`."""
        self._grids = of_model

    def checks(self) -> list[CheckRow]:
        """That experts in pieces are the experts, and what was left out."""
        rows = []
        for key, difference in self._differences.items():
            detail = f"an expert put together from its projections differs by {difference:.1e} from itself"
            rows.append(measured(CHECK, difference, TOLERANCE, detail, layer=self._layers[key]))
        for (key, kind), count in self._left_out.items():
            if count:
                detail = f"{count} sampled tokens of its {kind} experts were left out: {MAX_TOKENS} per session count"
                rows.append(CheckRow(CHECK, "skipped", count, None, detail, self._layers[key]))
        for layer in self._layers.values():
            if layer.num_experts > MAX_EXPERTS:
                detail = f"its {layer.num_experts} experts were left out: more than {MAX_EXPERTS}"
                rows.append(CheckRow(CHECK, "skipped", None, None, detail, layer))
            if layer.shared is not None and not SharedTogether(layer.shared).count:
                detail = f"its shared experts were left out: {type(layer.shared.module).__name__} keeps them otherwise"
                rows.append(CheckRow(CHECK, "skipped", None, None, detail, layer))
        return rows

    @torch.no_grad()
    def drain(self) -> dict[str, pl.DataFrame]:
        """Table ``expert_error``, a row per part of each expert that saw a sampled token, and ``expert_grid`` once."""
        samples, self._samples = self._samples, {}
        frames: dict[str, list[pl.DataFrame]] = defaultdict(list)
        for name in list(samples):
            rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
            for table, row in self._work_off(name, samples.pop(name)):
                rows[table].append(row)
            for table, found in rows.items():
                frames[table].append(pl.DataFrame(found, schema_overrides=_TYPES[table]))
            if self._grids:
                self._gridded.add(name)
        return {table: pl.concat(parts) for table, parts in frames.items()}

    def _work_off(self, name: _Name, sample: _Sample) -> Iterator[tuple[str, dict[str, Any]]]:
        """(table, row) of all experts of one layer and kind; one expert at a time is in memory in 32 bits."""
        (layer, step), kind = name
        inputs, ids, gates, groups = map(torch.cat, (sample.inputs, sample.ids, sample.gates, sample.groups))
        for number in range(sample.experts.count):
            token, slot = torch.where(ids == number)
            on_grid = self._grids and name not in self._gridded
            if not on_grid and not len(token):
                continue
            weights, gate = sample.experts.weights(number), finite(gates[token, slot])
            narrowed: Narrowed | None = None
            if len(token):
                rows = finite(inputs[token].float())
                if sample.weights_input:
                    rows, gate = rows * gate[:, None], torch.ones_like(gate)
                narrowed = sample.experts.on(number, weights, rows.to(weights["down"].device))
                if isinstance(narrowed, NarrowedRouted) and name[0] not in self._differences:
                    self._differences[name[0]] = narrowed.difference()
            grid, changes = try_widths(weights, narrowed)
            keys = {"layer": layer, "step": step, "expert": number, "kind": kind}
            for row in self._error_rows(changes, gate, groups[token]) if changes is not None else ():
                yield "expert_error", keys | row
            for part, weight in weights.items() if on_grid else ():
                yield "expert_grid", keys | {"part": part} | _grid_row(weight, grids_of(weights).group_size, grid[part])

    def _error_rows(self, changes: Changes, gate: Tensor, groups: Tensor) -> Iterator[dict[str, Any]]:
        """Rows by domain and phase; those of single projections by phase alone, where they are not kept apart."""
        squares, entries = gate.double().square().numpy(), groups.numpy()
        present = np.unique(entries).tolist()
        phases = {self._groups[entry][1] for entry in present}
        pooled = {("", phase): [entry for entry in present if self._groups[entry][1] == phase] for phase in phases}
        single = {self._groups[entry]: [entry] for entry in present}
        for part, values in changes.parts.items():
            for (domain, phase), chosen in (single if part == WHOLE or self._by_domain else pooled).items():
                mine = np.isin(entries, chosen)
                of = mine * squares
                yield {
                    "part": part, "domain": domain, "phase": phase, "tokens": int(mine.sum()),
                    "gated_output_square_sum": float(changes.energy @ of),
                    "gated_error_square_sum": (values @ of).tolist(),
                    "nested_error_square_sum": (changes.nested @ of).tolist() if part == WHOLE else None,
                }  # fmt: skip


def _grid_row(weight: Tensor, group_size: int, errors: Any) -> dict[str, Any]:
    size = float(weight.square().sum(dtype=torch.float64))
    return {"group_size": group_size, "square_sum": size, "error_square": errors.tolist(), "outlier": outlier(weight)}
