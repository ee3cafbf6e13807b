"""Models that know one thing: what they say of the next token follows from the tokens before, by a rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

Rule = Callable[[Sequence[int]], int]
"""Tokens so far -> the next one."""


class Planted(nn.Module):
    """A language model that follows a rule; the likeliest token has all but a little of the probability."""

    def __init__(self, rule: Rule, vocabulary: int) -> None:
        super().__init__()
        self.rule = rule
        self.head = nn.Linear(1, vocabulary, bias=False)
        self.config = SimpleNamespace(is_encoder_decoder=False)
        self.generation_config = SimpleNamespace(eos_token_id=None)
        self.calls: list[dict[str, Any]] = []

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def can_generate(self) -> bool:
        return True

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        logits = torch.zeros(*input_ids.shape, len(self.head.weight))
        for row, ids in enumerate(input_ids.tolist()):
            real = [1] * len(ids) if attention_mask is None else attention_mask[row].tolist()
            seen: list[int] = []
            for place, token in enumerate(ids):
                if real[place]:
                    seen.append(token)
                    logits[row, place, self.rule(seen)] = 20.0
        return SimpleNamespace(logits=logits)

    def generate(self, input_ids: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        self.calls.append(options)
        ends = self.generation_config.eos_token_id
        rows = []
        for ids in input_ids.tolist():
            for _ in range(max_new_tokens):
                ids.append(options["pad_token_id"] if ends is not None and ids[-1] == ends else self.rule(ids))
            rows.append(ids)
        return torch.tensor(rows)


def copier(seen: Sequence[int]) -> int:
    """What followed the last three tokens when they stood before; else 0."""
    key = list(seen[-3:])
    for place in range(len(seen) - 4, -1, -1):
        if list(seen[place : place + 3]) == key:
            return int(seen[place + 3])
    return 0


def ignorant(seen: Sequence[int]) -> int:
    """Always 0."""
    return 0
