"""What families look like: layouts read from modules, shared experts, router traits, refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compressor.families import (
    adapter_of,
    describe_experts,
    find_shared_experts,
    is_fused_experts,
    refusal_of,
    router_traits,
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
    assert router_traits(router_class="ZayaRouter", experts_class="ZayaExperts").zero_weight_is_none
    assert router_traits(router_class="DeepseekV3TopkRouter", experts_class="DeepseekV3Experts").score == "sigmoid"
    assert router_traits(router_class="DeepseekV2TopkRouter", experts_class="DeepseekV2Experts").score == "softmax"
    assert router_traits(router_class="", experts_class="MiniMaxExperts").score == "softmax"


def test_refusals_say_why_and_what_to_do() -> None:
    found = {family: [refusal_of(module) for module in build(family).modules()] for family in ("nllb-moe", "olmoe")}
    reasons = [refusal.reason for refusal in found["nllb-moe"] if refusal is not None]
    assert reasons
    assert all("wrong experts" in reason for reason in reasons)
    assert found["olmoe"] == [None] * len(found["olmoe"])


def test_dbrx_is_read_through_its_adapter() -> None:
    experts = next(module for module in build("dbrx").modules() if adapter_of(module))
    adapter = adapter_of(experts)
    assert adapter is not None
    layout = adapter(experts)
    assert layout.num_experts == CONFIGS["dbrx"]["config"]["ffn_config"]["moe_num_experts"]
    assert layout.down_weight(experts, 1).shape == (layout.hidden_size, layout.width)
    packed = experts.mlp.w2.reshape(layout.num_experts, layout.width, layout.hidden_size)
    assert torch.equal(layout.down_weight(experts, 1), packed[1].T)


def test_families_load_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import compressor.families"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
