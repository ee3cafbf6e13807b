"""KL divergence against a float64 computation token by token, and what is kept of a base."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from moescope.errors import CorpusError, InputError, ModelError, RunError
from profiler import evaluate
from profiler.evaluation import BaseDistribution, Divergence, divergence
from tests.profiler.capture.tiny import build
from tests.profiler.test_evaluate import batches

FAMILIES = ("olmoe", "granitemoe", "gemma4_text", "gpt_oss")


def damaged(model: Any, *, strength: float = 0.05, seed: int = 3) -> Any:
    """The same model with noise on all matrices."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.ndim >= 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * strength * parameter.std())
    return other


def by_hand(model: Any, base: Any) -> dict[int, tuple[str, int, float, int]]:
    """Domain, predictions, sum of KL and agreed tokens of each sequence, in float64 and token by token."""
    found = {}
    for part in batches():
        inputs = {
            "input_ids": torch.from_numpy(part.input_ids),
            "attention_mask": torch.from_numpy(part.attention_mask),
        }
        with torch.no_grad():
            before, after = base(**inputs).logits.double(), model(**inputs).logits.double()
        for row, sequence in enumerate(part.sequences):
            real = np.flatnonzero(part.attention_mask[row])
            total, agreed = 0.0, 0
            for place in real[:-1]:
                p, q = torch.softmax(before[row, place], 0), torch.softmax(after[row, place], 0)
                total += sum(float(one * (one / two).log()) for one, two in zip(p, q, strict=True) if one > 0)
                agreed += int(p.argmax() == q.argmax())
            found[int(sequence)] = part.domains[row], len(real) - 1, total, agreed
    return found


