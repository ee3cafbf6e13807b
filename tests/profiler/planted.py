"""A small model with super experts whose places are known, because they were put there.

Its text counts upwards: each token is followed by the next one, and the head knows that. The planted experts are chosen
for position 0 (BOS) alone. The first lifts one channel of its residual stream by hundreds, the others by more; the
queries of later layers look there, where the value is zero. Without that sink they look at the other tokens, whose
values are noise, and the prediction breaks: what the paper says of real models, made by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from profiler.corpus import TokenBatch

# Starting other threads takes longer than the work of such a small model.
torch.set_num_threads(1)

CHANNEL = 13
"""Channel of the massive activations."""

PLANTED = ((1, 7, 600.0), (2, 19, 900.0), (3, 30, 700.0))
"""(layer, expert, what its down_proj puts out at position 0)."""

SINKS_FROM = 4
"""First layer whose attention carries noise, so that it needs its sink."""

BOS, FIRST = 1, 4
_CONSTANT, _BEGINNING = 3, 5  # channels: 1 in every token but BOS; 1 in BOS alone
_HIDDEN, _HEADS, _WIDTH, _LAYERS, _EXPERTS, _VOCABULARY = 64, 2, 16, 12, 64, 120


def planted_model() -> Any:
    """The model, the same every time."""
    config = MixtralConfig(
        vocab_size=_VOCABULARY, hidden_size=_HIDDEN, intermediate_size=_WIDTH, num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS, num_key_value_heads=_HEADS, head_dim=_HIDDEN // _HEADS, num_local_experts=_EXPERTS,
        num_experts_per_tok=2, max_position_embeddings=512, sliding_window=None, rope_theta=1e6, bos_token_id=BOS,
        eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).eval()
    with torch.no_grad():
        _write_tokens(model)
        for index, layer in enumerate(model.model.layers):
            _write_attention(layer.self_attn, noise=2.0 if index >= SINKS_FROM else 0.0)
            layer.mlp.experts.gate_up_proj.normal_(std=0.1)
            layer.mlp.experts.down_proj.normal_(std=0.04)
            layer.mlp.gate.weight.normal_(std=0.3)
            layer.mlp.experts.gate_up_proj[..., [_BEGINNING, CHANNEL]] = 0.0
            for reserved in (_CONSTANT, _BEGINNING, CHANNEL):
                layer.mlp.experts.down_proj[:, reserved] = 0.0
                layer.mlp.gate.weight[:, reserved] = 0.0
        for number, (place, expert, size) in enumerate(PLANTED):
            # Once the channel is massive, the norm leaves nothing else to be read at position 0.
            _plant(model.model.layers[place].mlp, expert, size, reads=CHANNEL if number else _BEGINNING)
    return model


def counting_batches(count: int = 3, *, rows: int = 4, length: int = 48) -> Iterator[TokenBatch]:
    """Sequences that count upwards from random tokens, padded on the right, in two domains."""
    generator = np.random.default_rng(0)
    for number in range(count):
        starts = generator.integers(0, _VOCABULARY - FIRST, rows)
        ids = FIRST + (starts[:, None] + np.arange(length)) % (_VOCABULARY - FIRST)
        ids[:, 0] = BOS
        mask = np.ones_like(ids)
        mask[0, -7:], ids[0, -7:] = 0, 0
        sequences = np.arange(rows) + rows * number
        domains = ["low" if start < 50 else "high" for start in starts]
        yield TokenBatch(ids, mask, ids == BOS, sequences, domains, [""] * rows)


def _write_tokens(model: Any) -> None:
    tokens = torch.nn.functional.normalize(torch.randn(_VOCABULARY, _HIDDEN), dim=1)
    tokens[:, [_CONSTANT, _BEGINNING, CHANNEL]] = 0.0
    model.lm_head.weight.zero_()
    following = FIRST + (torch.arange(_VOCABULARY - FIRST) + 1) % (_VOCABULARY - FIRST)
    model.lm_head.weight[following] = 1.5 * tokens[FIRST:]
    tokens[:, _CONSTANT] = 1.0
    tokens[BOS] = 0.01 * torch.randn(_HIDDEN)
    tokens[BOS, _BEGINNING] = 1.0
    tokens[BOS, [_CONSTANT, CHANNEL]] = 0.0
    model.model.embed_tokens.weight.copy_(tokens)


def _write_attention(attention: Any, *, noise: float) -> None:
    """All queries look for the massive channel, in the pair of dimensions that positions hardly turn."""
    width = _HIDDEN // _HEADS
    for weight in (attention.q_proj.weight, attention.k_proj.weight):
        weight.zero_()
    for head in range(_HEADS):
        slow = head * width + width // 2 - 1
        attention.q_proj.weight[slow, _CONSTANT] = 5.0
        attention.k_proj.weight[slow, CHANNEL] = 5.0
    attention.v_proj.weight.normal_(std=0.3)
    attention.v_proj.weight[:, CHANNEL] = 0.0
    attention.o_proj.weight.normal_(std=noise / _HIDDEN**0.5 + 1e-9)
    attention.o_proj.weight[[_CONSTANT, _BEGINNING, CHANNEL]] = 0.0


def _plant(block: Any, expert: int, size: float, *, reads: int) -> None:
    block.gate.weight[expert] = 0.0
    block.gate.weight[expert, reads] = 5.0  # more would make all other probabilities 0, and the second choice chance
    up, down = block.experts.gate_up_proj[expert], block.experts.down_proj[expert]
    up.zero_()
    up[:, reads] = 1.0
    down.zero_()
    strength = _HIDDEN**0.5  # what the norm makes of a channel that stands alone
    activation: Tensor = torch.nn.functional.silu(torch.tensor(strength)) * strength
    down[CHANNEL] = size / (float(activation) * _WIDTH)
