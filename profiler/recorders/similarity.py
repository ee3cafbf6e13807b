"""How alike the experts of a layer answer the same tokens: table ``expert_similarity``.

All experts run on a sample of the tokens, routed to them or not, on the input that the layer really had. Per pair of
experts the sums of the cosine (Sub-MoE) and of the scalar product of both outputs (the Gram matrix behind kernel
k-means and linear kernels), per expert the sum of its outputs (HC-SMoE). Tokens outside the sample cost nothing: one
token of 16 costs as much as the model's own experts where E / k is 16.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl
import torch
from torch import Tensor

from profiler.capture.batch import BlockBatch, LayerKey, Tokens
from profiler.capture.discovery import MoELayer
from profiler.capture.hooks import Hooks
from profiler.capture.tap import ExpertsCall, TappedRows
from profiler.recorders.base import double_lists, float_lists, token_parts
from profiler.recorders.staged import Staged

if TYPE_CHECKING:
    from profiler.capture.observer import Observer

MAX_VALUES = 1 << 24
"""Outputs of all experts that are in memory at once; more tokens than fit are taken in turns."""

SimilarityKey = tuple[LayerKey, str, str]
"""((layer, step), domain, phase); the domain is empty where vectors are pooled."""

_MIX = (-7046029254386353131, -4417276706812531889, -7723592293110705685)
"""Odd 64-bit constants (of splitmix64 and xxHash), as signed numbers."""


def in_sample(sequence: Tensor, position: Tensor, every: int) -> Tensor:
    """(tokens,) bool: whether a token is in the sample, by a hash of its sequence and position.

    So the same text gives the same sample however it is cut into batches and shards.
    """
    mixed = (sequence + 1) * _MIX[0] + (position + 1) * _MIX[1]
    for shift in (29, 32):
        mixed = (mixed ^ (mixed >> shift)) * _MIX[2]
    return (mixed >> 33 & 0x3FFFFFFF) % every == 0


@dataclass
class _State:
    """Tokens, and the sums over them: outputs (experts, width), cosines and products (experts, experts)."""

    tokens: int
    outputs: Tensor
    cosines: Tensor
    products: Tensor

    def __add__(self, other: _State) -> _State:
        return _State(
            self.tokens + other.tokens,
            self.outputs + other.outputs,
            self.cosines + other.cosines,
            self.products + other.products,
        )


class SimilarityRecorder(Staged):
    """Runs all experts on sampled tokens, in the type of their weights, and sums in float64.

    Args:
        every: one token of so many is in the sample.
        by_domain: keep domains apart.
    """

    needs_rows = False

    def __init__(self, every: int = 16, by_domain: bool = False) -> None:
        super().__init__()
        self._every, self._by_domain = every, by_domain
        self._observer: Observer | None = None
        self._sample: tuple[Tokens, Tensor] | None = None
        self._states: dict[SimilarityKey, _State] = {}

    def attach(self, observer: Observer, hooks: Hooks, stack: ExitStack) -> None:
        """Remember whose forwards these are."""
        self._observer = observer

    def saw_experts(
        self, layer: MoELayer, call: ExpertsCall, rows: TappedRows | None, block: BlockBatch | None
    ) -> None:
        """Run all experts of the layer on the sampled tokens of the forward."""
        frame = self._observer.frame if self._observer is not None else None
        tokens = frame.tokens_of(layer, len(call.ids)) if frame is not None else None
        if tokens is None or layer.layout is None:
            return
        device = call.hidden.device
        sample = self._places(tokens).to(device)
        if not len(sample):
            return
        place = sample if tokens.keep is None else tokens.keep.to(device)[sample]
        inputs = call.hidden.detach()[place]
        for domain, phase, chosen in token_parts(tokens, device, by_domain=self._by_domain):
            part = inputs if chosen is None else inputs[chosen[sample]]
            if len(part):
                key, state = (layer.key, domain, phase), _compare(layer, call, part)
                self.later(lambda key=key, state=state: self._add(key, state))  # type: ignore[misc]

    def _places(self, tokens: Tokens) -> Tensor:
        """(sampled,) indices into the tokens of the forward; worked out once for all layers."""
        if self._sample is None or self._sample[0] is not tokens:
            chosen = in_sample(tokens.sequence, tokens.position, self._every)
            self._sample = (tokens, chosen.nonzero()[:, 0])
        return self._sample[1]

    def _add(self, key: SimilarityKey, state: _State) -> None:
        self._states[key] = self._states[key] + state if key in self._states else state

    def commit(self) -> None:
        """The forward has ended well."""
        super().commit()
        self._sample = None

    def drain(self) -> dict[str, pl.DataFrame]:
        """Table ``expert_similarity``, one row per expert."""
        states, self._states = self._states, {}
        frames = []
        for ((layer, step), domain, phase), state in states.items():
            frame = pl.DataFrame(
                {
                    "expert": range(len(state.cosines)),
                    "output_sum": float_lists(state.outputs),
                    "cosine_sum": double_lists(state.cosines),
                    "product_sum": double_lists(state.products),
                }
            )
            named = {"layer": layer, "step": step, "domain": domain, "phase": phase, "tokens": state.tokens}
            frames.append(frame.with_columns(**{name: pl.lit(value) for name, value in named.items()}))
        return {"expert_similarity": pl.concat(frames)} if frames else {}


def _compare(layer: MoELayer, call: ExpertsCall, inputs: Tensor) -> _State:
    """Sums over tokens of what all experts put out and of how alike it is; (tokens, hidden) ``inputs``."""
    assert layer.layout is not None, "refused before the run began"
    experts, width = layer.layout.num_experts, inputs.shape[1]
    inputs = inputs.to(layer.layout.down_weight(call.module, 0).dtype)
    total: _State | None = None
    for part in inputs.split(max(1, MAX_VALUES // (experts * width))):
        outputs = torch.stack(
            [layer.layout.run_expert(call.module, expert, part)[1].float() for expert in range(experts)]
        )
        outputs = torch.nan_to_num_(outputs, nan=0.0, posinf=0.0, neginf=0.0)  # shape: (experts, tokens, width)
        sums, flat = outputs.sum(1).double(), outputs.flatten(1)
        products = (flat @ flat.mT).double()
        # The sum over tokens of all cosines is one product of the directions, token beside token.
        outputs /= torch.linalg.vector_norm(outputs, dim=2, keepdim=True).clamp_min(torch.finfo(outputs.dtype).tiny)
        state = _State(len(part), sums, (flat @ flat.mT).double(), products)
        total = state if total is None else total + state
    assert total is not None, "called without tokens"
    return total
