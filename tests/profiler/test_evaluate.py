"""Perplexity against a float64 computation from whole logits, whatever the family does to them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from moescope.errors import CorpusError, ModelError, RunError
from profiler import evaluate
from profiler.corpus import TokenBatch
from tests.profiler.capture.tiny import batch, build

# Plain; scaled logits; scaled logits; soft-capped logits; a head of its own.
FAMILIES = ("olmoe", "granitemoe", "cohere2_moe", "gemma4_text", "gpt_oss")


def batches(count: int = 2, *, rows: int = 3, length: int = 12) -> Iterator[TokenBatch]:
    """Batches with padding on the right or on the left, in two domains."""
    for number in range(count):
        inputs = batch(rows, length, padding="left" if number % 2 else "right", seed=number)
        ids, mask = inputs["input_ids"].numpy(), inputs["attention_mask"].numpy()
        domains = ["code" if row % 2 else "prose" for row in range(rows)]
        sequences = np.arange(rows) + rows * number
        yield TokenBatch(ids, mask, np.zeros_like(mask, bool), sequences, domains, [""] * rows)


def by_hand(model: Any, given: Iterator[TokenBatch]) -> dict[int, tuple[str, int, float]]:
    """Domain, predictions and loss of each sequence, in float64 and token by token."""
    found = {}
    for part in given:
        with torch.no_grad():
            logits = model(
                input_ids=torch.from_numpy(part.input_ids), attention_mask=torch.from_numpy(part.attention_mask)
            ).logits.double()
        for row, sequence in enumerate(part.sequences):
            real = np.flatnonzero(part.attention_mask[row])
            losses = [
                -torch.log_softmax(logits[row, place], 0)[part.input_ids[row, following]].item()
                for place, following in zip(real[:-1], real[1:], strict=True)
            ]
            found[int(sequence)] = part.domains[row], len(losses), sum(losses)
    return found


@pytest.mark.parametrize("entries", [1 << 26, 1200], ids=["whole", "in parts"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_whole_logits_in_float64(monkeypatch: pytest.MonkeyPatch, family: str, entries: int) -> None:
    model = build(family)
    expected = by_hand(model, batches())
    monkeypatch.setattr(evaluate, "ENTRIES", entries)
    found = evaluate.perplexity(model, batches())
    for sequence, domain, predictions, loss in found.sequences.iter_rows():
        assert (domain, predictions) == expected[sequence][:2]
        assert loss == pytest.approx(expected[sequence][2], rel=1e-5)
    tokens = sum(entry[1] for entry in expected.values())
    assert found.tokens == tokens
    assert found.value == pytest.approx(math.exp(sum(entry[2] for entry in expected.values()) / tokens), rel=1e-5)
    assert found.low < found.value < found.high
    code = [entry for entry in expected.values() if entry[0] == "code"]
    assert found.per_domain["code"].tokens == sum(entry[1] for entry in code)
    assert set(found.per_domain) == {"code", "prose"}


def test_parts_are_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build("olmoe"), batch()
    runs: list[int] = []
    model.model.layers[0].register_forward_hook(lambda *_: runs.append(1))
    monkeypatch.setattr(evaluate, "ENTRIES", 3 * model.config.vocab_size * 5)
    parts = list(evaluate.logit_chunks(model, **inputs))
    assert [(start, logits.shape[1]) for start, logits in parts] == [(0, 5), (5, 5), (10, 2)]
    assert len(runs) == 1  # the decoder ran once
    with torch.no_grad():
        whole = model(**inputs).logits
    torch.testing.assert_close(torch.cat([logits for _, logits in parts], 1), whole)
    assert "forward" not in model.model.__dict__


def test_a_uniform_model() -> None:
    config = OlmoeConfig(
        vocab_size=120, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=1,
    )  # fmt: skip
    model = OlmoeForCausalLM(config)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.train()
    assert evaluate.perplexity(model, batches()).value == pytest.approx(120, rel=1e-6)
    assert model.training  # left as it was found


def test_ratio_needs_the_same_sequences() -> None:
    model = build("olmoe")
    one, more = evaluate.perplexity(model, batches(1)), evaluate.perplexity(model, batches(2))
    same = evaluate.ratio(one, one)
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)
    with pytest.raises(CorpusError, match="same sequences only"):
        evaluate.ratio(one, more)


def test_what_cannot_be_measured() -> None:
    model = build("olmoe")
    with pytest.raises(CorpusError, match="nothing to predict"):
        evaluate.perplexity(model, [])
    with pytest.raises(CorpusError, match="nothing to predict"):
        evaluate.perplexity(model, batches(1, length=1))
    with pytest.raises(ModelError, match="no language-model head"):
        evaluate.perplexity(build("qwen3_vl_moe_text"), batches())
    too_long = batches(1, length=model.config.max_position_embeddings + 1)
    with pytest.raises(ModelError, match="more than the [0-9]+ positions of the model: use --sequence-length"):
        evaluate.perplexity(model, too_long)
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(RunError, match="not finite on 6 of 6 sequences, such as 0"):
        evaluate.perplexity(model, batches())
