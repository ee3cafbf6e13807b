"""How the routers of a changed model decide on the same tokens, layer by layer, beside those of the original.

After EAQuant (arXiv 2506.13329): the divergence of the router probabilities is taken over the experts that matter, the
m = k + floor(r (E - k)) most likely ones of the original. Both are made to sum to 1 over these, which the paper leaves
open, so that a share that moves to other experts counts as a flip and not here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.families import find_router_outputs
from moescope.errors import ModelError
from profiler.capture.discovery import MoELayer, inspect_model
from profiler.capture.hooks import Hooks

Kept = Mapping[tuple[int, int], Sequence[Sequence[int]]]
"""(layer, step) of the original -> for each expert of the changed model, the experts that it is made of."""


@dataclass(frozen=True)
class RouterShift:
    """One MoE layer.

    Attributes:
        layer: of the original.
        step: of the original.
        tokens: that both routers saw.
        flips: share of the original's selections that the changed model does not make.
        kl: nats per token, mean over tokens; None where the score is not known, or experts are merged.
    """

    layer: int
    step: int
    tokens: int
    flips: float
    kl: float | None


@torch.no_grad()
def router_shift(
    model: nn.Module,
    base: nn.Module,
    token_ids: Tensor,
    *,
    kept: Kept | None = None,
    kept_layers: Sequence[int] | None = None,
    ratio: float = 0.0,
) -> list[RouterShift]:
    """Run both models on the same tokens and compare what their routers say.

    Args:
        model: the changed one.
        base: the original.
        token_ids: (sequences, tokens), without padding.
        kept: which experts are left; None = all.
        kept_layers: decoder layers of the original that are left, in order; None = all.
        ratio: r, the part of the experts behind the k-th that counts for the divergence.

    Raises:
        ModelError: layers or experts of the two do not fit.
    """
    before, after = _answers(base, token_ids), _answers(model, token_ids)
    numbers = {layer: place for place, layer in enumerate(kept_layers)} if kept_layers is not None else None
    result = []
    for (number, step), (layer, logits, ids) in before.items():
        if numbers is not None and number not in numbers:
            continue
        place = number if numbers is None else numbers[number]
        if (place, step) not in after:
            raise ModelError(f"the model has no router in place of that of the base's layer {number}")
        _, other_logits, other_ids = after[place, step]
        members = (kept or {}).get((number, step)) or [[expert] for expert in range(logits.shape[-1])]
        if max(len(members), int(other_ids.max()) + 1) > other_logits.shape[-1]:
            raise ModelError(f"layer {number} has {other_logits.shape[-1]} experts, and {len(members)} are expected")
        flips = _flips(ids, other_ids, members, logits.shape[-1])
        kl = _divergence(layer, logits, other_logits, members, ratio)
        result.append(RouterShift(number, step, len(ids), flips, kl))
    return result


def _answers(model: nn.Module, token_ids: Tensor) -> dict[tuple[int, int], tuple[MoELayer, Tensor, Tensor]]:
    """(layer, step) -> (layer, logits (tokens, E), ids (tokens, k)) of one forward."""
    found: dict[tuple[int, int], tuple[MoELayer, Tensor, Tensor]] = {}
    with _listening(model, found):
        model(token_ids)
    if not found:
        raise ModelError(f"no router of {type(model).__name__} was seen")
    return found


@contextmanager
def _listening(model: nn.Module, found: dict[tuple[int, int], tuple[MoELayer, Tensor, Tensor]]) -> Iterator[None]:
    hooks = Hooks()
    try:
        for layer in inspect_model(model).layers:
            if layer.router is not None:
                hooks.after(layer.router, _hook(layer, found), first=True)
        yield
    finally:
        hooks.remove()


def _hook(layer: MoELayer, found: dict[tuple[int, int], tuple[MoELayer, Tensor, Tensor]]) -> Any:
    def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        logits, ids = find_router_outputs(output, logits_index=layer.logits_index, top_k=layer.top_k)
        if logits is None:
            return
        logits = logits.detach().float().flatten(0, -2)
        ids = logits.topk(min(layer.top_k, logits.shape[-1]), -1).indices if ids is None else ids.flatten(0, -2)
        found[layer.key] = (layer, logits, ids.detach().long())

    return see


def _flips(ids: Tensor, other: Tensor, members: Sequence[Sequence[int]], experts: int) -> float:
    """Share of selections of the original that no selected expert of the changed model contains."""
    contains = torch.zeros(max(len(members), int(other.max()) + 1), experts, dtype=torch.bool)
    for place, inside in enumerate(members):
        contains[place, list(inside)] = True
    reached = contains[other.cpu()].any(-2)  # (tokens, E)
    chosen = ids.cpu()
    valid = chosen >= 0
    agreed = reached.gather(-1, chosen.clamp_min(0)) & valid
    return 1.0 - float(agreed.sum()) / max(int(valid.sum()), 1)


def _divergence(
    layer: MoELayer, logits: Tensor, other: Tensor, members: Sequence[Sequence[int]], ratio: float
) -> float | None:
    found = token_divergence(layer, logits, other, members, ratio)
    return None if found is None else float(found.mean())


def token_divergence(
    layer: MoELayer, logits: Tensor, other: Tensor, members: Sequence[Sequence[int]], ratio: float = 0.0
) -> Tensor | None:
    """(tokens,) nats by which the changed router's probabilities differ over the m likeliest experts of the original.

    Args:
        layer: of the original.
        logits: (tokens, E) of the original.
        other: (tokens, experts) of the changed model.
        members: for each expert of the changed model, the experts that it is made of.
        ratio: r, the part of the experts behind the k-th that counts.

    Returns:
        None where the score of the router is not known, or experts are merged.
    """
    if layer.traits.score == "unknown" or any(len(inside) != 1 for inside in members):
        return None
    left = torch.tensor([inside[0] for inside in members])
    first = _probabilities(logits.cpu(), layer)[:, left]
    second = _probabilities(other.cpu(), layer)[:, : len(left)]
    count = layer.top_k + math.floor(ratio * (logits.shape[-1] - layer.top_k))
    top = first.topk(min(count, first.shape[-1]), -1).indices
    p, q = first.gather(-1, top).clamp_min(1e-30), second.gather(-1, top).clamp_min(1e-30)
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    return (p * (p / q).log()).sum(-1).clamp_min(0.0)


def _probabilities(logits: Tensor, layer: MoELayer) -> Tensor:
    if layer.traits.holds_probabilities:
        return logits.double()
    return logits.double().softmax(-1) if layer.traits.score == "softmax" else logits.double().sigmoid()
