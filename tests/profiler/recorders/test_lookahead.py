"""Level ``lookahead`` against routers written down again in float64, token by token; the model must not notice it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from polars.testing import assert_frame_equal
from torch import Tensor, nn

import profiler
import store
from profiler.capture.discovery import find_moe_layers
from tests.profiler.capture.tiny import batch, build, output_of, recorded_calls

Floats = NDArray[np.float64]
DOMAINS = [["code", "code", "code"], ["german", "code", "german"]]
BATCHES = [batch(seed=1), batch(seed=2, padding="left")]

SMOKE = (
    *("afmoe", "cohere2_moe", "dbrx", "deepseek_v2", "deepseek_v4", "ernie4_5_moe", "flex_olmo", "gemma4_text"),
    *("glm4_moe", "granitemoe", "hy_v3", "jamba", "laguna", "lfm2_moe", "minimax_m2", "minimax_m3_vl_text"),
    *("nemotron_h", "phimoe", "qwen3_next", "qwen3_5_moe_text", "zaya"),
)


def _softmax_top(router: Any, x: Floats) -> list[int]:
    """OLMoE, Qwen2-MoE: the largest logits."""
    return list(np.argsort(-(_double(router.weight) @ x)))


def _gpt_oss(router: Any, x: Floats) -> list[int]:
    return list(np.argsort(-(_double(router.weight) @ x + _double(router.bias))))


def _deepseek(router: Any, x: Floats) -> list[int]:
    """Two of four groups by their two best biased scores; the chosen by sigmoid alone, the others by biased score."""
    score = 1 / (1 + np.exp(-(_double(router.weight) @ x)))
    biased = score + _double(router.e_score_correction_bias)
    groups = biased.reshape(router.num_group, -1)
    kept = np.argsort(-np.sort(groups, axis=1)[:, -2:].sum(1))[: router.topk_group]
    allowed = [e for e in range(len(score)) if e // groups.shape[1] in kept]
    chosen = sorted(allowed, key=lambda e: -biased[e])[: router.top_k]
    others = sorted(set(range(len(score))) - set(chosen), key=lambda e: -biased[e])
    return sorted(chosen, key=lambda e: -score[e]) + others


RULES: dict[str, Callable[[Any, Floats], list[int]]] = {
    "olmoe": _softmax_top,
    "qwen2_moe": _softmax_top,
    "deepseek_v3": _deepseek,
    "gpt_oss": _gpt_oss,
}


def _double(values: Tensor) -> Floats:
    return values.detach().double().numpy()


def _normed(norm: Any, x: Floats) -> Floats:
    epsilon = norm.variance_epsilon
    return x / np.sqrt((x**2).mean() + epsilon) * _double(norm.weight)


def _unlike_norms(model: Any) -> Any:
    """Norms of different layers differ in a trained model, and so do the two inputs that are looked ahead from."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.post_attention_layernorm.weight
            weight.copy_(torch.rand(weight.shape, generator=generator) + 0.5)
    return model


def _watch(model: Any, folder: Path, name: str = "tiny") -> tuple[store.Run, list[Tensor]]:
    outputs = []
    with torch.no_grad(), profiler.watch(model, store=folder, name=name, level="lookahead") as session:
        for inputs, domains in zip(BATCHES, DOMAINS, strict=True):
            session.label(domains=domains)
            outputs.append(output_of(model(**inputs)))
            session.flush()  # two shards must add up
    assert session.path is not None
    return store.open_run(session.path), outputs


