"""Level ``similarity`` against all experts run one by one, token by token, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from polars.testing import assert_frame_equal
from torch import Tensor

import store
from profiler.capture.levels import RecordingOptions
from profiler.capture.session import WatchSession
from profiler.recorders import similarity
from profiler.recorders.similarity import in_sample
from tests.profiler.capture.tiny import _Double, batch, build, output_of, recorded_calls

FAMILIES = ("olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss", "mixtral")
DOMAINS = [["code", "code", "code"], ["german", "code", "german"]]
BATCHES = [batch(seed=1), batch(seed=2, padding="left")]
EVERY = 3


def _watch(model: Any, folder: Path, name: str = "tiny", **options: Any) -> tuple[store.Run, list[Tensor]]:
    """A run of the two batches in two shards, and the outputs."""
    chosen = RecordingOptions(levels=("routing", "similarity"), similarity_every=EVERY, **options)
    outputs = []
    with torch.no_grad(), WatchSession(model, name=name, directory=folder, options=chosen) as session:
        for inputs, domains in zip(BATCHES, DOMAINS, strict=True):
            session.label(domains=domains)
            outputs.append(output_of(model(**inputs)))
            session.flush()
    assert session.path is not None
    return store.open_run(session.path), outputs


def _sampled() -> list[np.ndarray[Any, Any]]:
    """Per batch, (rows, length) bool."""
    sampled = []
    for number, inputs in enumerate(BATCHES):
        mask = inputs["attention_mask"]
        sequence = (torch.arange(3)[:, None] + 3 * number).expand_as(mask)
        sampled.append((in_sample(sequence, mask.cumsum(1) - 1, EVERY) & (mask == 1)).numpy())
    return sampled


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_equal_all_experts_on_the_sample(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "MAX_VALUES", 8 * 64 * 3)  # three tokens at a time
    model, sampled = build(family), _sampled()
    with torch.no_grad(), recorded_calls(model) as calls:
        plain = [output_of(model(**inputs)) for inputs in BATCHES]
    run, outputs = _watch(model, tmp_path, vectors_per_domain=True)
    assert all(torch.equal(*pair) for pair in zip(plain, outputs, strict=True))
    assert run.badge.status == "valid", run.badge.reason
    table = run.table("expert_similarity")
    for entry in calls:
        layout, experts = entry.layer.layout, _Double(entry.layer.experts)
        assert layout is not None
        for domain in ("code", "german"):
            inputs = []
            for hidden, chosen, domains in zip(entry.hidden, sampled, DOMAINS, strict=True):
                inputs.append(hidden[torch.from_numpy((chosen & (np.array(domains) == domain)[:, None]).reshape(-1))])
            tokens = torch.cat(inputs).double()
            every = np.stack([layout.run_expert(experts, number, tokens)[1].numpy() for number in range(8)])
            norms = np.linalg.norm(every, axis=2)
            found = table.filter(layer=entry.layer.layer, domain=domain).sort("expert")
            assert found["expert"].to_list() == list(range(8))
            assert set(found["tokens"]) == {len(tokens)}
            assert set(found["phase"]) == {"prompt"}
            size = np.abs(every).sum(1).max()
            assert_allclose(np.array(found["output_sum"].to_list()), every.sum(1), rtol=1e-4, atol=1e-5 * size)
            for i in range(8):
                for j in range(8):
                    products = (every[i] * every[j]).sum(1)
                    cosine = (products / (norms[i] * norms[j])).sum()
                    assert found["cosine_sum"][i][j] == pytest.approx(cosine, rel=1e-4, abs=1e-5 * len(tokens))
                    bound = 1e-5 * (norms[i] * norms[j]).sum()
                    assert found["product_sum"][i][j] == pytest.approx(products.sum(), rel=1e-4, abs=bound)


def test_domains_add_up_to_the_pooled_sums(tmp_path: Path) -> None:
    model = build("olmoe")
    apart, _ = _watch(model, tmp_path, "apart", vectors_per_domain=True)
    pooled, _ = _watch(model, tmp_path, "pooled")
    parts, whole = apart.table("expert_similarity"), pooled.table("expert_similarity")
    assert set(whole["domain"]) == {""}
    for row in whole.to_dicts():
        of = parts.filter(layer=row["layer"], expert=row["expert"])
        assert of["tokens"].sum() == row["tokens"]
        assert_allclose(np.array(of["product_sum"].to_list()).sum(0), row["product_sum"], rtol=1e-6, atol=1e-3)


def test_the_sample_is_the_same_however_the_text_is_batched(tmp_path: Path) -> None:
    model = build("qwen2_moe")
    together, _ = _watch(model, tmp_path, "together")
    options = RecordingOptions(levels=("routing", "similarity"), similarity_every=EVERY)
    with torch.no_grad(), WatchSession(model, name="alone", directory=tmp_path, options=options) as session:
        for number, inputs in enumerate(BATCHES):
            for row in reversed(range(3)):
                session.label(sequences=[3 * number + row])
                model(inputs["input_ids"][row][inputs["attention_mask"][row] == 1][None])
    assert session.path is not None
    alone = store.open_run(session.path).table("expert_similarity")
    assert_frame_equal(alone, together.table("expert_similarity"), rel_tol=1e-4, abs_tol=1e-2)


def test_one_token_of_so_many_is_in_the_sample() -> None:
    sequence, position = torch.arange(64).repeat_interleave(512), torch.arange(512).repeat(64)
    for every in (1, 4, 16):
        chosen = in_sample(sequence, position, every).view(64, 512)
        share = chosen.float().mean().item()
        assert share == pytest.approx(1 / every, rel=0.05)
        # Neither a position nor a sequence is favoured, and neighbours are drawn apart from each other.
        deviation = (share * (1 - share) / 64) ** 0.5
        assert (chosen.float().mean(0) - share).abs().max() <= 6 * deviation
        assert (chosen.float().mean(1) - share).abs().max() <= 6 * deviation
        both = (chosen[:, 1:] & chosen[:, :-1]).float().mean().item()
        assert both == pytest.approx(share**2, abs=0.01)


def test_decoded_tokens_are_sampled_apart(tmp_path: Path) -> None:
    model = build("olmoe")
    options = RecordingOptions(levels=("routing", "similarity"), similarity_every=1)
    with torch.no_grad(), WatchSession(model, name="tiny", directory=tmp_path, options=options) as session:
        model.generate(**batch(2, 6, padding="left"), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert session.path is not None
    table = store.open_run(session.path).table("expert_similarity").filter(layer=0, expert=0)
    assert dict(zip(table["phase"], table["tokens"], strict=True)) == {"prompt": 6 + 3, "decode": 2 * 3}
