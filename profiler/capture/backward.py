"""A forward of a causal language model with one backward behind it, for level ``gradients``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.families import is_fused_experts
from moescope.errors import ModelError
from profiler.capture.discovery import MoELayer

MAX_VALUES = 1 << 24
"""Logits that are in memory in float32 at once, whatever the batch and the vocabulary."""

BACKENDS = ("grouped_mm", "batched_mm")
"""Experts implementations that show the activation that they go on with; a copy would have no gradient."""

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-9}
"""Difference of a batch's loss with and without gradients that is rounding, relative, by weight type."""


@dataclass(frozen=True)
class Loss:
    """Cross-entropy of the next tokens of a batch.

    Attributes:
        values: (batch, length) float32, nats, at the place of the token that predicts; 0 where nothing is predicted.
        predicted: (batch, length) bool, whether the token and the one after it are both real.
        gradient: (batch, length, vocabulary) of the sum of ``values`` by the logits, in their type.
    """

    values: Tensor
    predicted: Tensor
    gradient: Tensor

    @property
    def total(self) -> float:
        """Sum over the predicted tokens."""
        return float(self.values.double().sum())

    def by_domain(self, domains: Sequence[str]) -> dict[str, tuple[int, float]]:
        """Per domain of the rows, predicted tokens and their summed loss."""
        counts, sums = self.predicted.sum(1).tolist(), self.values.double().sum(1).tolist()
        found: dict[str, tuple[int, float]] = {}
        for domain, count, total in zip(domains, counts, sums, strict=True):
            before = found.get(domain, (0, 0.0))
            found[domain] = (before[0] + count, before[1] + total)
        return found


@torch.no_grad()
def next_token_loss(logits: Tensor, input_ids: Tensor, mask: Tensor) -> Loss:
    """The loss of (batch, length, vocabulary) logits and its gradient, softmax minus one-hot, in float32 by parts.

    It is written out because an autograd graph would hold two more copies of the logits in float32.
    """
    real = mask.to(logits.device) != 0
    predicted = torch.zeros_like(real)
    predicted[:, :-1] = real[:, :-1] & real[:, 1:]
    targets = input_ids.to(logits.device).roll(-1, dims=1)[predicted]
    places = predicted.reshape(-1).nonzero()[:, 0]
    values, gradient = torch.zeros(predicted.numel(), device=logits.device), torch.zeros_like(logits)
    flat, flat_gradient = logits.reshape(-1, logits.shape[-1]), gradient.view(-1, logits.shape[-1])
    size = max(1, MAX_VALUES // logits.shape[-1])
    for where, target in zip(places.split(size), targets.split(size), strict=True):
        scores = torch.log_softmax(flat[where].float(), -1)
        values[where] = -scores.gather(1, target[:, None])[:, 0]
        slope = scores.exp_()
        slope[torch.arange(len(where), device=where.device), target] -= 1
        flat_gradient[where] = slope.to(logits.dtype)
    return Loss(values.view(predicted.shape), predicted, gradient)


def forward_backward(model: nn.Module, input_ids: Tensor, mask: Tensor) -> Loss:
    """Run the model with its head, and a backward from the summed loss to the embeddings; no graph is left."""
    with torch.enable_grad(), _only_activations(model):
        logits = _logits(model, input_ids, mask)
        loss = next_token_loss(logits.detach(), input_ids, mask)
        logits.backward(loss.gradient)
    return loss


def forward_loss(model: nn.Module, input_ids: Tensor, mask: Tensor) -> Loss:
    """The loss alone, as the plain model has it."""
    with torch.no_grad():
        return next_token_loss(_logits(model, input_ids, mask), input_ids, mask)


def _logits(model: nn.Module, input_ids: Tensor, mask: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    return logits


@contextmanager
def _only_activations(model: Any) -> Iterator[None]:
    """While entered, gradients flow back to what the input embeddings put out, and no weight gets one."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in weights:
        parameter.requires_grad_(False)

    def begin(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        # A copy: some models go on to scale it in place, which a leaf of the graph does not allow.
        return output.detach().requires_grad_().clone()

    handle = model.get_input_embeddings().register_forward_hook(begin)
    try:
        yield
    finally:
        handle.remove()
        for parameter in weights:
            parameter.requires_grad_(True)


def loss_tolerance(model: nn.Module) -> float:
    """By how much the loss may differ for rounding alone, see :data:`TOLERANCES`."""
    return TOLERANCES.get(next(model.parameters()).dtype, max(TOLERANCES.values()))


def require_gradients(layers: Sequence[MoELayer]) -> None:
    """Refuse layers whose activations have no gradient that can be seen.

    Raises:
        ModelError: a family outside the library's experts interface, or a backend that runs inside a loop or kernel.
    """
    for layer in layers:
        name = f"{layer.name} ({type(layer.experts).__name__})"
        if not is_fused_experts(layer.experts):
            raise ModelError(
                f"{name} runs its experts outside the interface of transformers, where their activations cannot be"
                " followed backward: leave level gradients out"
            )
        backend = getattr(getattr(layer.experts, "config", None), "_experts_implementation", None) or "eager"
        if backend not in BACKENDS:
            raise ModelError(
                f"{name} runs its experts with {backend!r}, which does not show the activations that it goes on with:"
                f" level gradients needs model.set_experts_implementation({BACKENDS[0]!r}), or leave it out"
            )


def require_head(model: Any) -> None:
    """Refuse a model without a loss.

    Raises:
        ModelError: it has no language-model head.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise ModelError(
            f"{type(model).__name__} has no language-model head, so there is no loss: level gradients needs the causal"
            " language model (load it with AutoModelForCausalLM)"
        )
