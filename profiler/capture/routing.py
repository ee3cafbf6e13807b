"""From what each layer was called with to batches of many layers: one set of operations instead of one per layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from profiler.capture.batch import LayerKey, RoutingBatch, Tokens, concatenate_tokens
from profiler.capture.discovery import MoELayer

MAX_VALUES = 1 << 24
"""Logits of one batch; more layers than fit are handed on in several batches."""

WAITING_TOKENS = 512
"""Forwards shorter than this (decoding) wait until that many tokens are there."""

WAITING_FORWARDS = 64
"""... or that many forwards."""


@dataclass
class LayerRouting:
    """What one experts module was called with: ids and weights (rows, k), logits (rows, classes) or None.

    ``tokens`` are those of the rows, where the call has only a part of the forward's.
    """

    layer: MoELayer
    ids: Tensor
    weights: Tensor
    logits: Tensor | None
    tokens: Tokens | None = None


_Part = tuple[Tokens, Tensor, Tensor, Tensor | None]


class RoutingBuffer:
    """Stacks layers that look alike and hands them to the recorders of routing."""

    def __init__(self, recorders: Sequence[Any]) -> None:
        self._recorders = recorders
        self._parts: dict[Any, list[_Part]] = defaultdict(list)
        self._layers: dict[Any, list[MoELayer]] = {}
        self._tokens = self._forwards = 0

    def add(self, tokens: Tokens, routing: Mapping[LayerKey, LayerRouting]) -> None:
        """Add the layers of a forward that has ended well."""
        alike: dict[Any, list[LayerRouting]] = defaultdict(list)
        for entry in routing.values():
            alike[_likeness(entry)].append(entry)
        whole = tokens
        for likeness, entries in alike.items():
            tokens = entries[0].tokens or whole
            key = (likeness, tuple(entry.layer.key for entry in entries))
            self._layers[key] = [entry.layer for entry in entries]
            ids = tokens.select(torch.stack([entry.ids for entry in entries]), 1)
            weights = tokens.select(torch.stack([entry.weights for entry in entries]), 1)
            shown = [entry.logits.float() for entry in entries if entry.logits is not None]
            logits = tokens.select(torch.stack(shown), 1) if shown else None
            self._parts[key].append((tokens, ids, weights, logits))
        self._tokens += len(whole)
        self._forwards += 1
        if self._tokens >= WAITING_TOKENS or self._forwards >= WAITING_FORWARDS:
            self.flush()

    def flush(self) -> None:
        """Hand on what waits."""
        for key, parts in self._parts.items():
            layers = self._layers[key]
            tokens = concatenate_tokens([part[0] for part in parts])
            ids = torch.cat([part[1] for part in parts], 1)
            weights = torch.cat([part[2] for part in parts], 1)
            shown = [part[3] for part in parts if part[3] is not None]
            logits = torch.cat(shown, 1) if shown else None
            classes = logits.shape[-1] if logits is not None else ids.shape[-1]
            step = max(1, MAX_VALUES // max(1, len(tokens) * classes))
            for start in range(0, len(layers), step):
                part = slice(start, start + step)
                chosen = logits[part] if logits is not None else None
                batch = _assemble(layers[part], tokens, ids[part], weights[part], chosen)
                for recorder in self._recorders:
                    recorder.update(batch)
        self._parts.clear()
        self._tokens = self._forwards = 0


def _likeness(entry: LayerRouting) -> Any:
    classes = entry.logits.shape[-1] if entry.logits is not None else 0
    layer, part = entry.layer, None if entry.tokens is None else id(entry.tokens)
    return part, layer.num_experts, layer.traits, entry.ids.shape[-1], classes, entry.ids.device, entry.weights.dtype


def _assemble(
    layers: list[MoELayer], tokens: Tokens, ids: Tensor, weights: Tensor, logits: Tensor | None
) -> RoutingBatch:
    traits = layers[0].traits
    weights = weights.float()
    if traits.zero_weight_is_none:
        ids = torch.where(weights == 0, -1, ids)
    strange = ((ids < 0) & (weights != 0)) | (ids >= layers[0].num_experts)
    ids = torch.where(strange, -1, ids)
    weights, order = weights.sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, order)
    if traits.holds_probabilities and logits is not None:
        logits = logits.clamp_min(torch.finfo(torch.float32).tiny).log()
    return RoutingBatch(
        keys=[layer.key for layer in layers],
        tokens=tokens,
        num_experts=layers[0].num_experts,
        ids=ids,
        weights=weights,
        logits=logits,
        score=traits.score,
        holds_probabilities=traits.holds_probabilities,
        strange_ids=strange.sum((1, 2)),
    )
