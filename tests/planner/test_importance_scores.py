"""Every score from the stored sums of a run against the same score from per-token tensors in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from scipy.special import softmax

import planner.importance as importance
import store
from moescope.errors import PlanError
from tests.profiler.capture.tiny import build
from tests.profiler.recorders.tokenwise import Array, LayerTokens, Tokenwise, observe, watched

FAMILIES = ("olmoe", "qwen2_moe", "deepseek_v3")
"""Softmax; shared experts with a gate; sigmoid with bias, groups, scaling, shared experts and a dense first layer."""

Where = NDArray[np.bool_]


@dataclass
class Case:
    """Two runs of the same text, vectors pooled and per domain, and what happened."""

    seen: Tokenwise
    pooled: store.Run
    split: store.Run


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    model = build(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    pooled = watched(model, folder / "pooled")
    split = watched(model, folder / "split", vectors_per_domain=True)
    return Case(observe(model), pooled, split)


# Scores of experts, token by token: (layer, tokens that count) -> (experts,)


def _used(layer: LayerTokens, where: Where) -> Array:
    return layer.dense(np.ones_like(layer.gate), where)


def _norm(layer: LayerTokens) -> Array:
    return np.linalg.norm(layer.output, axis=2)


def _mean(total: Array, count: Array) -> Array:
    return np.divide(total, count, out=np.zeros_like(total), where=count > 0)


def _share(values: Array) -> Array:
    total: Array = values / values.sum()
    return total


def _logits(layer: LayerTokens) -> Array:
    return np.take_along_axis(layer.logits, layer.ids, 1)


def _tcess(layer: LayerTokens, where: Where, rank: int) -> Array:
    chosen = _logits(layer)
    chosen[:, rank:] = 0
    return layer.dense(chosen, where).sum(0) / where.sum()


def _confident(layer: LayerTokens, where: Where, confidence: float) -> Array:
    chosen = _logits(layer)
    return layer.dense(chosen * (softmax(chosen, axis=1) >= confidence), where).sum(0) / where.sum()


def _output_max(layer: LayerTokens, where: Where) -> Array:
    return layer.dense(np.abs(layer.output).max(2), where).max(0)


def _easy_ep(layer: LayerTokens, where: Where) -> Array:
    return layer.dense(layer.shift[:, None] * layer.gate * _norm(layer), where).sum(0)


EXPERTS: dict[str, Callable[[LayerTokens, Where], Array]] = {
    "frequency": lambda layer, where: _used(layer, where).sum(0),
    "gate_mass": lambda layer, where: layer.dense(layer.gate, where).sum(0),
    "dern": lambda layer, where: layer.dense(layer.gate / layer.gate.sum(1, keepdims=True), where).sum(0) / where.sum(),
    "esft_gate": lambda layer, where: _share(layer.dense(layer.gate, where).sum(0)),
    "esft_token": lambda layer, where: _used(layer, where).sum(0) / layer.ids.shape[1] / where.sum(),
    "tcess": lambda layer, where: _tcess(layer, where, layer.ids.shape[1]),
    "reap": lambda layer, where: _mean(
        layer.dense(layer.gate * _norm(layer), where).sum(0), _used(layer, where).sum(0)
    ),
    "ean": lambda layer, where: layer.dense(_norm(layer), where).sum(0),
    "man": lambda layer, where: _mean(layer.dense(_norm(layer), where).sum(0), _used(layer, where).sum(0)),
    "msan": lambda layer, where: _mean(layer.dense(_norm(layer) ** 2, where).sum(0), _used(layer, where).sum(0)),
    "masking_error": lambda layer, where: layer.dense((layer.gate * _norm(layer)) ** 2, where).sum(0),
    "output_max": _output_max,
}

# Scores of neurons and channels: (rows (n, width), their gates, inputs (n, hidden), norms of the columns) -> (width,)

NEURONS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "camera": lambda a, g, w: (
        (0.1 * ((g[:, None] * a) ** 2).sum(0) + 0.9 * ((g[:, None] * a) ** 2).max(0, initial=0.0)) * w**2
    ),
    "width": lambda a, g, w: np.abs(a).sum(0) * w,
    "read_me": lambda a, g, w: np.abs(a).sum(0) / max(len(a), 1),
    "wanda_down": lambda a, g, w: np.sqrt((a**2).sum(0)),
}

SLICES = [(None, None), ("code", None), (None, "decode"), ("german", "prompt")]


def _column(frame: pl.DataFrame, layer: LayerTokens, kind: str = "routed") -> NDArray[np.float64]:
    one = frame.filter((pl.col("layer") == layer.layer.layer) & (pl.col("kind") == kind))
    return one.sort([name for name in one.columns if name != "value"])["value"].to_numpy()


def _close(found: Array, expected: Array, name: str) -> None:
    assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * float(np.abs(expected).max()), err_msg=name)


@pytest.mark.parametrize(("domain", "phase"), SLICES)
@pytest.mark.parametrize("name", EXPERTS)
def test_scores_of_experts(case: Case, name: str, domain: str | None, phase: Any) -> None:
    frame = importance.score(case.pooled, name, domain=domain, phase=phase)
    assert frame.columns == [*importance.EXPERT, "value"]
    where = case.seen.where(domain, phase)
    for layer in case.seen.layers:
        _close(_column(frame, layer), EXPERTS[name](layer, where), name)


@pytest.mark.parametrize(("domain", "phase"), SLICES)
@pytest.mark.parametrize("name", NEURONS)
def test_scores_of_neurons(case: Case, name: str, domain: str | None, phase: Any) -> None:
    run = case.pooled if domain is None else case.split
    frame = importance.score(run, name, domain=domain, phase=phase)
    assert frame.columns == [*importance.NEURON, "value"]
    where = case.seen.where(domain, phase)
    for layer in case.seen.layers:
        layout, parts = layer.layer.layout, []
        assert layout is not None
        for expert in range(layer.size):
            token, slot = np.nonzero((layer.ids == expert) & where[:, None])
            norms = layout.down_weight(layer.layer.experts, expert).detach().double().norm(dim=0).numpy()
            parts.append(NEURONS[name](layer.activation[token, slot], layer.gate[token, slot], norms))
        _close(_column(frame, layer), np.concatenate(parts), name)
        if layer.shared is not None:
            norms = np.linalg.norm(layer.shared.down, axis=0)
            expected = NEURONS[name](layer.shared.activation[where], layer.shared.gate[where], norms)
            _close(_column(frame, layer, "shared"), expected, name)


@pytest.mark.parametrize(("domain", "phase"), SLICES)
def test_wanda_input(case: Case, domain: str | None, phase: Any) -> None:
    frame = importance.score(case.pooled if domain is None else case.split, "wanda_input", domain=domain, phase=phase)
    assert frame.columns == [*importance.CHANNEL, "value"]
    where = case.seen.where(domain, phase)
    for layer in case.seen.layers:
        squares = _used(layer, where).T @ layer.inputs**2
        _close(_column(frame, layer), np.sqrt(squares).reshape(-1), "routed")
        if layer.shared is not None:
            _close(_column(frame, layer, "shared"), np.sqrt((layer.shared.inputs[where] ** 2).sum(0)), "shared")


def test_easy_ep_of_one_domain_and_mixed(case: Case) -> None:
    plain, mixed = (importance.score(case.pooled, "easy_ep", mixed=mixed) for mixed in (False, True))
    code = importance.score(case.pooled, "easy_ep", domain="code")
    for layer in case.seen.layers:
        by_domain = [_easy_ep(layer, case.seen.where(domain)) for domain in ("code", "german")]
        _close(_column(code, layer), by_domain[0], "code")
        _close(_column(plain, layer), by_domain[0] + by_domain[1], "plain")
        _close(_column(mixed, layer), _share(by_domain[0]) + _share(by_domain[1]), "mixed")


def test_tcess_by_rank_and_by_confidence(case: Case) -> None:
    for domain in (None, "code"):
        where = case.seen.where(domain)
        first = importance.score(case.pooled, "tcess", rank=1, domain=domain)
        sure = {bound: importance.score(case.pooled, "tcess", confidence=bound, domain=domain) for bound in (0.5, 0.75)}
        for layer in case.seen.layers:
            _close(_column(first, layer), _tcess(layer, where, 1), "rank 1")
            for bound, frame in sure.items():
                _close(_column(frame, layer), _confident(layer, where, bound), f"confidence {bound}")


def test_camera_without_maximum_is_the_error_of_deleting_one_neuron(case: Case) -> None:
    frame = importance.score(case.pooled, "camera", alpha=0.0)
    for layer in case.seen.layers:
        layout = layer.layer.layout
        assert layout is not None
        expert = int(layer.ids[0, 0])
        down = layout.down_weight(layer.layer.experts, expert).detach().double().numpy()
        token, slot = np.nonzero(layer.ids == expert)
        lost = layer.gate[token, slot][:, None] * layer.activation[token, slot][:, 5:6] * down[:, 5]
        found = frame.filter(
            (pl.col("layer") == layer.layer.layer)
            & (pl.col("kind") == "routed")
            & (pl.col("expert") == expert)
            & (pl.col("neuron") == 5)
        )
        assert found["value"].item() == pytest.approx((lost**2).sum(), rel=1e-4)


def test_marginals_cannot_give_products(case: Case) -> None:
    """REAP and EASY-EP need sums of products; products of sums are something else."""
    reap, easy = importance.score(case.pooled, "reap"), importance.score(case.pooled, "easy_ep", mixed=False)
    everything = case.seen.where()
    for layer in case.seen.layers:
        count = _used(layer, everything).sum(0)
        gate, norm = (layer.dense(part, everything).sum(0) for part in (layer.gate, _norm(layer)))
        product = _mean(layer.dense(layer.gate * _norm(layer), everything).sum(0), np.ones(layer.size))
        shift = _mean(layer.dense(np.repeat(layer.shift[:, None], layer.ids.shape[1], 1), everything).sum(0), count)
        from_marginals = _mean(gate, count) * _mean(norm, count)
        # With two or more tokens per expert, gate and norm vary together.
        assert np.abs(from_marginals / _column(reap, layer) - 1)[count > 1].max() > 0.01
        assert np.abs(shift * product / _column(easy, layer) - 1)[count > 1].max() > 0.01


def test_set_error_is_the_error_of_the_masked_layer(case: Case) -> None:
    generator = np.random.default_rng(0)
    runs = [(case.pooled, None, None), (case.pooled, None, "decode"), (case.split, "code", None)]
    for run, domain, phase in runs:
        grams = importance.output_gram(run, domain=domain, phase=phase)  # type: ignore[arg-type]
        where = case.seen.where(domain, phase)
        for layer in case.seen.layers:
            gram = grams[layer.layer.key]
            parts = layer.dense(layer.gate[..., None] * layer.output, where)  # shape: (tokens, experts, hidden)
            for kept in ([], [0, 3, 5], range(layer.size), generator.permutation(layer.size)[:4].tolist()):
                masked = np.setdiff1d(np.arange(layer.size), list(kept))
                expected = (parts[:, masked].sum(1) ** 2).sum()
                found = importance.set_error(gram, list(kept))
                assert found == pytest.approx(expected, rel=1e-4, abs=1e-5 * (parts**2).sum())


def test_masking_error_is_the_diagonal(case: Case) -> None:
    frame = importance.score(case.pooled, "masking_error")
    for key, gram in importance.output_gram(case.pooled).items():
        layer = next(layer for layer in case.seen.layers if layer.layer.key == key)
        assert_allclose(_column(frame, layer), np.diag(gram), rtol=1e-4)


def test_smallest_set_reaches_the_share_with_as_few_as_can_be(case: Case) -> None:
    scores = importance.score(case.pooled, "esft_gate")
    for share in (0.2, 0.5, 0.9, 1.0):
        chosen = importance.smallest_set(scores, share=share)
        for layer in case.seen.layers:
            part = chosen.filter(pl.col("layer") == layer.layer.layer)
            kept = part.filter("chosen")["value"]
            values = np.sort(_column(scores, layer))[::-1]
            fewest = int(np.searchsorted(values.cumsum(), share - 1e-9)) + 1
            assert len(kept) == fewest and kept.sum() >= share - 1e-9
            assert kept.min() >= part.filter(~pl.col("chosen"))["value"].max() if fewest < layer.size else True  # type: ignore[operator]


def test_domains_of_scalars_add_up(case: Case) -> None:
    for name in ("frequency", "gate_mass", "ean", "masking_error"):
        parts = [importance.score(case.pooled, name, domain=domain) for domain in ("code", "german")]
        assert_allclose(parts[0]["value"] + parts[1]["value"], importance.score(case.pooled, name)["value"], rtol=1e-9)


def test_pooled_and_split_runs_tell_the_same(case: Case) -> None:
    for name in ("camera", "wanda_input", "width"):
        assert_allclose(
            importance.score(case.split, name)["value"], importance.score(case.pooled, name)["value"], rtol=1e-5
        )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("reep", {}, "no importance score 'reep': did you mean 'reap'"),
        ("reap", {"alpha": 1}, "score 'reap' has no parameter 'alpha': it takes none"),
        ("camera", {"beta": 1}, "it takes alpha"),
        ("camera", {"alpha": 1.5}, "alpha 1.5 is outside 0..1"),
        ("tcess", {"rank": 3}, r"rank 3 is outside 1\.\.2"),
        ("tcess", {"confidence": 0.3}, "multiple of 1/8"),
        ("tcess", {"rank": 1, "confidence": 0.5}, "not both"),
        ("reap", {"domain": "math"}, "has no domain 'math'; it has code, german"),
        ("camera", {"domain": "code"}, "keeps neuron_activation pooled over domains.*--vectors-per-domain"),
        ("heapr", {}, "has no neuron_gradient.*--level gradients"),
        ("expert_taylor", {}, "has no expert_gradient.*--level gradients"),
    ],
)
def test_what_cannot_be_scored_is_one_line(case: Case, name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message) as error:
        importance.score(case.pooled, name, **options)
    assert "\n" not in str(error.value)
