"""Exported files, read back and compared with the plan, projection by projection."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compressor.exporters import EXPORTERS, exporter
from compressor.families.module_names import MODULE_NAMES
from compressor.plan import DropLayer, DropStep, Plan
from moescope.errors import InputError, PlanError
from tests.compressor.bit_plans import FAMILIES, mixed, quantizing

Wanted = dict[str, Any]


def names(plan: Plan) -> Iterator[tuple[str, Any]]:
    """(module, width) of every projection, spelled out here; None = as it is."""
    (step,) = (step for step in plan.steps if step.step == "quantize")
    given = {
        (layer.layer, one.expert, one.role): one for layer in step.layers for one in layer.experts
    }  # fmt: skip
    for shape in plan.source.layers:
        for expert in range(shape.num_experts):
            one = given.get((shape.layer, expert, "routed"))
            for part in ("gate", "up", "down"):
                width = None if one is None else getattr(one, part)
                yield f"model.layers.{shape.layer}.mlp.experts.{expert}.{part}_proj", width
        one = given.get((shape.layer, 0, "shared"))
        for part in ("gate", "up", "down") if shape.shared_width else ():
            width = None if one is None else getattr(one, part)
            yield f"model.layers.{shape.layer}.mlp.shared_experts.{part}_proj", width


@pytest.mark.parametrize("family", FAMILIES)
def test_autoround_names_every_projection(family: str) -> None:
    plan = quantizing(family, mixed)
    exported = exporter("autoround").export(plan)
    assert exported.left_out == ()
    config = json.loads(exported.text)
    stays = {"bits": 16, "data_type": "fp"}
    expected = {
        name: {"bits": bits, "group_size": 64, "sym": False} if bits else stays for name, bits in names(plan)
    }  # fmt: skip
    assert config == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_llm_compressor_matches_every_projection_once(family: str) -> None:
    yaml = pytest.importorskip("yaml")
    plan = quantizing(family, mixed, symmetric=True)
    exported = exporter("llm-compressor").export(plan)
    assert exported.left_out == ()
    modifier = yaml.safe_load(exported.text)["quant_stage"]["quant_modifiers"]["QuantizationModifier"]
    groups = modifier["config_groups"].values()
    for name, bits in names(plan):
        found = [
            group["weights"] for group in groups for target in group["targets"]
            if re.match(target.removeprefix("re:"), name)
        ]  # fmt: skip
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
        assert found == ([weights] if bits else []), name
    assert modifier["ignore"][0] == "lm_head"
    router = "model.layers.1.mlp.router" if family == "gpt_oss" else "model.layers.1.mlp.gate"
    assert re.match(modifier["ignore"][1].removeprefix("re:"), router)
    assert not re.match(modifier["ignore"][1].removeprefix("re:"), "model.layers.1.mlp.experts.0.gate_proj")


@pytest.mark.parametrize("family", FAMILIES)
def test_gptqmodel_overrides_every_projection(family: str) -> None:
    plan = quantizing(family, mixed, group_size=0)
    exported = exporter("gptqmodel").export(plan)
    assert exported.left_out == ()
    assert any("7.3" in note for note in exported.notes)
    dynamic = json.loads(exported.text)

    def look_up(name: str) -> Any:
        """What the engine does: the first expression that matches, from the beginning of the name."""
        for pattern, overrides in dynamic.items():
            if re.match(pattern[2:], name):
                return False if pattern.startswith("-:") else overrides
        return "global"

    for name, bits in names(plan):
        assert look_up(name) == ({"bits": bits, "group_size": -1, "sym": False} if bits else False), name
    assert look_up("model.layers.1.self_attn.q_proj") is False


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_says_what_a_layer_has_in_common(family: str) -> None:
    def bits(layer: int, expert: int, part: str) -> Any:
        if expert < 0:
            return 8
        return {"gate": 2 if layer == 1 else 3, "up": 4, "down": (2, 4)[expert % 2] if layer == 1 else 8}[part]

    exported = exporter("gguf").export(quantizing(family, bits))
    lines = exported.text.splitlines()
    assert all(re.fullmatch(r"blk\\\.\d+\\\.ffn_(gate|up|down)_(exps|shexp)=[a-z0-9_]+", line) for line in lines)
    found = dict(line.split("=") for line in lines)
    expected = {
        r"blk\.1\.ffn_gate_exps": "q2_k", r"blk\.1\.ffn_up_exps": "q4_k", r"blk\.2\.ffn_gate_exps": "q3_k",
        r"blk\.2\.ffn_up_exps": "q4_k", r"blk\.2\.ffn_down_exps": "q8_0",
    }  # fmt: skip
    if FAMILIES[family]:
        expected |= {rf"blk\.{layer}\.ffn_{part}_shexp": "q8_0" for layer in (1, 2) for part in ("gate", "up", "down")}
    assert found == expected
    reason = "the experts of the layer have several widths, and llama.cpp keeps them in one tensor"
    assert exported.left_out == tuple(
        f"layer 1 expert {expert} (down {(2, 4)[expert % 2]} bit): {reason}" for expert in range(4)
    )


def test_gguf_leaves_out_rows_that_blocks_do_not_divide() -> None:
    small = {"width": 96}
    plan = quantizing("olmoe", lambda layer, expert, part: 3 if layer == 1 else 4, source_changes=small, group_size=32)
    exported = exporter("gguf").export(plan)
    assert exported.text.splitlines() == [
        r"blk\.1\.ffn_gate_exps=q3_k", r"blk\.1\.ffn_up_exps=q3_k", r"blk\.2\.ffn_gate_exps=q4_k",
        r"blk\.2\.ffn_up_exps=q4_k", r"blk\.2\.ffn_down_exps=q4_0",
    ]  # fmt: skip
    assert exported.left_out == tuple(
        f"layer 1 expert {expert} (down 3 bit): no type of this width for rows of 96" for expert in range(4)
    )


def test_torchao_says_layers_of_eight_bits_alone() -> None:
    uniform = {"symmetric": True, "group_size": 0}
    plan = quantizing("qwen3_moe", lambda layer, expert, part: 8 if layer == 2 else 4 + 4 * (expert > 0), **uniform)
    exported = exporter("torchao").export(plan)
    (expression,) = json.loads(exported.text)["_data"]["fqn_to_config"]
    fused = [
        f"model.layers.{layer}.mlp.experts.{name}" for layer in range(30) for name in ("gate_up_proj", "down_proj")
    ]
    matched = [name for name in fused if re.search(expression.removeprefix("re:"), name)]
    assert matched == ["model.layers.2.mlp.experts.gate_up_proj", "model.layers.2.mlp.experts.down_proj"]
    assert len(exported.left_out) == 4 and exported.left_out[0].startswith("layer 1 expert 0 (gate 4 bit, up 4 bit")
    with pytest.raises(PlanError, match="one scale per row"):
        exporter("torchao").export(quantizing("qwen3_moe", lambda *_: 8))
    with pytest.raises(PlanError, match="transposed"):
        exporter("torchao").export(quantizing("gpt_oss", lambda *_: 8, **uniform))


def test_what_autoround_would_leave_is_left_out() -> None:
    plan = quantizing("olmoe", lambda *_: 4, source_changes={"width": 48}, group_size=16)
    with pytest.raises(PlanError, match="no multiples of 32"):
        exporter("autoround").export(plan)
    plan = quantizing("olmoe", lambda layer, expert, part: 1 if expert == 3 else 8, form="dense")
    exported = exporter("autoround").export(plan)
    assert exported.left_out == tuple(
        f"layer {layer} expert 3 (gate 1 bit, up 1 bit, down 1 bit): AutoRound has no such width" for layer in (1, 2)
    )
    assert json.loads(exported.text)["model.layers.1.mlp.experts.3.up_proj"]["bits"] == 16
    assert any("AR_ALLOW_W8_ASYM" in note for note in exported.notes)


def test_numbers_are_those_of_the_result() -> None:
    gone = DropStep(method="test", form="per_layer", layers=(DropLayer(layer=2, experts=(0, 2)),))
    plan = quantizing("olmoe", lambda layer, expert, part: None if layer == 1 or expert in (0, 2) else expert + 1, gone)
    exported = exporter("autoround").export(plan)
    config = json.loads(exported.text)
    assert {name: entry["bits"] for name, entry in config.items() if "layers.2" in name and "up_proj" in name} == {
        "model.layers.2.mlp.experts.0.up_proj": 2, "model.layers.2.mlp.experts.1.up_proj": 4,
    }  # fmt: skip
    assert exported.left_out == ("step 1, drop: apply it first; the names in the file are those of the result",)


def test_decoder_layers_that_go_shift_the_others() -> None:
    gone = DropStep(method="test", form="uniform", layers=(), decoder_layers=(1,))
    exported = exporter("gguf").export(quantizing("olmoe", lambda layer, *_: 4 if layer == 2 else None, gone))
    assert exported.text.splitlines()[0] == r"blk\.1\.ffn_gate_exps=q4_k"


def test_fillers_stand_behind_their_group() -> None:
    changes = {"selection_bias": True, "num_experts": 8, "groups": 2, "chosen_groups": 1}
    gone = DropStep(
        method="test", form="padded",
        layers=(DropLayer(layer=1, experts=(0, 4)), DropLayer(layer=2, experts=())),
    )  # fmt: skip

    def bits(layer: int, expert: int, part: str) -> Any:
        return {5: 4, 1: 2}.get(expert) if layer == 1 else None

    plan = quantizing("deepseek_v3", bits, gone, source_changes=changes)
    config = json.loads(exporter("autoround").export(plan).text)
    found = {name: one["bits"] for name, one in config.items() if "layers.1" in name and "up" in name and "bits" in one}
    assert found["model.layers.1.mlp.experts.0.up_proj"] == 2
    assert found["model.layers.1.mlp.experts.4.up_proj"] == 4  # three of the first group, a filler, then the second


def test_what_bits_mean_beside_widths_is_named() -> None:
    plan = quantizing("olmoe", lambda *_: 4, form="dense", nested=2, activation_bits=8)
    for one in EXPORTERS[:4]:
        sentences = one.export(plan).left_out
        assert sentences[0].startswith("step 1, quantize: nested widths from 2 bits")
        assert sentences[1] == "step 1, quantize: 8 bits for what enters the experts"


@pytest.mark.parametrize("engine", [one.name for one in EXPORTERS if one.step == "quantize"])
def test_what_cannot_be_exported_is_refused(engine: str) -> None:
    with pytest.raises(PlanError, match="the names of toy_moe's experts"):
        exporter(engine).export(quantizing("toy_moe", mixed))
    dropping = Plan.model_validate(
        {**quantizing("olmoe", mixed).model_dump(),
         "steps": [DropStep(method="test", form="uniform", layers=(), decoder_layers=(1,)).model_dump()]}
    )  # fmt: skip
    with pytest.raises(PlanError, match="no quantize step"):
        exporter(engine).export(dropping)
    with pytest.raises(InputError, match="autoround, llm-compressor"):
        exporter("nobody")


@pytest.mark.parametrize("family", sorted(MODULE_NAMES))
def test_names_are_those_of_the_family(family: str) -> None:
    """The path of the experts, and of the shared experts' projections, in a tiny model of transformers."""
    import torch
    import transformers

    from tests.profiler.capture.tiny import CONFIGS

    entry, wanted = CONFIGS[family], MODULE_NAMES[family]
    config = getattr(transformers, entry["config_class"]).from_dict(entry["config"])
    with torch.device("meta"):
        model = getattr(transformers, entry["model_class"])._from_config(config)
    modules = dict(model.named_modules())
    found = {name for name in modules if re.fullmatch(r"model\.layers\.\d+\..*experts", name) and "shared" not in name}
    assert found and all(re.fullmatch(rf"{wanted.layers}\.\d+\.{wanted.block}\.experts", name) for name in found)
    layer = max(int(name.split(".")[2]) for name in found)
    shared = {name for name in modules if "shared" in name and name.endswith(("up_proj", "down_proj"))}
    if wanted.shared:
        assert {wanted.shared_expert(layer, "up"), wanted.shared_expert(layer, "down")} <= shared
    else:
        assert not shared
    assert f"{wanted.layers}.{layer}.{wanted.router}" in modules


def test_exporting_needs_no_torch() -> None:
    code = "import sys\nfor name in ('torch', 'transformers'): sys.modules[name] = None\nimport compressor.exporters"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
