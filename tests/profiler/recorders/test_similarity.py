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
from profiler.metrics.similarity import linear_hsic, normalised_gram
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
    monkeypatch.setattr(similarity, "LEAST_TOKENS", 4)
    monkeypatch.setattr(similarity, "MAX_VALUES", 0)  # eight tokens at a time
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


def _outputs(model: Any, layer: Any, hidden: list[Tensor], masks: list[np.ndarray[Any, Any]]) -> list[Any]:
    """Per batch, (experts, sampled tokens, width) outputs in float64."""
    experts, found = _Double(layer.experts), []
    for inputs, mask in zip(hidden, masks, strict=True):
        tokens = inputs[torch.from_numpy(mask.reshape(-1))].double()
        every = [layer.layout.run_expert(experts, number, tokens)[1].numpy() for number in range(layer.num_experts)]
        found.append(np.stack(every))
    return found


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_hsic_is_summed_over_groups(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "LEAST_TOKENS", 4)
    monkeypatch.setattr(similarity, "MAX_VALUES", 0)  # groups of eight tokens at most
    model = build(family)
    with torch.no_grad(), recorded_calls(model) as calls:
        for inputs in BATCHES:
            model(**inputs)
    run, _ = _watch(model, tmp_path)
    table = run.table("expert_similarity")
    for entry in calls:
        biased, unbiased, groups, counted = np.zeros((8, 8)), np.zeros((8, 8)), 0, 0
        for every in _outputs(model, entry.layer, entry.hidden, _sampled()):
            for part in np.array_split(every, -(-every.shape[1] // 8), axis=1):
                direct = linear_hsic(outputs=part)
                biased, unbiased = biased + part.shape[1] * direct[0], unbiased + part.shape[1] * direct[1]
                groups, counted = groups + 1, counted + part.shape[1]
        found = table.filter(layer=entry.layer.layer).sort("expert")
        assert set(found["groups"]) == {groups}
        assert set(found["group_tokens"]) == {counted} == set(found["tokens"])
        for column, expected in (("hsic_sum", biased), ("unbiased_hsic_sum", unbiased)):
            scale = np.sqrt(np.outer(np.diag(biased), np.diag(biased)))
            assert_allclose(np.array(found[column].to_list()) / scale, expected / scale, rtol=1e-4, atol=1e-5)


def test_few_tokens_wait_for_the_next_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "LEAST_TOKENS", 8)
    model = build("olmoe")
    options = RecordingOptions(levels=("routing", "similarity"), similarity_every=1)
    ids = torch.randint(3, 100, (1, 23), generator=torch.Generator().manual_seed(4))

    def watch(name: str, lengths: list[int], *, flush: bool = False) -> Any:
        start = 0
        with torch.no_grad(), WatchSession(model, name=name, directory=tmp_path, options=options) as session:
            for length in lengths:
                session.label(sequences=[start])
                model(ids[:, start : start + length])
                start += length
                if flush:
                    session.flush()
        assert session.path is not None
        return store.open_run(session.path).table("expert_similarity").filter(layer=0).sort("expert")

    # 3 + 3 wait, 4 more make a group of 10; 13 are one by themselves.
    found = watch("apart", [3, 3, 4, 13])
    assert (set(found["tokens"]), set(found["groups"]), set(found["group_tokens"])) == ({23}, {2}, {23})
    with torch.no_grad(), recorded_calls(model) as calls:
        for start, stop in ((0, 3), (3, 6), (6, 10), (10, 23)):
            model(ids[:, start:stop])
    entry = next(call for call in calls if call.layer.layer == 0)
    every = np.concatenate(_outputs(model, entry.layer, entry.hidden, [np.ones(len(h), bool) for h in entry.hidden]), 1)
    expected = 10 * linear_hsic(outputs=every[:, :10])[1] + 13 * linear_hsic(outputs=every[:, 10:])[1]
    assert_allclose(np.array(found["unbiased_hsic_sum"].to_list()), expected, rtol=1e-4, atol=1e-5 * expected.max())
    assert_allclose(np.array(found["output_sum"].to_list()), every.sum(1), rtol=1e-4, atol=1e-4)
    # What waits when a shard is written is in no group, and in every other sum.
    cut = watch("cut", [3, 3, 4, 13], flush=True)
    assert (set(cut["tokens"]), set(cut["groups"]), set(cut["group_tokens"])) == ({23}, {1}, {13})
    assert_allclose(np.array(cut["product_sum"].to_list()), np.array(found["product_sum"].to_list()), rtol=1e-5)


def test_a_failed_forward_leaves_nothing_to_wait(tmp_path: Path) -> None:
    model = build("olmoe")
    options = RecordingOptions(levels=("routing", "similarity"), similarity_every=1)
    with torch.no_grad(), WatchSession(model, name="tiny", directory=tmp_path, options=options) as session:
        handle = model.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(torch.arange(3, 9)[None])
        handle.remove()
        model(torch.arange(3, 13)[None])
    assert session.path is not None
    table = store.open_run(session.path).table("expert_similarity")
    assert (set(table["tokens"]), set(table["group_tokens"])) == ({10}, {10})


def test_two_experts_that_are_one_are_found(tmp_path: Path) -> None:
    model = build("olmoe")
    with torch.no_grad():
        experts = model.model.layers[1].mlp.experts
        for weight in (experts.gate_up_proj, experts.down_proj):
            weight[5] = weight[2]
    run, _ = _watch(model, tmp_path)
    found = run.table("expert_similarity").filter(layer=1).sort("expert")
    for column in ("product_sum", "hsic_sum", "unbiased_hsic_sum"):
        similarity_of = normalised_gram(gram=np.array(found[column].to_list()))
        assert similarity_of[2, 5] == pytest.approx(1.0, abs=1e-5)
        np.fill_diagonal(similarity_of, 0)
        assert (similarity_of.argmax(1)[[2, 5]] == [5, 2]).all()
    assert found["cosine_sum"][2][5] / found["tokens"][2] == pytest.approx(1.0, abs=1e-5)
    weights = run.table("expert_weight_similarity").filter(layer=1, matrix="all").sort("expert")
    for column in ("cosine", "mean_cosine", "matched_cosine"):
        assert weights[column][2][5] == pytest.approx(1.0, abs=1e-5)


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
    # Groups are made of what stands together in a batch; all other sums are not.
    grouped = ["groups", "group_tokens", "hsic_sum", "unbiased_hsic_sum"]
    alone = store.open_run(session.path).table("expert_similarity").drop(grouped)
    assert_frame_equal(alone, together.table("expert_similarity").drop(grouped), rel_tol=1e-4, abs_tol=1e-2)


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
