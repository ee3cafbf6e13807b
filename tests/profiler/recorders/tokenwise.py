"""What a tiny model did, token by token in float64: the oracle that sums and scores are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import profiler
import store
from profiler.capture.discovery import MoELayer
from tests.profiler.capture.tiny import Calls, batch, recorded_calls

Array = NDArray[np.float64]

DOMAINS = [["code", "code", "code"], ["german", "code", "german"]]
NEW_TOKENS = 4
"""Generated tokens; the last of them is never fed, so that there is one forward of decoding less."""


@dataclass
class Shared:
    """The shared experts of a layer; see :class:`LayerTokens`."""

    gate: Array
    inputs: Array
    activation: Array
    output: Array
    down: Array


@dataclass
class LayerTokens:
    """What one MoE layer did to every real token of all forwards.

    ids, gate, chosen logits: (tokens, k) in descending gate weight; logits: (tokens, experts); inputs, residual:
    (tokens, hidden); activation: (tokens, k, width); output: (tokens, k, hidden) before the gate weight.
    """

    layer: MoELayer
    ids: NDArray[np.int64]
    gate: Array
    logits: Array
    inputs: Array
    residual: Array
    activation: Array
    output: Array
    shared: Shared | None

    @property
    def size(self) -> int:
        """Routed experts."""
        return self.layer.num_experts

    @property
    def total(self) -> Array:
        """(tokens, hidden) the routed experts' weighted sum."""
        return (self.gate[..., None] * self.output).sum(1)

    @property
    def shift(self) -> Array:
        """(tokens,) max(0, 1 - cos(r, r + y))."""
        return np.maximum(0.0, 1.0 - cosine(self.residual, self.residual + self.total))

    @property
    def stream(self) -> Array:
        """(tokens,) squared norm of r + y."""
        after: Array = ((self.residual + self.total) ** 2).sum(1)
        return after

    def dense(self, values: Array, where: NDArray[np.bool_]) -> Array:
        """(tokens, experts, ...) values (tokens, k, ...) at their expert, 0 elsewhere and for tokens left out."""
        placed = np.zeros((len(self.ids), self.size, *values.shape[2:]))
        for slot in range(self.ids.shape[1]):
            placed[np.arange(len(self.ids)), self.ids[:, slot]] = values[:, slot]
        return placed * where.reshape(-1, *[1] * (placed.ndim - 1))


@dataclass
class Tokenwise:
    """All layers, and whose the tokens are."""

    layers: list[LayerTokens]
    domain: NDArray[Any]
    phase: NDArray[Any]
    sequence: NDArray[np.int64]
    position: NDArray[np.int64]
    entered: dict[int, Array]
    left: dict[int, Array]

    def where(self, domain: str | None = None, phase: str | None = None) -> NDArray[np.bool_]:
        """(tokens,) bool: tokens of a domain and phase; None = all."""
        kept = np.ones(len(self.domain), dtype=bool)
        if domain:
            kept &= self.domain == domain
        if phase:
            kept &= self.phase == phase
        return kept


def cosine(left: Array, right: Array) -> Array:
    """(tokens,) cosine of rows; 0 beside a row of zeros (the embedding of a padding token that was generated)."""
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return (left * right).sum(1) / np.where(norms > 0, norms, 1.0)


def play(model: Any, session: Any = None) -> None:
    """A forward with right padding, then a batch with left padding that generates; a shard each."""
    for index, domains in enumerate(DOMAINS):
        inputs = batch(seed=index + 1, padding="left" if index else "right")
        if session is not None:
            session.label(domains=domains)
        with torch.no_grad():
            if index:
                model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
            else:
                model(**inputs)
        if session is not None:
            session.flush()


def watched(model: Any, folder: Path, **options: Any) -> store.Run:
    """The run of :func:`play`."""
    with profiler.watch(model, store=folder, name="tiny", level="activations", **options) as session:
        play(model, session)
    assert session.path is not None
    return store.open_run(session.path)


