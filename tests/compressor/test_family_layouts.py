"""What families look like: layouts read from modules, shared experts, router traits, refusals."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compressor.families import (
    ADAPTERS,
    FUSED,
    ExpertsLayout,
    adapter_of,
    describe_experts,
    find_shared_experts,
    is_fused_experts,
    refusal_of,
    router_traits,
    separate_layout,
)
from tests.profiler.capture.tiny import CONFIGS, build

ROOT = Path(__file__).parents[2]


def experts_of(family: str) -> Any:
    return next(module for module in build(family).modules() if is_fused_experts(module))


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "nemotron_h"])
def test_layouts_read_the_orientation_from_the_module(family: str) -> None:
    experts = experts_of(family)
    layout = describe_experts(experts)
    assert layout is not None
    rows = 2 * layout.width if layout.gated else layout.width
    assert layout.up_weight(experts, 0).shape == (rows, layout.hidden_size)
    assert layout.down_weight(experts, 0).shape == (layout.hidden_size, layout.width)
    assert layout.gated == (family != "nemotron_h")
    assert (layout.transposed, layout.interleaved, layout.biased) == ((family == "gpt_oss",) * 3)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "nemotron_h", "deepseek_v3"])
def test_one_expert_alone_is_what_the_module_computes(family: str) -> None:
    experts = experts_of(family)
    layout = describe_experts(experts)
    assert layout is not None
    hidden = torch.randn(5, layout.hidden_size)
    ids, weights = torch.full((5, 1), 3), torch.full((5, 1), 0.5)
    with torch.no_grad():
        activation, output = layout.run_expert(experts, 3, hidden)
        torch.testing.assert_close(experts(hidden, ids, weights), output * 0.5, rtol=1e-4, atol=1e-5)
    assert activation.shape == (5, layout.width)


def test_packed_weights_have_no_layout() -> None:
    experts = experts_of("olmoe")
    experts.down_proj.data = experts.down_proj.data.to(torch.float8_e4m3fn)
    assert describe_experts(experts) is None
    assert describe_experts(nn.Linear(2, 2)) is None


@pytest.mark.parametrize(
    ("family", "name", "gated"),
    [("qwen2_moe", "shared_expert", True), ("deepseek_v3", "shared_experts", False), ("olmoe", "", False)],
)
def test_shared_experts_are_found_beside_the_routed_ones(family: str, name: str, gated: bool) -> None:
    model = build(family)
    shared = find_shared_experts(model.model.layers[-1].mlp, model.config)
    assert (shared.name if shared else "") == name
    if shared is not None:
        assert isinstance(shared.down, nn.Linear)
        assert (shared.gate is not None) == gated


def test_merged_shared_experts_are_counted_by_the_configuration() -> None:
    model = build("deepseek_v3", n_shared_experts=2)
    shared = find_shared_experts(model.model.layers[-1].mlp, model.config)
    assert shared is not None
    assert shared.count == 2


def test_traits_of_special_routers() -> None:
    assert router_traits(router_class="Gemma4TextRouter", experts_class="Gemma4TextExperts").holds_probabilities
    assert router_traits(router_class="DeepseekV3TopkRouter", experts_class="DeepseekV3Experts").score == "sigmoid"
    assert router_traits(router_class="DeepseekV2TopkRouter", experts_class="DeepseekV2Experts").score == "softmax"
    assert router_traits(router_class="", experts_class="MiniMaxExperts").score == "softmax"
    assert router_traits(router_class="Llama4Router", experts_class="Llama4TextExperts").score == "sigmoid"


def test_refusals_say_why_and_what_to_do() -> None:
    found = {family: [refusal_of(module) for module in build(family).modules()] for family in ("nllb-moe", "olmoe")}
    reasons = [refusal.reason for refusal in found["nllb-moe"] if refusal is not None]
    assert reasons
    assert all("wrong experts" in reason for reason in reasons)
    assert found["olmoe"] == [None] * len(found["olmoe"])


def adapted(family: str) -> tuple[Any, ExpertsLayout]:
    experts = next(module for module in build(family).modules() if adapter_of(module))
    adapter = adapter_of(experts)
    assert adapter is not None
    layout = adapter.layout(experts)
    assert layout is not None
    return experts, layout


def test_dbrx_is_read_through_its_adapter() -> None:
    experts, layout = adapted("dbrx")
    assert layout.num_experts == CONFIGS["dbrx"]["config"]["ffn_config"]["moe_num_experts"]
    assert layout.down_weight(experts, 1).shape == (layout.hidden_size, layout.width)
    packed = experts.mlp.w2.reshape(layout.num_experts, layout.width, layout.hidden_size)
    assert torch.equal(layout.down_weight(experts, 1), packed[1].T)


def test_adapters_say_what_is_special() -> None:
    assert ADAPTERS["ZayaExperts"].zero_weight_is_none
    assert ADAPTERS["Llama4TextExperts"].weights_input
    assert ADAPTERS["SwitchTransformersExperts"].may_skip
    for family, adapter in (("zaya", ADAPTERS["ZayaExperts"]), ("olmoe", FUSED)):
        assert adapter_of(experts_of(family)) is adapter
    assert adapter_of(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("family", ["doge", "jetmoe", "llama4_text", "longcat_flash", "switch_transformers"])
def test_layouts_of_adapters_have_the_usual_orientation(family: str) -> None:
    experts, layout = adapted(family)
    rows = 2 * layout.width if layout.gated else layout.width
    last = layout.num_weighted - 1
    assert layout.up_weight(experts, last).shape == (rows, layout.hidden_size)
    assert layout.down_weight(experts, last).shape == (layout.hidden_size, layout.width)
    assert len(layout.kinds) == layout.num_experts


def test_experts_without_weights_come_last() -> None:
    experts, layout = adapted("longcat_flash")
    assert (layout.num_weighted, layout.num_experts) == (8, 12)
    inputs = torch.randn(3, layout.hidden_size)
    activation, output = layout.run_expert(experts, 9, inputs)
    assert torch.equal(output, inputs)
    assert not activation.any()
    zero = replace(layout, weightless=("zero",) * 4)
    assert not zero.run_expert(experts, 9, inputs)[1].any()
    with pytest.raises(NotImplementedError, match="expert 9 is a constant one"):
        replace(layout, weightless=("constant",) * 4).run_expert(experts, 9, inputs)


@pytest.mark.parametrize("bias", [False, True])
def test_experts_that_are_modules_of_their_own(bias: bool) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_experts, self.experts = 2, nn.ModuleList(nn.Module() for _ in range(2))
            for expert in self.experts:
                expert.w1, expert.w3 = nn.Linear(4, 6, bias=bias), nn.Linear(4, 6, bias=bias)
                expert.w2, expert.act = nn.Linear(6, 4, bias=bias), nn.SiLU()

    block, inputs = Block(), torch.randn(3, 4)
    layout = separate_layout("w3", "w2", "w1", expert="experts.{}", activation="act")(block)
    assert (layout.num_experts, layout.hidden_size, layout.width, layout.biased) == (2, 4, 6, bias)
    expert = block.experts[1]
    inner = expert.act(expert.w1(inputs)) * expert.w3(inputs)
    activation, output = layout.run_expert(block, 1, inputs)
    torch.testing.assert_close(activation, inner)
    torch.testing.assert_close(output, expert.w2(inner))


def test_families_load_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import compressor.families"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