@pytest.mark.parametrize("family", RULES)
def test_hits_equal_routers_run_by_hand(family: str, tmp_path: Path) -> None:
    model = _unlike_norms(build(family))
    moe = find_moe_layers(model)
    residuals: dict[int, list[Tensor]] = {layer.layer: [] for layer in moe}
    handles = [
        model.model.layers[index].post_attention_layernorm.register_forward_pre_hook(
            lambda module, args, kept=kept: kept.append(args[0].reshape(-1, args[0].shape[-1]).clone())
        )
        for index, kept in residuals.items()
    ]
    with torch.no_grad(), recorded_calls(model) as calls:
        plain = [output_of(model(**inputs)) for inputs in BATCHES]
    for handle in handles:
        handle.remove()
    run, outputs = _watch(model, tmp_path)
    assert all(torch.equal(*pair) for pair in zip(plain, outputs, strict=True))
    assert run.badge.status == "valid", run.badge.reason
    expected = _expected(family, model, calls, residuals)
    found = {}
    for row in run.table("lookahead").to_dicts():
        assert row["phase"] == "prompt"
        key = tuple(row[name] for name in ("layer", "distance", "input", "domain", "first"))
        alone = [row[name] for name in ("tokens", "selections", "first_hits", "cosine_sum")]
        found[key] = np.array([*alone, *row["hits"], *row["exact"]], dtype=np.float64)
    assert set(found) == set(expected)
    for key, sums in expected.items():
        np.testing.assert_allclose(found[key], sums, rtol=1e-4, atol=1e-4, err_msg=str(key))
    # Else the test would see nothing: both inputs differ, more candidates help, and eight more are all experts.
    pairs = [(sums, found[*key[:2], "residual", *key[3:]]) for key, sums in found.items() if key[2] == "router"]
    assert any((sums != other).any() for sums, other in pairs)
    assert all(sums[12] == sums[1] for sums in found.values())
    assert any(sums[4] < sums[5] for sums in found.values())


