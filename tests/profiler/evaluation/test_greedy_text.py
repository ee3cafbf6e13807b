"""Greedy continuations against a loop over whole forwards, and their measures on planted models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from moescope.errors import ModelError
from profiler.evaluation.generation import Prompts, choose_prompts, compare_generations, generate
from tests.profiler.capture.tiny import build
from tests.profiler.evaluation.planted import Planted
from tests.profiler.evaluation.test_distribution import damaged
from tests.profiler.test_evaluate import batches

PROMPTS = Prompts(np.array([[5, 6, 7], [8, 9, 10], [11, 12, 13]]), ["code", "code", "prose"], [])


def counts_up(seen: Sequence[int]) -> int:
    return (seen[-1] + 1) % 100


def loops(seen: Sequence[int]) -> int:
    return 3 + (seen[-1] + 1) % 4


def test_measures_of_planted_models() -> None:
    found = compare_generations(Planted(loops, 100), Planted(counts_up, 100), PROMPTS, new_tokens=40)
    assert found.prompts == 3 and set(found.per_domain) == {"code", "prose"}
    repeated = found.measures["repeated_4grams"]
    assert repeated.base.value == 0.0 and repeated.model.value > 0.85
    assert found.measures["longest_loop"].model.value >= 38 and found.measures["longest_loop"].base.value == 0
    assert found.measures["distinct_1"].base.value == 1.0
    assert found.measures["distinct_1"].model.value <= 5 / 40
    assert found.measures["length"].model.value == found.measures["length"].base.value == 40
    # Each token has all but 99 e^-20 of the probability; the base finds the loops very unlikely.
    assert found.measures["entropy"].model.value == pytest.approx(20 * 99 * math.exp(-20), rel=0.1)
    assert found.measures["base_loss"].base.value == pytest.approx(99 * math.exp(-20), abs=1e-6)
    assert found.measures["base_loss"].model.value > 8
    assert found.identical.value == 0.0
    assert found.per_domain["code"].prompts == 2 and found.texts["who"].to_list() == ["model"] * 3 + ["base"] * 3


def test_equal_models_say_the_same() -> None:
    model = build("olmoe")
    found = compare_generations(model, model, PROMPTS, new_tokens=12)
    assert found.identical.value == 1.0
    assert found.common.value == found.measures["length"].model.value
    for one in found.measures.values():
        assert one.difference.value == 0.0 or math.isnan(one.difference.value)


def test_equals_a_loop_over_whole_forwards() -> None:
    base = build("olmoe")
    model = damaged(base, strength=0.3)
    found = compare_generations(model, base, PROMPTS, new_tokens=8)
    for row in found.texts.filter(who="model").iter_rows(named=True):
        ids = PROMPTS.ids[row["prompt"]].tolist()
        entropy = loss = 0.0
        for token in row["tokens"]:
            with torch.no_grad():
                p, q = (torch.softmax(one(input_ids=torch.tensor([ids])).logits[0, -1].double(), 0)
                        for one in (model, base))  # fmt: skip
            assert int(p.argmax()) == token
            entropy -= float((p * p.log()).sum())
            loss -= float(q[token].log())
            ids.append(token)
        assert row["entropy"] == pytest.approx(entropy / len(row["tokens"]), rel=1e-3)
        assert row["base_loss"] == pytest.approx(loss / len(row["tokens"]), rel=1e-3)


def test_texts_end_with_their_end_token() -> None:
    model = Planted(counts_up, 100)
    model.generation_config.eos_token_id = 12
    assert generate(model, PROMPTS.ids, 5) == [[8, 9, 10, 11, 12], [11, 12], [14, 15, 16, 17, 18]]
    found = compare_generations(model, model, PROMPTS, new_tokens=5)
    assert found.measures["length"].model.value == pytest.approx(12 / 3)


def test_what_a_checkpoint_suggests_is_overruled() -> None:
    model = build("olmoe")
    expected = generate(model, PROMPTS.ids, 8)
    for name, value in {"repetition_penalty": 5.0, "do_sample": True, "temperature": 3.0, "top_k": 2}.items():
        setattr(model.generation_config, name, value)
    assert generate(model, PROMPTS.ids, 8) == expected
    assert model.generation_config.repetition_penalty == 5.0


def test_prompts_are_the_first_tokens_of_real_text() -> None:
    found = choose_prompts(batches(4), length=8, per_domain=3)
    assert found.ids.shape == (len(found.domains), 8)
    assert {domain: found.domains.count(domain) for domain in set(found.domains)} == {"code": 3, "prose": 3}
    for batch in batches(4):
        for row, domain in enumerate(batch.domains):
            real = batch.input_ids[row][batch.attention_mask[row] == 1]
            if batch.sequences[row] == 0:
                assert domain == "prose" and found.ids[found.domains.index("prose")].tolist() == real[:8].tolist()
    none = choose_prompts(batches(1), length=12)
    assert none.left_out == ["prose", "code"] and not len(none.ids)


def test_a_model_that_cannot_generate() -> None:
    model: Any = Planted(loops, 100)
    model.can_generate = lambda: False
    with pytest.raises(ModelError, match="no language-model head to generate with: use --skip generation"):
        generate(model, PROMPTS.ids, 4)
