"""Inspection against the models themselves, published sizes, and folders that are no model."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    SwitchTransformersConfig,
)

from moescope.errors import InputError, ModelError
from profiler.inspect import inspect_model

TINY = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def tiny_olmoe(**options) -> OlmoeConfig:
    return OlmoeConfig(**(TINY | {"num_experts": 8, "num_experts_per_tok": 2} | options))


def saved(config, folder) -> str:
    config.save_pretrained(folder)
    return str(folder)


def refusal(path, **options) -> str:
    with pytest.raises(ModelError) as caught:
        inspect_model(path, gflops=1.0, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("tied", [False, True])
def test_a_small_model_is_counted_as_it_is(tmp_path, tied):
    path = saved(tiny_olmoe(tie_word_embeddings=tied, dtype="bfloat16"), tmp_path)
    found = inspect_model(path, sequence_length=64, token_budget=1000, gflops=2.0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    parameters = {name: p.numel() for name, p in model.named_parameters()}
    expert = 3 * 32 * 24
    assert found.parameters == sum(parameters.values())
    assert found.expert_parameters == 3 * 8 * expert
    assert found.active_parameters == found.parameters - 3 * 6 * expert
    assert found.weights_gib["16 bit"] * 2**30 == 2 * found.parameters
    assert found.expert_weights_gib["4 bit"] * 2**30 == found.expert_parameters / 2
    assert found.dtype == "bfloat16"
    assert (found.num_layers, found.hidden_size, found.dense_layers) == (3, 32, [])
    assert [(x.layer, x.num_experts, x.top_k, x.expert_width, x.num_shared) for x in found.moe_layers] == [
        (layer, 8, 2, 24, 0) for layer in range(3)
    ]
    # by hand: every weight that a token meets, twice, and causal attention over half of 64 tokens
    attention = 32 * 32 * 2 + 32 * 16 * 2
    norms = 2 * 32 + 32 + 16
    met = 3 * (attention + norms + 2 * expert + 32 * 8) + 32 + 32 * 100
    assert found.flops_per_token == 2 * met + 3 * 4 * 32 * 32
    assert found.hours == pytest.approx(found.flops_per_token * 1000 / 1e9 / 3600)
    assert found.disk_gib["trace"] * 2**30 == pytest.approx(1.9 * 3 * 2 * 1000)


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [
        (MixtralConfig(), 46.7, 12.9),
        (DeepseekV3Config(), 671, 37.6),
        (GptOssConfig(), 116.8, 5.13 + 0.58),  # published without the input embedding
    ],
)
def test_published_sizes(tmp_path, config, total, active):
    found = inspect_model(saved(config, tmp_path), gflops=100.0)
    assert found.parameters / 1e9 == pytest.approx(total, rel=0.005)
    assert found.active_parameters / 1e9 == pytest.approx(active, rel=0.01)


def test_dense_layers_and_shared_experts_are_told_apart(tmp_path):
    config = DeepseekV3Config(
        **(TINY | {"num_hidden_layers": 4, "num_key_value_heads": 4}),
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        n_shared_experts=2,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    found = inspect_model(saved(config, tmp_path), gflops=1.0)
    assert found.dense_layers == [0]
    assert [layer.layer for layer in found.moe_layers] == [1, 2, 3]
    assert {layer.num_shared for layer in found.moe_layers} == {2}
    assert "1-3: DeepseekV3NaiveMoe" in found.to_text() or "1-3: DeepseekV3Experts" in found.to_text()


def test_levels_add_up(tmp_path):
    path = saved(tiny_olmoe(), tmp_path)
    routing = inspect_model(path, gflops=1.0)
    both = inspect_model(path, level="activations", gflops=1.0)
    assert list(routing.statistics_gib) == ["routing"]
    assert list(both.statistics_gib) == ["routing", "activations"]
    assert both.level == "routing,activations"
    assert both.memory_gib > routing.memory_gib > routing.weights_gib["float32"]
    # by hand, per layer: 36 bytes per neuron, 28 per channel of an expert, the Gram matrix, scalars, weights' norms,
    # and two sums per expert for each sixteenth of the text
    experts, neurons, channels = 8, 8 * 24, 8 * 32
    layer = 36 * neurons + 28 * channels + 8 * experts**2 + 8 * (14 * experts + 7) + 4 * (3 * neurons + channels)
    assert both.statistics_gib["activations"] * 2**30 == 3 * (layer + 8 * 9 + 16 * 2 * 8 * experts)
    assert both.recording_gib > routing.recording_gib > sum(routing.statistics_gib.values())
    more = inspect_model(path, gflops=1.0, domains=7)
    pooled = 3 * (8 * 2 * experts**2 + 16 * 2 * 8 * experts) / 2**30  # pairs, and the sixteenths of the text
    assert more.statistics_gib["routing"] - pooled == pytest.approx(7 * (routing.statistics_gib["routing"] - pooled))
    every = inspect_model(path, level="similarity,errors,moments,lookahead,attention,gradients", gflops=1.0)
    assert list(every.statistics_gib) == every.level.split(",")
    assert every.statistics_gib["moments"] * 2**30 == 3 * 8 * 32**2
    # per expert four rows of tokens, energy and six widths, one of them with three nested ones; three rows of grids
    assert every.statistics_gib["errors"] * 2**30 == 3 * 8 * experts * ((4 * 8 + 3) + 3 * 9)
    with pytest.raises(InputError, match="level 'all' is not known"):
        inspect_model(path, level="all", gflops=1.0)


def test_trying_widths_takes_time_by_sampled_tokens_and_by_weights(tmp_path):
    path = saved(tiny_olmoe(), tmp_path)
    short, long, longer = (
        [inspect_model(path, level=level, token_budget=tokens, gflops=1.0).hours for level in ("routing", "errors")]
        for tokens in (1_000, 10_000, 10_000_000)
    )
    assert short[1] > short[0]  # every weight is tried, however few tokens there are
    extra = [pair[1] - pair[0] for pair in (short, long, longer)]
    expert, forwards, used = 3 * 32 * 24, 15, 2
    flops = 3 * 2 * forwards * used * expert  # of a sampled token: twice per weight, in three layers
    assert (extra[1] - extra[0]) * 3600 * 1e9 / 2 == pytest.approx(flops * 1.2 * 9_000 / 16, rel=0.01)
    assert (extra[2] - extra[1]) * 3600 * 1e9 / 2 == pytest.approx(flops * (8192 - 782), rel=0.01)  # no more are taken


def test_json_and_text(tmp_path):
    path = saved(tiny_olmoe(), tmp_path)
    found = inspect_model(path, sequence_length=10**5, level="activations")
    assert found.gflops_measured
    assert found.gflops > 0.1
    assert json.loads(json.dumps(found.to_json()))["moe_layers"][2]["module"] == "model.layers.2.mlp.experts"
    text = found.to_text()
    assert "0-2: OlmoeExperts, 8 experts, top 2, width 24; OlmoeTopKRouter; levels routing, activations" in text
    assert "estimate" in text
    assert any("longer than the 4096 positions" in warning for warning in found.warnings)


def test_weights_in_the_folder_are_weighed_but_not_needed(tmp_path):
    assert inspect_model(saved(tiny_olmoe(), tmp_path), gflops=1.0).checkpoint_gib is None
    model = AutoModelForCausalLM.from_config(tiny_olmoe())
    model.save_pretrained(tmp_path)
    found = inspect_model(tmp_path, gflops=1.0)
    assert found.checkpoint_gib == pytest.approx(found.weights_gib["float32"], rel=0.1)


def test_the_type_of_the_weights(tmp_path):
    path = saved(tiny_olmoe(), tmp_path)
    assert inspect_model(path, gflops=1.0).dtype == "float32"
    assert inspect_model(path, dtype="float16", gflops=1.0).dtype == "float16"
    assert "dtype 'int3' is not known" in refusal(path, dtype="int3")


def test_too_little_memory_and_quantisation_are_warned_of(tmp_path, monkeypatch):
    monkeypatch.setattr("profiler.inspect.available_gib", lambda: 16.0)
    config = Qwen2MoeConfig(quantization_config={"quant_method": "gptq", "bits": 4})
    warnings = inspect_model(saved(config, tmp_path), gflops=1.0).warnings
    assert any("GiB are needed, 16 GiB are free" in warning for warning in warnings)
    assert any("quantised (gptq 4 bit)" in warning for warning in warnings)


def test_models_that_cannot_be_watched(tmp_path):
    assert "dense model" in refusal(saved(LlamaConfig(**TINY), tmp_path / "llama"))
    assert "no causal language model" in refusal(saved(SwitchTransformersConfig(), tmp_path / "switch"))


def test_folders_that_are_no_model(tmp_path):
    (tmp_path / "olmoe").mkdir()
    assert refusal(tmp_path / "olmo") == f"'{tmp_path}/olmo' does not exist: did you mean olmoe?"
    assert "has no config.json" in refusal(tmp_path / "olmoe")
    file = tmp_path / "olmoe" / "config.json"
    assert "is a file: give the folder" in refusal(_write(file, "{"))
    assert "its configuration cannot be read" in refusal(file.parent)
    for content in ('{"model_type": "no-such-model"}', "{}", "[]", '{"model_type": "olmoe", "hidden_size": "x"}'):
        _write(file, content)
        assert str(file.parent) in refusal(file.parent)
    tiny_olmoe().save_pretrained(file.parent)
    _write(file, file.read_text().replace('"num_attention_heads": 4', '"num_attention_heads": 0'))
    assert "olmoe" in refusal(file.parent)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    _write(tmp_path / "config.json", '{"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}')
    _write(tmp_path / "code.py", "raise SystemExit('ran')")
    assert "configuration cannot be read" in refusal(tmp_path)


def test_a_hub_id_without_network_fails_in_one_line():
    assert "no-such-owner/no-such-model: its configuration cannot be read" in refusal("no-such-owner/no-such-model")


def test_building_takes_no_memory(tmp_path):
    """670 billion parameters are inspected on this machine: nothing but the meta device can do that."""
    assert inspect_model(saved(DeepseekV3Config(), tmp_path), gflops=1.0).weights_gib["float32"] > 2000
    assert torch.get_default_device() == torch.device("cpu")


def test_importing_inspect_loads_no_torch():
    code = "import sys, profiler.inspect; print(*{'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def _write(path, content):
    path.write_text(content)
    return path