def observe(model: Any) -> Tokenwise:
    """What :func:`play` does, from plain hooks, with the experts computed again in float64."""
    seen = _Seen()
    with recorded_calls(model) as calls, seen.hooked(model, [entry.layer for entry in calls]):
        play(model)
    masks = [batch(seed=index + 1, padding="left" if index else "right")["attention_mask"].numpy() for index in (0, 1)]
    steps = NEW_TOKENS - 1
    real = np.concatenate([*(mask.reshape(-1) == 1 for mask in masks), np.ones(3 * steps, dtype=bool)])
    later = [masks[1].sum(1) + step for step in range(steps)]
    columns = {
        "domain": [*(np.repeat(names, 12) for names in DOMAINS), *([np.array(DOMAINS[1])] * steps)],
        "phase": [np.repeat("prompt", 72), np.repeat("decode", 3 * steps)],
        "sequence": [np.repeat(np.arange(6), 12), np.tile(np.arange(3, 6), steps)],
        "position": [*((mask.cumsum(1) - 1).reshape(-1) for mask in masks), *later],
    }
    named = {name: np.concatenate(parts)[real] for name, parts in columns.items()}
    return Tokenwise(
        layers=[_layer_tokens(entry, seen, real) for entry in calls],
        **named,
        entered={index: np.concatenate(parts)[real] for index, parts in seen.entered.items()},
        left={index: np.concatenate(parts)[real] for index, parts in seen.left.items()},
    )


def _layer_tokens(entry: Calls, seen: _Seen, real: NDArray[np.bool_]) -> LayerTokens:
    layer = entry.layer
    rows = [entry.rows(call) for call in range(len(entry.ids))]
    ids, gate = _joined(entry.ids)[real].astype(np.int64), _joined(entry.weights)[real]
    order = np.argsort(-gate, axis=1, kind="stable")
    activation, output = (np.concatenate([row[index] for row in rows])[real] for index in (0, 1))
    shared = None
    if layer.shared is not None:
        gates, inputs = (np.concatenate(part)[real] for part in (seen.gates[layer.layer], seen.inputs[layer.layer]))
        module = layer.shared.module
        gate_weight, up, down = (getattr(module, name).weight.detach().double().numpy() for name in _PROJECTIONS)
        first = inputs @ gate_weight.T
        inner = first / (1 + np.exp(-first)) * (inputs @ up.T)
        shared = Shared(gates, inputs, inner, inner @ down.T, down)
    return LayerTokens(
        layer=layer,
        ids=np.take_along_axis(ids, order, 1),
        gate=np.take_along_axis(gate, order, 1),
        logits=_joined(entry.logits)[real],
        inputs=_joined(entry.hidden)[real],
        residual=np.concatenate(seen.residual[layer.layer])[real],
        activation=np.take_along_axis(activation, order[..., None], 1),
        output=np.take_along_axis(output, order[..., None], 1),
        shared=shared,
    )


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def _joined(parts: list[torch.Tensor]) -> Any:
    return np.concatenate([part.double().numpy() for part in parts])


class _Seen:
    """Residual streams and shared experts' inputs, as plain hooks see them; (rows, ...) per forward."""

    def __init__(self) -> None:
        self.residual: dict[int, list[Array]] = {}
        self.entered: dict[int, list[Array]] = {}
        self.left: dict[int, list[Array]] = {}
        self.inputs: dict[int, list[Array]] = {}
        self.gates: dict[int, list[Array]] = {}

    @contextmanager
    def hooked(self, model: Any, layers: list[MoELayer]) -> Iterator[None]:
        handles = []
        for index, module in enumerate(model.model.layers):
            handles.append(module.register_forward_hook(self._around(index)))
            norm = module.post_attention_layernorm
            handles.append(norm.register_forward_pre_hook(self._before(self.residual, index)))
        for layer in layers:
            if layer.shared is not None:
                handles.append(layer.shared.module.register_forward_pre_hook(self._shared(layer)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _around(self, index: int) -> Any:
        def see(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            self.entered.setdefault(index, []).append(_flat(args[0]))
            self.left.setdefault(index, []).append(_flat(hidden))

        return see

    @staticmethod
    def _before(kept: dict[int, list[Array]], index: int) -> Any:
        return lambda module, args: kept.setdefault(index, []).append(_flat(args[0])) or None

    def _shared(self, layer: MoELayer) -> Any:
        def see(module: nn.Module, args: Any) -> None:
            inputs, gate = _flat(args[0]), layer.shared.gate if layer.shared else None
            weight = np.ones(len(inputs))
            if gate is not None:
                weight = 1 / (1 + np.exp(-(inputs @ gate.weight.detach().double().numpy()[0])))
            self.inputs.setdefault(layer.layer, []).append(inputs)
            self.gates.setdefault(layer.layer, []).append(weight)

        return see


def _flat(values: torch.Tensor) -> Array:
    flat: Array = values.detach().double().reshape(-1, values.shape[-1]).numpy()
    return flat
