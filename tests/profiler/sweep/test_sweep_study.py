"""Rules on a tiny model against models built with them, routers rewritten by plain hooks, and weights set to zero."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from profiler.ablation import switch
from profiler.sweep.correlation import correlation, ranks
from profiler.sweep.difficulty import difficulty
from profiler.sweep.medians import ratio_medians
from profiler.sweep.slimmability import slimmability
from profiler.sweep.study import Study
from profiler.sweep.trials import Trial
from tests.profiler.capture.tiny import build, recorded_calls
from tests.profiler.sweep.by_router import batches, best, choosing, logits_of, losses_of, olmoe, with_k


@pytest.fixture(scope="module")
def model() -> Any:
    return olmoe()


@pytest.fixture(scope="module")
def study(model: Any) -> Study:
    return Study.of(model, batches())


def sums(model: Any) -> list[float]:
    """Loss of every sequence, by plain forwards."""
    return [float(value) for batch in batches() for value in np.nansum(losses_of(model, batch), 1)]


@pytest.mark.parametrize("k", [1, 3, 8])
def test_a_number_of_experts_is_the_model_built_with_it(study: Study, model: Any, k: int) -> None:
    row = study.trial(Trial("top_k", float(k)))
    assert np.allclose(row["loss_sums"], sums(with_k(model, k)), rtol=1e-5)
    assert row["routing"]["all"]["mean"] == [k, k] and row["routing"]["all"]["p95"] == [k, k]
    assert row["routing"]["all"]["flops_share"] == pytest.approx(k / 2)


def test_the_own_number_changes_nothing_and_everything_adds_up(study: Study, model: Any) -> None:
    row = study.trial(Trial("top_k", 2.0))
    assert row["change"]["value"] == 0.0 and row["agreement"]["value"] == 1.0 and abs(row["kl"]["value"]) < 1e-9
    base = np.array(sums(model))
    assert np.allclose(study.base.sequences["loss_sum"], base, rtol=1e-6)
    other = study.trial(Trial("top_k", 1.0))
    tokens = [part["tokens"] for part in other["per_domain"].values()]
    assert sum(tokens) == other["tokens"] == 2 * (5 * 17 + 12)
    whole = np.average([part["change"]["value"] for part in other["per_domain"].values()], weights=tokens)
    assert whole == pytest.approx(other["change"]["value"])
    assert other["change"]["value"] == pytest.approx((np.sum(other["loss_sums"]) - base.sum()) / sum(tokens), rel=1e-5)
    assert other["change"]["low"] < other["change"]["value"] < other["change"]["high"]


def test_kl_agreement_and_accuracy_are_those_of_plain_forwards(study: Study, model: Any) -> None:
    row, other = study.trial(Trial("top_k", 1.0)), with_k(model, 1)
    found: dict[str, list[np.ndarray]] = {"kl": [], "agreement": [], "accuracy": []}
    for batch in batches():
        p, q = (logits_of(one, batch).log_softmax(-1)[:, :-1] for one in (model, other))
        real = batch.attention_mask[:, 1:] == 1
        found["kl"].append((p.exp() * (p - q)).sum(-1).numpy()[real])
        found["agreement"].append((p.argmax(-1) == q.argmax(-1)).numpy()[real])
        found["accuracy"].append((q.argmax(-1).numpy() == batch.input_ids[:, 1:])[real])
    for name, parts in found.items():
        assert row[name]["value"] == pytest.approx(np.concatenate(parts).mean(), rel=1e-4), name


def test_top_p_counts_experts_as_brute_force_does(study: Study, model: Any) -> None:
    row = study.trial(Trial("top_p", 0.6))
    counts = []
    with recorded_calls(model) as calls:
        for batch in batches():
            logits_of(model, batch)
            real = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
            real[:, :-1] = torch.from_numpy(batch.attention_mask[:, 1:] == 1)
            probabilities = calls[0].logits[-1].double().softmax(-1)[real.flatten()]
            for token in probabilities.tolist():
                total, count = 0.0, 0
                for value in sorted(token, reverse=True):
                    total, count = total + value, count + 1
                    if total > 0.6:
                        break
                counts.append(count)
    # Only in the first layer are the tokens those of the model as it is.
    assert row["routing"]["all"]["mean"][0] == pytest.approx(np.mean(counts))
    means, experts = row["routing"]["all"]["mean"], [layer.experts for layer in study.layers]
    sizes = [sum(one.numel() for one in module.parameters()) / 8 for module in experts]
    share = np.dot(means, sizes) / np.dot([2, 2], sizes)
    assert row["routing"]["all"]["flops_share"] == pytest.approx(share)
    assert sum(part["tokens"] for part in row["difficulty"]["bins"]) == row["tokens"]


def test_odp_takes_its_medians_from_other_text(study: Study, model: Any) -> None:
    calibration = batches(seed=7)
    medians = ratio_medians(model, calibration)
    ratios: list[list[float]] = [[], []]
    with recorded_calls(model) as calls:
        for batch in calibration:
            logits_of(model, batch)
            real = batch.attention_mask.flatten() == 1
            for layer, call in enumerate(calls):
                weights = call.weights[-1].double().numpy()[real]
                ratios[layer] += (weights.min(1) / weights.max(1)).tolist()
    # The lower of the two middle ones, as torch takes it.
    assert list(medians.values()) == pytest.approx([sorted(one)[(len(one) - 1) // 2] for one in ratios])
    row = study.trial(Trial("ratio", "odp"), medians=medians)

    def choose(layer: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = best(logits, 2)
        weights = torch.where(weights[:, 1:] < medians[layer, 0] * weights[:, :1], torch.tensor([[1.0, 0.0]]), weights)
        return weights, ids

    with choosing(model, choose):
        assert np.allclose(row["loss_sums"], sums(model), rtol=1e-5)
    assert row["medians"] == list(medians.values())


def test_masking_the_best_experts(study: Study, model: Any) -> None:
    row = study.trial(Trial("mask_top", 0.25))

    def choose(layer: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        return best(logits.scatter(1, logits.topk(2, -1).indices, -torch.inf), 2)

    with choosing(model, choose):
        assert np.allclose(row["loss_sums"], sums(model), rtol=1e-5)
    assert row["routing"]["all"]["kept"] == [0.0, 0.0] and row["routing"]["all"]["changed"] == [1.0, 1.0]


def test_masking_the_shared_experts_and_putting_the_model_back() -> None:
    whole = build("qwen2_moe")
    study = Study.of(whole, batches())
    rows = [study.trial(Trial("shared", value)) for value in ("off", "replaced")]
    bare = copy.deepcopy(whole)
    for layer in bare.model.layers:
        torch.nn.init.zeros_(layer.mlp.shared_expert.down_proj.weight)
    assert np.allclose(rows[0]["loss_sums"], sums(bare), rtol=1e-5)
    assert rows[1]["routing"]["all"]["mean"] == [3.0] * 4
    assert np.allclose(study.base.sequences["loss_sum"], sums(whole), rtol=1e-6)
    assert switch.routed_experts(study.layers)


def test_correlation_is_spearmans_and_a_planted_one_is_found() -> None:
    draw = np.random.default_rng(0)
    x, sequence = draw.exponential(size=300), np.repeat(np.arange(30), 10)
    y = np.round(3 * x + draw.normal(size=300))
    found = correlation(ranks(x), ranks(y), sequence=sequence)
    assert found.value == pytest.approx(spearmanr(x, y).statistic) and found.low < found.value < found.high
    assert np.isnan(correlation(x, np.ones(300), sequence=sequence).value)

    experts = {(0, 0): (1 + np.digitize(x, [0.5, 1.0, 2.0])).astype(np.int16), (1, 0): np.ones(300, np.int16)}
    domain = (sequence % 2).astype(np.int64)
    rows = difficulty(losses=x, active=experts, sequence=sequence, domain=domain, domains=["a", "b"])
    assert [part["tokens"] for part in rows["bins"]] == [30] * 10
    means = [part["active"]["value"] for part in rows["bins"]]
    assert means == sorted(means) and means[0] == 1.0 and means[-1] == 2.5
    assert rows["correlation"]["low"] > 0.9 and rows["layers"][1]["value"] is None
    assert rows["per_domain"]["a"]["active"]["value"] == pytest.approx(1 + (experts[0, 0][domain == 0].mean() - 1) / 2)


def test_slimmability_reads_the_curve() -> None:
    curve = {1: [3.0, 4.0], 2: [2.0, 3.0], 4: [1.0, 2.5], 6: [1.5, 2.5]}
    rows = [{"rule": "top_k", "value": float(k), "loss_sums": values} for k, values in reversed(curve.items())]
    found = slimmability(rows, predictions=[1, 3], own=4.0)
    assert found is not None and found["monotone"] is True and found["best"] == 4
    assert [step["change"]["value"] for step in found["steps"]] == [-0.5, -0.375, 0.125]
    again = slimmability(rows, predictions=[1, 3], own=6.0)
    assert again is not None and again["monotone"] is False
    assert slimmability(rows[:1], predictions=[1, 3], own=4.0) is None