def _expected(family: str, model: Any, calls: list[Any], residuals: dict[int, list[Tensor]]) -> dict[Any, Floats]:
    """By (layer, distance, input, domain, first position) the sums of the table, token by token."""
    sums: dict[Any, Floats] = {}
    for number, (inputs, domains) in enumerate(zip(BATCHES, DOMAINS, strict=True)):
        mask = inputs["attention_mask"]
        positions = (mask.cumsum(1) - 1).reshape(-1).tolist()
        for token in mask.reshape(-1).nonzero()[:, 0].tolist():
            for place, entry in enumerate(calls):
                layer = entry.layer.layer
                norm = model.model.layers[layer].post_attention_layernorm
                for distance in range(1, min(3, place) + 1):
                    earlier = calls[place - distance]
                    residual = _double(residuals[earlier.layer.layer][number][token])
                    given = {"router": _double(earlier.hidden[number][token]), "residual": _normed(norm, residual)}
                    for source, x in given.items():
                        key = (layer, distance, source, domains[token // 12], positions[token] == 0)
                        order = RULES[family](entry.layer.router, x)
                        sums[key] = sums.get(key, np.zeros(22)) + _foreseen(entry, number, token, order, x)
    return sums


def _foreseen(entry: Any, number: int, token: int, order: list[int], x: Floats) -> Floats:
    """(22,) one token's part of the sums, for experts foreseen in that order from input x."""
    ids, weights = entry.ids[number][token].tolist(), entry.weights[number][token]
    own = _double(entry.hidden[number][token])
    hits = [len(set(ids) & set(order[: len(ids) + more])) for more in range(9)]
    exact = [count == len(ids) for count in hits]
    cosine = own @ x / np.linalg.norm(own) / np.linalg.norm(x)
    first = order[0] == ids[int(weights.argmax())]
    return np.array([1, len(ids), first, cosine, *hits, *exact], dtype=np.float64)


@pytest.mark.parametrize("family", SMOKE)
def test_the_model_does_not_notice(family: str, tmp_path: Path) -> None:
    model, inputs = build(family), batch(padding="left")
    level = "lookahead,similarity,moments"
    with torch.no_grad():
        plain = output_of(model(**inputs))
        with profiler.watch(model, store=tmp_path, name="tiny", level=level) as session:
            watched = output_of(model(**inputs))
        after = output_of(model(**inputs))
    assert torch.equal(plain, watched)
    assert torch.equal(plain, after)
    assert session.path is not None
    run = store.open_run(session.path)
    assert run.badge.status == "valid", run.badge.reason
    table, layers = run.table("lookahead"), [layer.layer for layer in run.layers]
    refused = {row["layer"]: row["detail"] for row in run.table("check").filter(name="lookahead").to_dicts()}
    assert set(table["layer"]) == set(layers[1:]) - set(refused)
    if family == "zaya":
        assert all("takes a state of earlier layers" in detail for detail in refused.values())
        assert set(refused) == set(layers[1:])
    elif family == "deepseek_v4":
        assert all("chooses by token ids" in detail for detail in refused.values())
        assert set(refused) == set(layers[:3])
    else:
        assert not refused
    for row in table.to_dicts():
        assert row["tokens"] * run.layers[0].top_k >= row["selections"] >= row["hits"][8] >= row["hits"][0]


def test_an_unchanged_router_is_foreseen_exactly(tmp_path: Path) -> None:
    model = build("deepseek_v3")
    moe = find_moe_layers(model)
    with torch.no_grad():
        for layer in moe[1:]:
            assert isinstance(layer.router, nn.Module)
            layer.router.load_state_dict(moe[0].router.state_dict())  # type: ignore[union-attr]
        for layer in model.model.layers:  # nothing is added between the layers: all routers get the same input
            layer.self_attn.o_proj.weight.zero_()
            for name, weight in layer.mlp.named_parameters():
                if name.endswith("down_proj") or "down_proj.weight" in name:
                    weight.zero_()
    run, _ = _watch(model, tmp_path)
    for row in run.table("lookahead").to_dicts():
        assert row["hits"] == [row["selections"]] * 9
        assert row["exact"] == [row["tokens"]] * 9
        assert row["first_hits"] == row["tokens"]
        assert row["cosine_sum"] == pytest.approx(row["tokens"], rel=1e-5)


def test_a_router_that_keeps_a_state_is_left_alone(tmp_path: Path) -> None:
    class Remembering(type(build("olmoe").model.layers[0].mlp.gate)):  # type: ignore[misc]
        """Adds a part of the logits of its last call, as a recurrent router does."""

        before: Tensor | None = None

        def forward(self, hidden: Tensor) -> Any:
            logits, weights, ids = super().forward(hidden)
            if self.before is not None and self.before.shape == logits.shape:
                hidden = hidden + self.before.mean()
                _, weights, ids = super().forward(hidden)
            self.before = logits
            return logits, weights, ids

    def model() -> Any:
        made = build("olmoe")
        made.model.layers[2].mlp.gate.__class__ = Remembering
        return made

    plain = model()
    with torch.no_grad():
        expected = [output_of(plain(**inputs)) for inputs in BATCHES]
    run, outputs = _watch(model(), tmp_path)
    assert all(torch.equal(*pair) for pair in zip(expected, outputs, strict=True))
    refused = run.table("check").filter(name="lookahead").to_dicts()
    assert [(row["layer"], row["status"]) for row in refused] == [(2, "skipped")]
    assert "changes when it runs" in refused[0]["detail"]
    assert set(run.table("lookahead")["layer"]) == {1, 3}


def test_padding_and_batching_change_nothing(tmp_path: Path) -> None:
    model = _unlike_norms(build("qwen2_moe"))
    together, _ = _watch(model, tmp_path, "together")
    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="alone", level="lookahead") as session:
        for inputs, domains in zip(BATCHES, DOMAINS, strict=True):
            for row, domain in enumerate(domains):
                session.label(domains=[domain])
                model(inputs["input_ids"][row][inputs["attention_mask"][row] == 1][None])
    assert session.path is not None
    alone = store.open_run(session.path)
    assert_frame_equal(alone.table("lookahead"), together.table("lookahead"), abs_tol=1e-3)


def test_decoding_is_foreseen_apart(tmp_path: Path) -> None:
    model = build("olmoe")
    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="tiny", level="lookahead") as session:
        model.generate(**batch(2, 6, padding="left"), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert session.path is not None
    table = store.open_run(session.path).table("lookahead").filter(layer=1, input="router")
    counts = {(row["phase"], row["first"]): row["tokens"] for row in table.to_dicts()}
    assert counts == {("prompt", True): 2, ("prompt", False): 6 + 3 - 2, ("decode", False): 2 * 3}
