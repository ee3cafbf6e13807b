"""Tiny OLMoE models whose routers are rewritten by plain hooks: what rules do, written down a second time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from profiler.corpus import TokenBatch
from tests.profiler.capture.tiny import build

Chosen = tuple[Tensor, Tensor]
"""Gate weights and ids, both (tokens, k)."""


def olmoe(**changes: Any) -> Any:
    """Two layers of 8 experts, 2 per token, weights divided by their sum."""
    return build("olmoe", **{"norm_topk_prob": True, "num_hidden_layers": 2, **changes})


def with_k(model: nn.Module, k: int) -> Any:
    """The same weights in a model that was built for another number of experts."""
    other = olmoe(num_experts_per_tok=k)
    other.load_state_dict(model.state_dict())
    return other


def batches(*, rows: int = 6, length: int = 18, seed: int = 0, domains: Sequence[str] = ("a", "b")) -> list[TokenBatch]:
    """Two batches; the last row of each is shorter, domains take turns."""
    draw = np.random.default_rng(seed)
    found = []
    for start in (0, rows):
        ids = draw.integers(3, 100, (rows, length))
        mask = np.ones_like(ids)
        mask[-1, length - 5 :] = 0
        numbers = np.arange(start, start + rows)
        names = [domains[number % len(domains)] for number in numbers]
        found.append(TokenBatch(ids, mask, np.zeros(ids.shape, bool), numbers, names, [""] * rows))
    return found


def routers(model: nn.Module) -> list[nn.Module]:
    """In the order of the layers."""
    return [module for module in model.modules() if type(module).__name__ == "OlmoeTopKRouter"]


@contextmanager
def choosing(model: nn.Module, choose: Callable[[int, Tensor], Chosen]) -> Iterator[None]:
    """While entered, ``choose(number of the layer, logits)`` takes the place of every router's choice."""

    def hook(number: int) -> Any:
        return lambda module, args, output: (output[0], *choose(number, output[0]))

    handles = [router.register_forward_hook(hook(number)) for number, router in enumerate(routers(model))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def best(logits: Tensor, k: int) -> Chosen:
    """The k best by softmax, weights divided by their sum."""
    weights, ids = logits.float().softmax(-1).topk(k, -1)
    return weights / weights.sum(-1, keepdim=True), ids


def logits_of(model: nn.Module, batch: TokenBatch) -> Tensor:
    """(rows, length, vocabulary) float64."""
    ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # type: ignore[operator]
    return logits.double()


def losses_of(model: nn.Module, batch: TokenBatch) -> np.ndarray[Any, Any]:
    """(rows, length - 1) -ln p of the next token, NaN where nothing is predicted."""
    logs = logits_of(model, batch).log_softmax(-1)[:, :-1]
    found = -logs.gather(-1, torch.from_numpy(batch.input_ids)[:, 1:, None])[..., 0].numpy()
    return np.where(batch.attention_mask[:, 1:] == 1, found, np.nan)
