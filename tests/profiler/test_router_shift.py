"""How routers of a changed model decide, beside sums by hand over the two models' own router logits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compressor
from moescope.errors import ModelError
from profiler.evaluation.router_shift import router_shift
from tests.compressor.edit_plans import dropping
from tests.profiler.capture.tiny import build

IDS = torch.arange(10, 50)[None]


def moved(model: nn.Module, layer: int) -> nn.Module:
    """A copy whose attention in one layer has another sign, so that routers from there on decide otherwise."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_parameter(f"model.layers.{layer}.self_attn.o_proj.weight").neg_()
    return twin


@torch.no_grad()
def router_logits(model: Any, layer: int) -> Tensor:
    """(tokens, E): the rows of the router times what reaches it."""
    seen = {}
    gate = model.get_submodule(f"model.layers.{layer}.mlp.gate")
    handle = gate.register_forward_pre_hook(lambda module, args: seen.update(x=args[0].flatten(0, -2)))
    model(IDS)
    handle.remove()
    return seen["x"].double() @ gate.weight.double().T


def test_nothing_moves_where_nothing_changed() -> None:
    model = build("olmoe")
    assert all(layer.flips == 0 and layer.kl == 0 for layer in router_shift(copy.deepcopy(model), model, IDS))


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_flips_and_divergence_are_those_by_hand(ratio: float) -> None:
    model = build("qwen3_moe")
    other = moved(model, 1)
    top_k, experts = model.config.num_experts_per_tok, model.config.num_experts
    found = router_shift(other, model, IDS, ratio=ratio)
    assert found[0].flips == 0 and found[0].kl == pytest.approx(0, abs=1e-12)
    for layer in found[1:]:
        first, second = router_logits(model, layer.layer), router_logits(other, layer.layer)
        flips, kls = 0, []
        for one, two in zip(first, second, strict=True):
            chosen = set(one.topk(top_k).indices.tolist())
            flips += len(chosen - set(two.topk(top_k).indices.tolist()))
            top = one.topk(top_k + int(ratio * (experts - top_k))).indices
            p, q = one[top].softmax(-1), two[top].softmax(-1)  # the same as parts of the softmax over all
            kls.append(float((p * (p.log() - q.log())).sum()))
        assert layer.tokens == IDS.numel()
        assert layer.flips == pytest.approx(flips / (IDS.numel() * top_k), abs=1e-9)
        assert layer.kl == pytest.approx(sum(kls) / len(kls), rel=1e-3, abs=1e-7)
    assert sum(layer.flips for layer in found) > 0


def test_experts_that_go_are_flips_and_the_others_keep_their_numbers() -> None:
    model = build("olmoe")
    other = copy.deepcopy(model)
    compressor.edit(other, dropping(model, {layer: [0] for layer in range(len(model.model.layers))}))
    kept = {(layer, 0): [[expert] for expert in range(1, model.config.num_experts)] for layer in range(8)}
    (first, *_) = router_shift(other, model, IDS, kept=kept)
    chosen = router_logits(model, 0).topk(model.config.num_experts_per_tok).indices
    assert first.flips == pytest.approx(float((chosen == 0).double().mean()), abs=1e-9)


def test_models_of_other_depth_are_refused() -> None:
    model = build("olmoe")
    with pytest.raises(ModelError, match="no router in place of that of the base's layer"):
        router_shift(build("olmoe", num_hidden_layers=1), model, IDS)
