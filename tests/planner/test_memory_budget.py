"""What memory goes to, against published sizes of models, and the seconds of steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from compressor.plan import LayerShape, Plan, Source
from compressor.plan.evidence import Speed
from moescope.errors import PlanError
from planner.estimate.dense import dense_part
from planner.estimate.memory import activation_bytes, expert_sizes, kv_bytes, memory_budget
from planner.estimate.speed import speed, step_costs
from planner.estimate.storage import expert_bytes
from planner.machine import GIB, Link, Machine, Processor
from planner.simulate.outcome import Outcome
from planner.simulate.timeline import bound_seconds, timeline
from planner.simulate.workload import decode


def source_of(
    config: dict[str, Any], *, experts: int, k: int, width: int, layers: range, shared: int = 0, **more: Any
) -> Source:
    shapes = tuple(
        LayerShape(layer=one, num_experts=experts, top_k=k, width=width, shared_width=shared) for one in layers
    )
    return Source(
        model="toy", model_type=config["model_type"], hidden_size=config["hidden_size"],
        expert_size=config["hidden_size"], num_layers=config["num_hidden_layers"], layers=shapes, **more,
    )  # fmt: skip


MIXTRAL = {
    "model_type": "mixtral", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 32000, "sliding_window": None, "intermediate_size": 14336,
}  # fmt: skip
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "vocab_size": 129280, "kv_lora_rank": 512, "q_lora_rank": 1536,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "intermediate_size": 18432,
    "first_k_dense_replace": 3,
}  # fmt: skip
GPT_OSS = {
    "model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088, "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
}  # fmt: skip
QWEN3_NEXT = {
    "model_type": "qwen3_next", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 16,
    "num_key_value_heads": 2, "head_dim": 256, "vocab_size": 151936, "linear_num_key_heads": 16,
    "linear_key_head_dim": 128, "linear_num_value_heads": 32, "linear_value_head_dim": 128,
    "full_attention_interval": 4,
}  # fmt: skip
MODELS = {
    "mixtral": (MIXTRAL, {"experts": 8, "k": 2, "width": 14336, "layers": range(32)}),
    "deepseek": (DEEPSEEK_V3, {"experts": 256, "k": 8, "width": 2048, "layers": range(3, 61), "shared": 2048}),
    "gpt-oss": (GPT_OSS, {"experts": 32, "k": 4, "width": 2880, "layers": range(24)}),
    "qwen3-next": (QWEN3_NEXT, {"experts": 512, "k": 10, "width": 512, "layers": range(48), "shared": 512}),
}


@pytest.mark.parametrize(
    ("name", "billions"), [("mixtral", 46.7), ("deepseek", 671.0), ("gpt-oss", 20.9), ("qwen3-next", 79.7)]
)
def test_all_parameters_are_those_published(name: str, billions: float) -> None:
    """Totals of the model cards; estimates leave biases and small tensors out."""
    config, shape = MODELS[name]
    source = source_of(config, **shape)
    found = dense_part(config, source).parameters + int(expert_sizes(source, source_bits=16).parameters.sum())
    assert found / 1e9 == pytest.approx(billions, rel=0.005)


def test_keys_and_values_are_those_published() -> None:
    per_token = {
        name: kv_bytes(dense_part(config, source_of(config, **shape)), context=1)
        for name, (config, shape) in MODELS.items()
    }
    assert per_token["mixtral"] == 2 * 32 * 8 * 128 * 2
    assert per_token["deepseek"] == 70272  # arXiv 2505.09343, table 1: 70.272 KB
    assert per_token["qwen3-next"] == 12 * 2 * 2 * 256 * 2  # 12 of 48 layers; the others keep a state
    rest = dense_part(GPT_OSS, source_of(GPT_OSS, **MODELS["gpt-oss"][1]))
    layer = 2 * 8 * 64 * 2
    assert kv_bytes(rest, context=100) == 24 * 100 * layer
    assert kv_bytes(rest, context=1000, batch=3) == 3 * 12 * (1000 + 128) * layer
    assert kv_bytes(rest, context=1000, value_bytes=1) == 6 * (1000 + 128) * layer


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        ({"sliding_window": 64}, ["window"] * 4),
        ({"sliding_window": 64, "use_sliding_window": False}, ["full"] * 4),
        ({"sliding_window": 64, "max_window_layers": 3}, ["full"] * 3 + ["window"]),
        ({"sliding_window": 64, "sliding_window_pattern": 2}, ["window", "full"] * 2),
        ({"attn_layer_period": 4, "attn_layer_offset": 2}, ["state", "state", "full", "state"]),
        ({"hybrid_override_pattern": "M*E-"}, ["state", "full", "none", "none"]),
        ({"linear_attn_config": {"full_attn_layers": [4]}}, ["state"] * 3 + ["full"]),
        ({"layer_types": ["conv", "full_attention", "chunked_attention", "odd"], "attention_chunk_size": 9},
         ["state", "full", "window", "full"]),
        ({"text_config": {"full_attention_interval": 2}}, ["state", "full"] * 2),
    ],
)  # fmt: skip
def test_kinds_of_layers(change: dict[str, Any], kinds: list[str]) -> None:
    config = {
        "model_type": "toy", "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 50,
        "intermediate_size": 32, **change,
    }  # fmt: skip
    rest = dense_part(config, source_of(config, experts=4, k=2, width=8, layers=range(2, 3)))
    assert [layer.kind for layer in rest.layers] == kinds
    assert all((layer.kv_values == 0) == (layer.kind in ("state", "none")) for layer in rest.layers)
    assert any("'odd'" in text for text in rest.assumed) == ("layer_types" in change)
    if "hybrid_override_pattern" in change:  # each decoder layer has one part alone
        norms = 2 * 16
        assert rest.layers[1].parameters == norms + 4 * 16 * 16
        assert rest.layers[3].parameters == norms + 3 * 16 * 32
        assert rest.layers[2].parameters == norms + 4 * 16


def test_a_configuration_that_says_too_little_is_refused() -> None:
    source = source_of(MIXTRAL, **MODELS["mixtral"][1])
    for missing, words in (("num_attention_heads", "no num_attention_heads"), ("vocab_size", "no vocab_size")):
        with pytest.raises(PlanError, match=words):
            dense_part({name: value for name, value in MIXTRAL.items() if name != missing}, source)


def test_the_budget_adds_up() -> None:
    source = source_of(MIXTRAL, **MODELS["mixtral"][1])
    rest, sizes = dense_part(MIXTRAL, source), expert_sizes(source, source_bits=16)
    assert sizes.bytes[0, 0] == 3 * 4096 * 14336 * 2
    budget = memory_budget(24 * GIB, rest, source, context=4096)
    assert budget.kv == 4096 * 131072 and budget.estimated
    assert budget.kv_share == pytest.approx(0.5 / 24)
    assert budget.other == rest.parameters * 2
    assert budget.left == pytest.approx(24 * GIB - budget.other - budget.kv - budget.activations)
    slots = budget.slots(sizes)
    assert slots * sizes.bytes[0, 0] <= budget.left < (slots + 1) * sizes.bytes[0, 0]
    assert budget.layer_slots(sizes) == slots // 32
    known = memory_budget(24 * GIB, rest, source, context=4096, other=4 * GIB)
    assert not known.estimated and known.other == 4 * GIB
    assert memory_budget(2000 * GIB, rest, source, context=1).slots(sizes) == 256
    with pytest.raises(PlanError, match="2.0 GiB hold no expert: other weights take 3.0 GiB"):
        memory_budget(2 * GIB, rest, source, context=4096)
    with pytest.raises(PlanError, match="batch 0"):
        memory_budget(24 * GIB, rest, source, context=4096, batch=0)


def test_activations_bound_what_a_layer_holds() -> None:
    source = source_of(MIXTRAL, **MODELS["mixtral"][1])
    rest = dense_part(MIXTRAL, source)
    one = activation_bytes(rest, source, tokens=1, sequences=1)
    assert one == 2 * 2 * 4096 + 2 * 2 * (2 * 14336 + 4096) + 4 * 8 + 4 * 32000
    assert activation_bytes(rest, source, tokens=512, sequences=1) - one == 511 * (one - 4 * 32000)


def test_sizes_of_a_plan_are_those_stored(plan: Plan) -> None:
    sizes = expert_sizes(plan, source_bits=16)
    assert sizes.total == pytest.approx(expert_bytes(plan, source_bits=16))
    assert (sizes.bytes == 0).any() and len(np.unique(sizes.bytes)) > 2
    whole = expert_sizes(plan.source, source_bits=16)
    assert (sizes.bytes <= whole.bytes).all()


@pytest.fixture
def plan() -> Plan:
    """Of the sample: a fifth of its experts dropped, the others on grids of several widths."""
    from pathlib import Path

    import planner
    import store

    with store.open_run(Path(__file__).parents[2] / "sample_data" / "runs" / "sample.duckdb") as run:
        return planner.make(run, preset="frequency", share=0.2, bits=3.0)


# --- times ---

TOY = {
    "model_type": "toy", "hidden_size": 100, "num_hidden_layers": 4, "num_attention_heads": 10, "vocab_size": 1000,
    "intermediate_size": 300,
}  # fmt: skip
MACHINE = Machine(
    name="toy", title="", vram=GIB, ram=GIB, device=Processor(1e6, 1e9, 1e-3), cpu=Processor(1e5, 1e8, 2e-3),
    link=Link("toy", 1e5, 0.01),
)  # fmt: skip


def test_steps_cost_what_their_parts_cost() -> None:
    """MoE layers are the second and the third of four."""
    source = source_of(TOY, experts=4, k=2, width=20, layers=range(1, 3))
    rest, sizes = dense_part(TOY, source), expert_sizes(source, source_bits=16)
    ids = np.array([[[0, 1], [1, 2]], [[3, 2], [3, 0]]], np.int16)
    work = decode(selections=ids[:, None], num_experts=4, layers=[(1, 0), (2, 0)])
    costs = step_costs(work, MACHINE, sizes=sizes, rest=rest, context=50)
    device, attention, forward = MACHINE.device, 4 * 100 * 100, 3 * 100 * 300
    kv = 2 * 100 * 2 * 50
    usual = device.seconds((attention + forward + 200) * 2 + kv, attention + forward + 200, 1)
    sparse = device.seconds((attention + 400 + 200) * 2 + kv, attention + 600, 1)
    np.testing.assert_allclose(costs.dense, [[usual + sparse] * 2, [sparse] * 2], rtol=1e-12)
    np.testing.assert_allclose(costs.tail, usual + device.seconds(200_000, 100_000, 1), rtol=1e-12)
    np.testing.assert_allclose(costs.expert, device.seconds(12_000, 6_000, 1), rtol=1e-12)
    np.testing.assert_allclose(costs.cpu, MACHINE.cpu.seconds(12_000, 6_000, 1), rtol=1e-12)
    alone = step_costs(work, MACHINE, sizes=sizes, rest=None, context=50)
    assert alone.dense.sum() == 0 and (alone.expert == costs.expert).all()
    scaled = step_costs(work, MACHINE, sizes=sizes, rest=rest, context=1, other=rest.parameters * 4)
    assert scaled.tail[0] == pytest.approx(
        device.seconds((attention + forward + 200) * 4 + 400, 1, 1) + device.seconds(400_000, 1, 1)
    )
    with pytest.raises(PlanError, match="layer 7 of the workload"):
        step_costs(decode(selections=ids[:, None], num_experts=4, layers=[(1, 0), (7, 0)]), MACHINE, sizes=sizes,
                   rest=rest, context=1)  # fmt: skip


def test_the_record_of_a_speed() -> None:
    source = source_of(TOY, experts=4, k=2, width=20, layers=range(1, 3))
    sizes = expert_sizes(source, source_bits=16)
    ids = np.array([[[0, 1], [1, 2]], [[3, 2], [3, 0]]], np.int16)
    work = decode(selections=ids[:, None], num_experts=4, layers=[(1, 0), (2, 0)])
    costs = step_costs(work, MACHINE, sizes=sizes, rest=None, context=50)
    zero = np.zeros((1, 2), np.int64)
    missing = np.array([[2, 1], [2, 1]], np.uint16)
    clock = timeline(work, Outcome("lru", 4, zero, zero, zero, zero, 0, missing), costs, link=MACHINE.link)
    bound = bound_seconds(work, costs, least=missing.sum(axis=1), link=MACHINE.link)
    found = speed(clock, bound, MACHINE, hit_rate=(0.25, 0.1, 0.4), context=50, peak_bytes=1234.4)
    assert isinstance(found, Speed)
    unit, copy = 0.001 + 0.012, 0.01 + 0.12
    assert found.ms_per_token == pytest.approx(1e3 * (2 * (2 * copy + unit) + 2 * (copy + unit)) / 2)
    assert found.resident_ms == pytest.approx(1e3 * 8 * unit / 2)
    assert found.bound_ms == pytest.approx(1e3 * 6 * copy / 2)
    assert found.loads_per_token == 3 * 12_000 and found.stalled == 1 and found.peak_bytes == 1234
