"""Ask a router of a running model what it would choose for another input; the model does not notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from compressor.families import find_router_outputs
from profiler.capture.batch import Tokens
from profiler.capture.discovery import MoELayer
from profiler.capture.frame import Frame

_BIASES = ("e_score_correction_bias", "expert_bias", "moe_statics")
_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
}


@dataclass(frozen=True)
class RouterCall:
    """A router that is about to run.

    Attributes:
        layer: whose router it is.
        module: the router.
        inputs: (..., hidden) its real input.
        args: what else it is given by position.
        kwargs: what else it is given by name.
        norm: the norm that made the input, and what that was given; None where it was not seen.
        tokens: the tokens of the forward.
    """

    layer: MoELayer
    module: nn.Module
    inputs: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    norm: tuple[nn.Module, Tensor] | None
    tokens: Tokens

    def run(self, inputs: Tensor) -> Any:
        """What it returns for another input; hooks see nothing of it."""
        return self.module.forward(self._fitted(inputs), *self.args, **self.kwargs)

    def _fitted(self, inputs: Tensor) -> Tensor:
        return inputs.to(self.inputs.device, self.inputs.dtype).reshape(self.inputs.shape)

    def normed(self, residual: Tensor | None) -> Tensor | None:
        """A residual stream through the norm before this router; None where either was not seen."""
        if residual is None or self.norm is None or residual.numel() != self.norm[1].numel():
            return None
        norm, entered = self.norm
        found: Tensor = norm.forward(residual.to(entered.device, entered.dtype).reshape(entered.shape))
        return found

    def cosine(self, inputs: Tensor) -> Tensor:
        """(tokens,) cosine of an input with the real one."""
        rows = self.tokens.rows
        given, real = (self.tokens.select(x.reshape(rows, -1)).float() for x in (self._fitted(inputs), self.inputs))
        return torch.nan_to_num(torch.nn.functional.cosine_similarity(given, real, dim=1), nan=0.0)

    def candidates(self, inputs: Tensor, more: int) -> Tensor | None:
        """(tokens, at least k) experts in the order in which the router would choose them; None without scores.

        First those that the router returns, by gate weight; then up to ``more`` others, by score.
        """
        layer, rows = self.layer, self.tokens.rows
        returned = self.run(inputs)
        logits, ids = find_router_outputs(returned, logits_index=layer.logits_index, top_k=layer.top_k)
        if logits is None or logits.numel() % rows or logits.shape[-1] < layer.num_experts:
            return None
        logits = self.tokens.select(logits.reshape(rows, -1))[:, : layer.num_experts].float()
        scores = torch.nan_to_num(self._scores(logits), nan=0.0)
        if ids is None:
            return scores.argsort(dim=-1, descending=True, stable=True)
        weights = _weights(returned, ids, layer.logits_index)
        ids = self.tokens.select(ids.reshape(rows, -1))
        if weights is not None:
            order = self.tokens.select(weights.reshape(rows, -1)).argsort(dim=-1, descending=True, stable=True)
            ids = ids.gather(1, order)
        more = min(more, layer.num_experts - ids.shape[1])
        if more <= 0:
            return ids
        known = torch.where((ids >= 0) & (ids < layer.num_experts), ids, layer.num_experts)
        others = torch.cat([scores, scores[:, :1]], 1).scatter(1, known, -torch.inf)[:, : layer.num_experts]
        return torch.cat([ids, others.topk(more).indices], 1)

    def _scores(self, logits: Tensor) -> Tensor:
        bias = self._selection_bias()
        score = _SCORES.get(self.layer.traits.score)
        return logits if bias is None or score is None else score(logits) + bias.to(logits.device).float()

    def _selection_bias(self) -> Tensor | None:
        """(experts,) what is added to the scores for choosing only: handed to the router, or its own."""
        handed = [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)]
        own = [*self.module.named_buffers(), *self.module.named_parameters()]
        named = [value for name, value in own if any(part in _BIASES for part in name.split("."))]
        for value in (*handed, *named):
            if value.is_floating_point() and value.numel() == self.layer.num_experts and not value.is_meta:
                return value.detach().reshape(-1)
        return None

    def changes(self, inputs: Tensor) -> bool:
        """Whether running leaves a trace in the router; it is wiped out, for the model must not notice."""
        parts = list(self.module.modules())
        held = [tensor for part in parts for tensor in (*part._buffers.values(), *vars(part).values())]
        tensors = [(tensor, tensor.clone()) for tensor in held if isinstance(tensor, Tensor)]
        places = [(place, dict(place)) for part in parts for place in (vars(part), part._buffers)]
        self.run(inputs)
        changed = False
        for place, before in places:
            changed |= place.keys() != before.keys() or any(place[name] is not value for name, value in before.items())
            place.clear()
            place.update(before)
        for tensor, copy in tensors:
            changed |= not torch.equal(tensor, copy)
            tensor.copy_(copy)
        return changed


def _weights(returned: Any, ids: Tensor, logits_index: int) -> Tensor | None:
    """The gate weights of the ids among what a router returned."""
    values = returned if isinstance(returned, (tuple, list)) else (returned,)
    for place, value in enumerate(values):
        if place != logits_index and value.shape == ids.shape and value.is_floating_point():
            return cast(Tensor, value)
    return None


def other_inputs(args: tuple[Any, ...], kwargs: dict[str, Any], frame: Frame) -> str:
    """Why a router needs more than a hidden state: other tensors with an entry per token; empty if it does not."""
    starts = (frame.tokens.rows,), frame.inputs.shape
    for value in (*args, *kwargs.values()):
        if not isinstance(value, Tensor) or not any(value.shape[: len(start)] == start for start in starts):
            continue
        if not value.is_floating_point():
            return "its router chooses by token ids"
        if value.ndim > 1:
            return "its router takes a state of earlier layers"
    return ""
