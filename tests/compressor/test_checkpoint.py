"""Checkpoints on disk: names, headers, configurations of all kinds, quantized experts, and looking a result over."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compressor
from compressor.card import hub_id
from compressor.checkpoint.headers import header_bytes, read_header
from compressor.checkpoint.slots import Slot, find_slots
from compressor.families.checkpoint import read_name
from compressor.plan import DropLayer, DropStep, LayerShape, MergeGroup, MergeLayer, MergeStep, Plan, Source
from compressor.weights import ExpertWeights
from moescope.errors import ModelError, PlanError, RunError
from tests.compressor import edit_plans
from tests.compressor.apply_cases import config, drop, header, plan_of, reload, saved, slim, tensors

GONE = (1, 6)


@pytest.mark.parametrize(
    ("name", "kind", "layer", "expert", "part"),
    [
        ("model.layers.3.mlp.experts.12.gate_proj.weight", "expert", 3, 12, "gate"),
        ("model.layers.61.mlp.experts.0.down_proj.weight_scale_inv", "expert", 61, 0, "down"),
        ("model.layers.3.block_sparse_moe.experts.7.w2.weight", "expert", 3, 7, "down"),
        ("language_model.model.layers.0.mlp.experts.7.up_proj.qweight", "expert", 0, 7, "up"),
        ("model.language_model.layers.3.mlp.experts.gate_up_proj", "expert", 3, None, "gate_up"),
        ("model.layers.3.mlp.experts.down_proj_blocks", "expert", 3, None, "down"),
        ("model.layers.3.mlp.experts.gate_up_proj_bias", "expert", 3, None, "gate_up"),
        ("transformer.blocks.39.ffn.experts.mlp.v1", "expert", 39, None, "up"),
        ("backbone.layers.1.mixer.experts.3.up_proj.weight", "expert", 1, 3, "up"),
        ("model.layers.3.block_sparse_moe.output_linear.weight", "expert", 3, None, "down"),
        ("model.layers.3.mlp.shared_experts.gate_proj.weight", "shared", 3, None, "gate"),
        ("model.layers.3.shared_mlp.input_linear.weight", "shared", 3, None, "gate_up"),
        ("model.layers.3.mlp.shared_expert_gate.weight", "plain", 3, None, None),
        ("model.layers.3.mlp.gate.weight", "router", 3, None, None),
        ("model.layers.3.mlp.router.bias", "router_bias", 3, None, None),
        ("model.layers.3.mlp.gate.e_score_correction_bias", "selection_bias", 3, None, None),
        ("model.layers.3.mlp.moe_statics.e_score_correction_bias", "selection_bias", 3, None, None),
        ("model.layers.3.router.per_expert_scale", "expert_scale", 3, None, None),
        ("model.layers.3.mlp.gate_proj.weight", "plain", 3, None, None),
        ("model.layers.3.self_attn.experts.input_linear.weight", "plain", 3, None, None),
        ("model.embed_tokens.weight", "plain", -1, None, None),
    ],
)
def test_names(name: str, kind: str, layer: int, expert: int | None, part: str | None) -> None:
    read = read_name(name, "any")
    assert (read.kind, read.layer, read.expert, read.part) == (kind, layer, expert, part)
    assert read.renumbered() == name


def test_names_are_renumbered() -> None:
    read = read_name("model.layers.1.mlp.experts.1.w1.weight", "any")
    assert read.renumbered(layer=10, expert=11) == "model.layers.10.mlp.experts.11.w1.weight"
    read = read_name("model.layers.12.mlp.experts.expert_3.wi.weight", "any")
    assert read.renumbered(expert=0) == "model.layers.12.mlp.experts.expert_0.wi.weight"
    # The same name means a bias of the logits, or one for choosing only.
    assert read_name("model.layers.1.mlp.gate.bias", "deepseek_v4").kind == "selection_bias"
    assert read_name("model.layers.1.mlp.gate.bias", "other").kind == "router_bias"


@pytest.mark.parametrize(("width", "hidden"), [(3, 5), (4, 4), (4, 8)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("model_type", ["gpt_oss", "other"])
def test_slots_there_and_back(width: int, hidden: int, transposed: bool, model_type: str) -> None:
    """Square tensors are turned like their siblings; reading what was written gives the expert."""
    shapes = {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}
    named = []
    for name, shape in shapes.items():
        turned = shape[::-1] if transposed else shape
        named.append((read_name(f"model.layers.0.mlp.experts.{name}", model_type), turned))
    first, second = find_slots(named, width=width, hidden=hidden, model_type=model_type)
    assert first == Slot("gate_up", transposed=transposed, interleaved=model_type == "gpt_oss")
    assert second == Slot("down", transposed=transposed)
    expert = ExpertWeights(
        up=torch.randn(width, hidden), down=torch.randn(hidden, width), gate=torch.randn(width, hidden)
    )
    assert expert.gate is not None
    stored = first.of(expert)
    rows = stored.T if transposed else stored
    assert torch.equal(rows[1], expert.up[0] if model_type == "gpt_oss" else expert.gate[1])
    back = ExpertWeights(**first.parts(stored), **second.parts(second.of(expert)))
    assert all(torch.equal(one, two) for (_, one), (_, two) in zip(expert.parts(), back.parts(), strict=True))


def test_headers_are_those_of_the_library(tmp_path: Path) -> None:
    values = {"b": torch.arange(6, dtype=torch.float32).reshape(2, 3), "a": torch.ones(3, dtype=torch.bfloat16)}
    save_file(values, tmp_path / "x.safetensors", metadata={"format": "pt"})
    entries, metadata = read_header(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt"}
    written = header_bytes(((entry.name, entry.dtype, entry.shape) for entry in entries), metadata)
    content = (tmp_path / "x.safetensors").read_bytes()[entries[0].start :]
    (tmp_path / "y.safetensors").write_bytes(written + content)
    again = load_file(tmp_path / "y.safetensors")
    assert all(torch.equal(again[name], value) for name, value in values.items())
    for entry in entries:
        raw = (tmp_path / "x.safetensors").read_bytes()[entry.start : entry.start + entry.size]
        assert raw == values[entry.name].view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("olmoe")
    return saved("olmoe", folder, shard="200KB"), folder


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _shift(path: Path) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    text = json.loads(content[8 : 8 + length])
    name = next(iter(set(text) - {"__metadata__"}))
    text[name]["data_offsets"] = [offset + 4 for offset in text[name]["data_offsets"]]
    new = json.dumps(text).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), "that its index names"),
        (_cut, "bytes and its header speaks of"),
        (lambda path: path.write_bytes(b"\xff" * 40), "is no safetensors file"),
        (lambda path: path.write_bytes(struct.pack("<Q", 10) + b"not json !" + b"0" * 9), "damaged header"),
        (lambda path: path.write_bytes(b""), "is no safetensors file"),
        (_shift, "damaged header"),
        (lambda path: (path.parent / "config.json").write_text("{"), "config.json is damaged"),
        (lambda path: (path.parent / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
    ],
)
def test_damaged_sources(kept: tuple[Any, Path], tmp_path: Path, damage: Callable[[Path], Any], reason: str) -> None:
    model, folder = kept
    shutil.copytree(folder, tmp_path / "in")
    damage(sorted((tmp_path / "in").glob("*.safetensors"))[1])
    with pytest.raises(ModelError, match=reason) as caught:
        compressor.apply(drop(model, GONE), source=tmp_path / "in", destination=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def _edited(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    values = load_file(folder / "model.safetensors")
    change(values)
    save_file({name: value.contiguous() for name, value in values.items()}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda values: values.pop("model.layers.2.mlp.experts.5.up_proj.weight"), "that of expert 5 is missing"),
        (lambda values: values.pop("model.layers.2.mlp.gate.weight"), "no router whose name is known"),
        (lambda values: values.update({"model.layers.2.mlp.expert_heat": torch.ones(8)}), "its name is not known"),
        (
            lambda values: values.update({"model.layers.2.mlp.experts.5.up_proj.weight": torch.ones(47, 64)}),
            r"shape \[47, 64\]",
        ),
        (
            lambda values: [values.pop(name) for name in list(values) if ".layers.2.mlp" in name],
            "layer 2 has experts in the plan, not in the checkpoint",
        ),
    ],
)  # fmt: skip
def test_checkpoints_that_are_not_complete(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], reason: str
) -> None:
    model = saved("olmoe", tmp_path / "in")
    _edited(tmp_path / "in", change)
    with pytest.raises((ModelError, PlanError), match=reason):
        compressor.apply(drop(model, GONE), source=tmp_path / "in", destination=tmp_path / "out")


def _quantized(folder: Path, *, router: bool = False) -> Any:
    """An OLMoE whose experts are 8-bit floats with scales beside them."""
    model = saved("olmoe", folder)

    def change(values: dict[str, torch.Tensor]) -> None:
        for name in list(values):
            if ".experts." in name or (router and name.endswith("mlp.gate.weight")):
                values[name] = values[name].to(torch.float8_e4m3fn)
                values[f"{name}_scale_inv"] = torch.full((1, 1), float(len(name)))

    _edited(folder, change)
    text = {**config(folder), "quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(text))
    return model


def test_quantized_experts_can_go_as_a_whole(tmp_path: Path) -> None:
    model = _quantized(tmp_path / "in")
    receipt = compressor.apply(drop(model, GONE), source=tmp_path / "in", destination=tmp_path / "out")
    assert any("quantized" in note for note in receipt.notes)
    old, new = header(tmp_path / "in" / "model.safetensors"), header(tmp_path / "out" / "model.safetensors")
    assert len(old) - len(new) == 4 * 2 * 3 * 2
    before, after = tensors(tmp_path / "in"), tensors(tmp_path / "out")
    for place, expert in enumerate(number for number in range(8) if number not in GONE):
        for what in ("weight", "weight_scale_inv"):
            name = "model.layers.1.mlp.experts.{}.down_proj." + what
            one, two = before[name.format(expert)], after[name.format(place)]
            assert torch.equal(one.view(torch.uint8), two.view(torch.uint8))


def test_other_edits_of_quantized_experts_are_refused(tmp_path: Path) -> None:
    model = _quantized(tmp_path / "in")
    groups = (
        MergeGroup(lead=0, members=(0, 1), weights=(0.5, 0.5)),
        *(MergeGroup(lead=expert, members=(expert,), weights=(1.0,)) for expert in range(2, 8)),
    )
    merge = MergeStep(
        grouping="test", method="average", layers=tuple(MergeLayer(layer=layer, groups=groups) for layer in range(4))
    )
    for plan, reason in (
        (slim(model, 20)[0], "a slim step"),
        (plan_of(model, merge), "a merge step"),
        (plan_of(model, DropStep(method="test", blocks=(1,))), "a dropped block"),
    ):
        with pytest.raises(PlanError, match=f"{reason}: dequantize"):
            compressor.apply(plan, source=tmp_path / "in", destination=tmp_path / "out")
    text = config(tmp_path / "in")
    text["quantization_config"]["ignore"] = ["model.layers.0.mlp.experts.3.down_proj"]
    (tmp_path / "in" / "config.json").write_text(json.dumps(text))
    with pytest.raises(PlanError, match="names single experts"):
        compressor.apply(drop(model, GONE), source=tmp_path / "in", destination=tmp_path / "out")
    model = _quantized(tmp_path / "router", router=True)
    with pytest.raises(PlanError, match="is quantized"):
        compressor.apply(drop(model, GONE), source=tmp_path / "router", destination=tmp_path / "out")


def test_packed_experts_are_refused(tmp_path: Path) -> None:
    """As GPT-OSS stores them: blocks and scales of all experts together."""
    model = saved("gpt_oss", tmp_path / "in")

    def change(values: dict[str, torch.Tensor]) -> None:
        for name in [name for name in values if name.endswith(("gate_up_proj", "down_proj"))]:
            values[f"{name}_scales"] = torch.ones(8, 2, dtype=torch.uint8)
            values[f"{name}_blocks"] = torch.ones(values.pop(name).shape, dtype=torch.uint8)

    _edited(tmp_path / "in", change)
    with pytest.raises(PlanError, match="stored together.*dequantize"):
        compressor.apply(drop(model, GONE), source=tmp_path / "in", destination=tmp_path / "out")


def test_names_of_counts_that_readers_know(tmp_path: Path) -> None:
    model = saved("qwen3_moe", tmp_path / "in")
    for written in ("num_local_experts", "num_experts"):
        text = config(tmp_path / "in")
        count = text.pop("num_local_experts", None) or text.pop("num_experts")
        (tmp_path / "in" / "config.json").write_text(json.dumps({**text, written: count}))
        out = tmp_path / written
        compressor.apply(drop(model, GONE), source=tmp_path / "in", destination=out)
        assert config(out)["num_local_experts"] == config(out)["num_experts"] == 6
        assert reload("qwen3_moe", out).config.num_experts == 6


def test_counts_that_are_lists_stay_lists(tmp_path: Path) -> None:
    model = saved("hunyuan_v1_moe", tmp_path / "in")
    text = {**config(tmp_path / "in"), "num_experts": [8, 8, 8, 8], "moe_topk": [2, 2, 2, 2]}
    (tmp_path / "in" / "config.json").write_text(json.dumps(text))
    compressor.apply(drop(model, GONE), source=tmp_path / "in", destination=tmp_path / "out")
    assert config(tmp_path / "out")["num_experts"] == [6, 6, 6, 6]
    assert config(tmp_path / "out")["moe_topk"] == [2, 2, 2, 2]
    uneven = drop(model, {0: (1,), 1: (1, 2)}, form="per_layer")
    compressor.apply(uneven, source=tmp_path / "in", destination=tmp_path / "uneven")
    assert config(tmp_path / "uneven")["num_experts"] == [7, 6, 8, 8]
    layers = plan_of(model, DropStep(method="test", decoder_layers=(1,)))
    compressor.apply(layers, source=tmp_path / "in", destination=tmp_path / "layers")
    assert config(tmp_path / "layers")["num_experts"] == [8, 8, 8]


def test_counts_layer_by_layer_move_up_with_their_layers(tmp_path: Path) -> None:
    model = saved("mixtral", tmp_path / "in")
    step = DropStep(
        method="test",
        form="per_layer",
        decoder_layers=(1,),
        layers=(DropLayer(layer=2, experts=(0, 1, 2)), DropLayer(layer=3, experts=(4,))),
    )
    receipt = compressor.apply(plan_of(model, step), source=tmp_path / "in", destination=tmp_path / "out")
    assert receipt.loads_with == "compressor.load"
    text = config(tmp_path / "out")
    assert text["num_local_experts"] == 8
    assert text["per_layer_config"] == {"1": {"num_local_experts": 5}, "2": {"num_local_experts": 7}}
    counts = [len(layer.mlp.experts.down_proj) for layer in compressor.load(tmp_path / "out").model.layers]
    assert counts == [8, 5, 7]


def test_models_that_see_keep_their_eyes(tmp_path: Path) -> None:
    """The configuration of text is a part of the whole, and layers of a vision tower are not those of text."""
    model = saved("qwen3_vl_moe_text", tmp_path / "in")

    def change(values: dict[str, torch.Tensor]) -> None:
        for name in list(values):
            values[f"model.language_model.{name}"] = values.pop(name)
        for expert in range(3):
            values[f"model.visual.layers.0.mlp.experts.{expert}.fc1.weight"] = torch.randn(4, 8)
        values["model.visual.blocks.0.mlp.gate.weight"] = torch.randn(8, 8)

    _edited(tmp_path / "in", change)
    text = config(tmp_path / "in")
    whole = {
        "model_type": "qwen3_vl_moe",
        "vision_config": {"num_experts": 3, "num_hidden_layers": 9},
        "text_config": text,
    }
    (tmp_path / "in" / "config.json").write_text(json.dumps(whole))
    plan = drop(model, GONE)
    plan = plan.model_copy(update={"source": plan.source.model_copy(update={"model_type": "qwen3_vl_moe"})})
    compressor.apply(plan, source=tmp_path / "in", destination=tmp_path / "out")
    assert config(tmp_path / "out")["text_config"]["num_local_experts"] == 6
    assert config(tmp_path / "out")["vision_config"] == whole["vision_config"]
    old, new = tensors(tmp_path / "in"), tensors(tmp_path / "out")
    assert new["model.language_model.layers.3.mlp.experts.down_proj"].shape == (6, 64, 32)
    assert all(torch.equal(new[name], old[name]) for name in old if "visual" in name)


def test_layers_that_predict_further_tokens(tmp_path: Path) -> None:
    """Left out where their experts would not fit any more; kept where nothing of the kind changes."""
    model = saved("deepseek_v3", tmp_path / "in")

    def change(values: dict[str, torch.Tensor]) -> None:
        for name in [name for name in values if name.startswith("model.layers.3.")]:
            values[name.replace(".3.", ".4.", 1)] = values[name].clone()
        values["model.layers.4.eh_proj.weight"] = torch.randn(64, 128)

    _edited(tmp_path / "in", change)
    receipt = compressor.apply(drop(model, GONE), source=tmp_path / "in", destination=tmp_path / "out")
    assert any("model.layers.4" in note for note in receipt.notes)
    assert not any(".layers.4." in name for name in tensors(tmp_path / "out"))
    assert config(tmp_path / "out")["num_nextn_predict_layers"] == 0
    reload("deepseek_v3", tmp_path / "out")
    plan, _ = slim(model, 20, "masked")
    compressor.apply(plan, source=tmp_path / "in", destination=tmp_path / "masked")
    assert set(tensors(tmp_path / "masked")) == set(tensors(tmp_path / "in"))


def test_fields_that_count_layers(tmp_path: Path) -> None:
    model = saved("qwen2_moe", tmp_path / "in", mlp_only_layers=[0, 2])
    plan = plan_of(model, DropStep(method="test", decoder_layers=(0,)))
    compressor.apply(plan, source=tmp_path / "in", destination=tmp_path / "out")
    assert config(tmp_path / "out")["mlp_only_layers"] == [1]
    assert len(config(tmp_path / "out")["layer_types"]) == config(tmp_path / "out")["num_hidden_layers"] == 3
    reload("qwen2_moe", tmp_path / "out")
    model = saved("qwen2_moe", tmp_path / "every", decoder_sparse_step=2)
    with pytest.raises(PlanError, match="every 2th layer"):
        compressor.apply(
            plan_of(model, DropStep(method="test", decoder_layers=(1,))),
            source=tmp_path / "every",
            destination=tmp_path / "no",
        )
    both = plan_of(model, DropStep(method="test", decoder_layers=(0, 1)))
    compressor.apply(both, source=tmp_path / "every", destination=tmp_path / "yes")
    reload("qwen2_moe", tmp_path / "yes")


def test_a_file_that_loses_all_its_tensors_is_no_more(tmp_path: Path) -> None:
    model = saved("olmoe", tmp_path / "in", shard="60KB")
    plan = plan_of(model, DropStep(method="test", decoder_layers=(1, 2)))
    compressor.apply(plan, source=tmp_path / "in", destination=tmp_path / "out")
    old = {path.name for path in (tmp_path / "in").glob("*.safetensors")}
    new = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert new < old
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == new
    reload("olmoe", tmp_path / "out")


def test_merging_reads_experts_from_any_file(tmp_path: Path) -> None:
    model = saved("mixtral", tmp_path / "in", shard="40KB")
    saved("mixtral", tmp_path / "one")
    groups = (
        MergeGroup(lead=7, members=(0, 7), weights=(0.5, 0.5)),
        *(MergeGroup(lead=expert, members=(expert,), weights=(1.0,)) for expert in range(1, 7)),
    )
    step = MergeStep(
        grouping="test", method="average", layers=tuple(MergeLayer(layer=layer, groups=groups) for layer in range(4))
    )
    plan = plan_of(model, step)
    compressor.apply(plan, source=tmp_path / "in", destination=tmp_path / "out")
    compressor.apply(plan, source=tmp_path / "one", destination=tmp_path / "single")
    many, single = tensors(tmp_path / "out"), tensors(tmp_path / "single")
    assert set(many) == set(single) and all(torch.equal(many[name], single[name]) for name in single)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda values: values.pop("model.layers.2.mlp.experts.3.up_proj.weight"), "expert 3 is missing"),
        (
            lambda values: values.update({"model.layers.2.mlp.gate.weight": torch.ones(9, 64)}),
            "holds 6 experts and router rows",
        ),
        (
            lambda values: values.update(
                {
                    f"model.layers.1.mlp.experts.6.{part}_proj.weight": torch.ones(1, 1)
                    for part in ("gate", "up", "down")
                }
            ),
            "holds 7 experts and the configuration speaks of 6",
        ),
    ],
)
def test_verify_sees_what_is_wrong(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], reason: str
) -> None:
    model = saved("olmoe", tmp_path / "in")
    compressor.apply(drop(model, GONE), source=tmp_path / "in", destination=tmp_path / "out")
    found = compressor.verify(tmp_path / "out")
    assert found.experts == dict.fromkeys(range(4), 6) and found.tensors == len(tensors(tmp_path / "out"))
    _edited(tmp_path / "out", change)
    with pytest.raises((ModelError, RunError), match=reason):
        compressor.verify(tmp_path / "out")


def test_verify_reads_the_plan(tmp_path: Path) -> None:
    model = saved("olmoe", tmp_path / "in")
    compressor.apply(drop(model, GONE), source=tmp_path / "in", destination=tmp_path / "out")
    drop(model, (1,)).save(tmp_path / "out" / "moescope_plan.json")
    with pytest.raises(ModelError, match="holds 6 experts and its plan leaves 7"):
        compressor.verify(tmp_path / "out")


def test_a_plan_of_another_orientation_does_not_pass(tmp_path: Path) -> None:
    """Width and hidden size changed for each other."""
    model = saved("gpt_oss", tmp_path / "in")
    plan = drop(model, GONE)
    text = config(tmp_path / "in")
    (tmp_path / "in" / "config.json").write_text(json.dumps({**text, "intermediate_size": 40}))
    layers = [LayerShape(layer=layer, num_experts=8, top_k=2, width=40) for layer in range(4)]
    source = Source.model_validate({**plan.source.model_dump(), "layers": layers})
    other: Plan = edit_plans.plan(source, *plan.steps)
    with pytest.raises(ModelError, match=r"experts of 40 neurons between 64 channels would have"):
        compressor.apply(other, source=tmp_path / "in", destination=tmp_path / "out")


def test_only_the_hubs_own_folders_are_named_as_its_models() -> None:
    cached = Path("/cache/hub/models--Qwen--Qwen3-30B-A3B/snapshots/0123abcd")
    assert hub_id(cached) == "Qwen/Qwen3-30B-A3B"
    assert hub_id(Path("sample_data/model")) is None and hub_id(Path("Qwen/Qwen3-30B-A3B")) is None