@pytest.mark.parametrize("entries", [1 << 26, 1200], ids=["whole", "in parts"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_a_loop_in_float64(monkeypatch: pytest.MonkeyPatch, family: str, entries: int) -> None:
    base = build(family)
    model = damaged(base)
    expected = by_hand(model, base)
    monkeypatch.setattr(evaluate, "ENTRIES", entries)
    found = divergence(model, base, batches())
    for row in found.sequences.iter_rows(named=True):
        domain, predictions, kl, agreed = expected[row["sequence"]]
        assert (row["domain"], row["predictions"], row["agreed"]) == (domain, predictions, agreed)
        assert row["kl_sum"] == pytest.approx(kl, rel=1e-3, abs=1e-5)
    tokens = sum(entry[1] for entry in expected.values())
    assert found.tokens == tokens
    assert found.kl == pytest.approx(sum(entry[2] for entry in expected.values()) / tokens, rel=1e-3)
    assert found.agreement.value == pytest.approx(sum(entry[3] for entry in expected.values()) / tokens)
    assert found.low < found.kl < found.high
    code = [entry for entry in expected.values() if entry[0] == "code"]
    assert found.per_domain["code"].kl == pytest.approx(
        sum(entry[2] for entry in code) / sum(entry[1] for entry in code), rel=1e-3
    )


@pytest.mark.parametrize("entries", [1 << 26, 1200], ids=["whole", "in parts"])
def test_a_model_does_not_differ_from_itself(monkeypatch: pytest.MonkeyPatch, entries: int) -> None:
    monkeypatch.setattr(evaluate, "ENTRIES", entries)
    model = build("olmoe")
    kept = BaseDistribution.of(model, batches())
    for found in (divergence(model, model, batches()), kept.against(model), divergence(model, kept)):
        assert (found.kl, found.low, found.high) == (0.0, 0.0, 0.0)
        assert found.agreement.value == found.ratio.value == 1.0
    assert "forward" not in model.model.__dict__


def test_what_is_kept_gives_what_both_models_give(monkeypatch: pytest.MonkeyPatch) -> None:
    base = build("olmoe")
    model = damaged(base)
    expected = divergence(model, base, batches())
    kept = BaseDistribution.of(base, batches())
    half = BaseDistribution.of(base, batches(), dtype="float16")
    monkeypatch.setattr(evaluate, "ENTRIES", 1200)  # in other parts than it was kept in
    assert_same(kept.against(model), expected, 1e-6)
    assert_same(kept.against(model), expected, 1e-6)  # and again
    assert half.against(model).kl == pytest.approx(expected.kl, rel=0.02)
    assert abs(half.against(base).kl) < 1e-5


def test_perplexities_are_those_of_evaluate() -> None:
    base = build("olmoe")
    model = damaged(base)
    found = divergence(model, base, batches())
    one, two = evaluate.perplexity(base, batches()), evaluate.perplexity(model, batches())
    assert found.ratio.value == pytest.approx(evaluate.ratio(two, one).value, rel=1e-5)
    assert found.ratio.low == pytest.approx(evaluate.ratio(two, one).low, rel=1e-4)
    np.testing.assert_allclose(found.sequences["base_loss_sum"], one.sequences["loss_sum"], rtol=1e-5)


def test_more_damage_is_more_divergence() -> None:
    base = build("olmoe")
    kept = BaseDistribution.of(base, batches(4))
    found = [kept.against(damaged(base, strength=strength)).kl for strength in (0.01, 0.05, 0.2)]
    assert 0 < found[0] < found[1] < found[2]


def test_a_token_that_the_base_excludes_adds_nothing() -> None:
    base, model = build("olmoe"), build("olmoe")

    def without(module: Any, args: Any, output: Any) -> Any:
        output[..., :7] = -torch.inf
        return output

    base.lm_head.register_forward_hook(without)
    both = divergence(base, base, [text(7)])
    assert both.kl == 0
    found = divergence(model, base, [text(7)])
    assert 0 < found.kl < np.inf
    with pytest.raises(RunError, match="the model puts out NaN or infinity on 3 of 3 sequences, such as 0"):
        divergence(base, model, [text(7)])


def text(lowest: int) -> Any:
    """One batch without padding, and without the tokens below the lowest."""
    batch = next(batches(1))
    batch.input_ids[:] = np.maximum(batch.input_ids, lowest)
    batch.attention_mask[:] = 1
    return batch


def test_padding_changes_nothing() -> None:
    base = build("olmoe")
    model = damaged(base)
    together = divergence(model, base, batches())
    alone = []
    for batch in batches():
        for row in range(len(batch.sequences)):
            real = batch.attention_mask[row] == 1
            one = type(batch)(
                batch.input_ids[row : row + 1, real],
                batch.attention_mask[row : row + 1, real],
                batch.special[row : row + 1, real],
                batch.sequences[row : row + 1],
                [batch.domains[row]],
                [""],
            )
            alone.append(one)
    assert_same(divergence(model, base, alone), together, 1e-4)


def test_what_cannot_be_measured() -> None:
    model = build("olmoe")
    with pytest.raises(CorpusError, match="nothing to predict"):
        divergence(model, model, [])
    with pytest.raises(ModelError, match="no language-model head"):
        divergence(build("qwen3_vl_moe_text"), model, batches())
    with pytest.raises(ModelError, match="predict 128 and 110 tokens"):
        divergence(model, build("olmoe", vocab_size=110), batches())
    with pytest.raises(InputError, match="give fewer tokens"):
        BaseDistribution.of(model, batches(), most_bytes=1000)
    broken = damaged(model)
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(RunError, match="the model puts out NaN"):
        divergence(broken, model, batches())
    with pytest.raises(RunError, match="the base puts out NaN"):
        divergence(model, broken, batches())


def assert_same(found: Divergence, expected: Divergence, tolerance: float) -> None:
    assert found.kl == pytest.approx(expected.kl, rel=tolerance)
    assert found.high == pytest.approx(expected.high, rel=tolerance)
    columns = found.sequences.select(pl.exclude("domain")).to_numpy()
    np.testing.assert_allclose(columns, expected.sequences.select(pl.exclude("domain")).to_numpy(), rtol=tolerance)
