"""Merges in which the router keeps its rows: in memory, by hand, through files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import compressor
import profiler
from compressor.edits.layer import LayerEdit
from compressor.families import EXPERT_MAP, expert_map_of
from compressor.memory import edit, edited
from compressor.plan import DropStep, MergeStep, Plan, SlimStep
from moescope.errors import ModelError, PlanError
from profiler.capture.discovery import inspect_model
from profiler.inspect import inspect_model as inspection
from tests.compressor.apply_cases import LAYOUTS, config, saved, source_of
from tests.compressor.edited_models import Snapshot, merging, near, run, slimming
from tests.profiler.capture.tiny import batch, build, recorded_calls

FAMILIES = ("olmoe", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
CALLED_ALIKE = (*(family for family in LAYOUTS if family != "llama4_text"), "deepseek_v4")
"""The last one chooses by a table of token ids in some layers, so that no other form can be had."""

GROUPS = [(1, 2, 5), (0, 6)]
"""Across the groups of a router that has two, 0..3 and 4..7, and of other sizes."""


def shared(model: nn.Module, groups: list[tuple[int, ...]], **step: Any) -> Plan:
    """The same groups in every layer, stored once each."""
    return merging(source_of(model), groups, form="shared", **step)


@torch.no_grad()
def bound(model: nn.Module, groups: list[tuple[int, ...]]) -> nn.Module:
    """All experts stay, and each member of a group becomes the mean of its members: the same function."""
    for layer in inspect_model(model).layers:
        assert layer.layout is not None
        for tensor in layer.experts.parameters():
            count, width = layer.layout.num_weighted, layer.layout.width
            per_expert = tensor.view(count, width, -1) if len(tensor) == count * width else tensor  # DBRX
            for group in map(list, groups):
                per_expert[group] = per_expert[group].mean(0, keepdim=True).expand_as(per_expert[group])
    return model


@torch.no_grad()
def copied(model: nn.Module, expert: int, place: int, *, row: bool) -> nn.Module:
    """The model with a copy of an expert in another's place; with its router row, or with that of the place."""
    for layer in inspect_model(model).layers:
        assert layer.layout is not None and layer.router is not None
        for tensor in layer.experts.parameters():
            if len(tensor) == layer.num_experts:
                tensor[place] = tensor[expert]
        for tensor in (*layer.router.parameters(), *layer.router.buffers()) if row else ():
            if len(tensor) == layer.num_experts:
                tensor[place] = tensor[expert]
    return model


def together(model: nn.Module) -> tuple[int, int]:
    """The two experts of the first MoE layer that most tokens choose together."""
    with recorded_calls(model) as calls:
        run(model)
    chosen = torch.nn.functional.one_hot(calls[0].ids[0], calls[0].layer.num_experts).sum(1)
    pairs = (chosen.T @ chosen).triu(1)
    assert pairs.max() > 1
    first, second = divmod(int(pairs.argmax()), len(pairs))
    return first, second


@pytest.mark.parametrize("family", CALLED_ALIKE)
def test_the_model_whose_experts_are_bound_together(family: str, tmp_path: Path) -> None:
    model = saved(family, tmp_path / "source")
    plan, before = shared(model, GROUPS), run(model)
    receipt = compressor.apply(plan, source=tmp_path / "source", destination=tmp_path / "out")
    assert receipt.loads_with == "compressor.load"
    loaded = compressor.load(tmp_path / "out")
    assert type(loaded) is type(model)
    with edited(model, plan):
        found = run(model)
    near(run(loaded), found, 1e-6)
    wanted = run(bound(model, GROUPS))
    near(found, wanted)
    assert float((before - wanted).abs().max()) > 1e-2 * float(wanted.abs().max())
    assert {layer.layout.num_weighted for layer in inspect_model(loaded).layers if layer.layout} == {5}
    count = compressor.verify(tmp_path / "out").experts
    assert set(count.values()) == {5} and receipt.bytes_after < receipt.bytes_before


@pytest.mark.parametrize("row", [False, True], ids=["rows differ", "row copied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_merging_a_copy_changes_nothing(family: str, row: bool, tmp_path: Path) -> None:
    one, other = together(build(family))
    model = copied(build(family), one, other, row=row)
    model.save_pretrained(tmp_path / "source")
    plan, wanted = shared(model, [(one, other)]), run(model)
    compressor.apply(plan, source=tmp_path / "source", destination=tmp_path / "out")
    near(run(compressor.load(tmp_path / "out")), wanted, 1e-6)
    with edited(model, plan):
        near(run(model), wanted, 1e-6)


@torch.no_grad()
def test_the_sum_by_hand() -> None:
    model = build("olmoe")
    with recorded_calls(model) as calls:
        run(model)
    entry = calls[0]
    experts: Any = entry.layer.experts
    both, down = experts.gate_up_proj.double(), experts.down_proj.double()
    group_of = {expert: group for group in GROUPS for expert in group}
    wanted = torch.zeros_like(entry.hidden[0], dtype=torch.float64)
    twice = 0
    for token, (x, ids, gates) in enumerate(zip(entry.hidden[0], entry.ids[0], entry.weights[0], strict=True)):
        groups = [group_of.get(expert, (expert,)) for expert in ids.tolist()]
        twice += len(set(groups)) < len(groups)
        for group, weight in zip(groups, gates.tolist(), strict=True):
            gate, up = (sum(both[member] for member in group) / len(group) @ x.double()).chunk(2)
            merged = sum(down[member] for member in group) / len(group)
            wanted[token] += weight * (merged @ (torch.nn.functional.silu(gate) * up))
    assert twice > 3
    outputs: list[Tensor] = []
    handle = experts.register_forward_hook(lambda _, __, output: outputs.append(output))
    with edited(model, shared(model, GROUPS)):
        run(model)
    handle.remove()
    near(outputs[0].double(), wanted, 1e-6)


@pytest.mark.parametrize("backend", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_every_backend_and_generation(family: str, backend: str) -> None:
    model, twin = build(family), bound(build(family), GROUPS)
    edit(model, shared(model, GROUPS))
    for one in (model, twin):
        one.set_experts_implementation(backend)
    near(run(model), run(twin))
    inputs = {**batch(2, 6), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**inputs), twin.generate(**inputs))


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_the_model_is_afterwards_as_it_was(family: str) -> None:
    model = build(family)
    before = Snapshot(model)
    with edited(model, shared(model, GROUPS)):
        layers = inspect_model(model).layers
        assert all(expert_map_of(layer.experts) == (0, 1, 1, 2, 3, 1, 0, 4) for layer in layers)
        assert len(model.config.moescope_expert_map) == len(layers)
    before.require_same(model)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not hasattr(model.config, EXPERT_MAP)


def test_saved_loaded_and_saved_again(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    edit(model, shared(model, GROUPS))
    model.save_pretrained(tmp_path / "once")
    compressor.load(tmp_path / "once").save_pretrained(tmp_path / "twice")
    twice = compressor.load(tmp_path / "twice")
    assert torch.equal(run(twice), run(model))
    assert config(tmp_path / "once") == config(tmp_path / "twice")
    assert set(compressor.verify(tmp_path / "twice").experts.values()) == {5}
    with pytest.raises(RuntimeError):  # it has places for all experts
        transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path / "twice")
    with pytest.raises(ModelError, match="edit the source"):
        edit(twice, merging(source_of(twice), [(1, 2)]))
    with pytest.raises(PlanError, match="plan for its source"):
        compressor.apply(merging(source_of(twice), [(1, 2)]), source=tmp_path / "twice", destination=tmp_path / "out")


def test_with_narrower_experts_and_a_layer_less(tmp_path: Path) -> None:
    model = saved("olmoe", tmp_path / "source", num_hidden_layers=3)
    (slim,) = slimming(model, "per_layer").steps
    (merge,) = shared(model, GROUPS).steps
    assert isinstance(slim, SlimStep) and isinstance(merge, MergeStep)
    whole = MergeStep(**{**dict(merge), "layers": merge.layers[1:]})
    base = shared(model, GROUPS)
    plan = base.model_copy(update={"steps": (whole, slim, DropStep(method="test", decoder_layers=(1,)))}).checked()
    compressor.apply(plan, source=tmp_path / "source", destination=tmp_path / "out")
    written = config(tmp_path / "out")
    assert written[EXPERT_MAP] == {"1": [0, 1, 1, 2, 3, 1, 0, 4]} and written["num_experts"] == 8
    assert compressor.verify(tmp_path / "out").experts == {0: 8, 1: 5}
    loaded = compressor.load(tmp_path / "out")
    with edited(model, plan):
        assert torch.equal(run(loaded), run(model))


def test_what_the_files_of_a_result_say(tmp_path: Path) -> None:
    model = saved("mixtral", tmp_path / "source")
    compressor.apply(shared(model, GROUPS), source=tmp_path / "source", destination=tmp_path / "out")
    before, after = config(tmp_path / "source"), config(tmp_path / "out")
    assert after.pop(EXPERT_MAP).keys() == {str(layer.layer) for layer in inspect_model(model).layers}
    assert after == before
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "more rows than there are experts" in card and "compressor.load(FOLDER)" in card


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    model = saved("olmoe", tmp_path / "source")
    out = tmp_path / "out"
    compressor.apply(shared(model, GROUPS), source=tmp_path / "source", destination=out)
    right = config(out)
    for places, words in (
        ([0] * 8, "holds 5 experts"),
        ([0, 1, 2, 3, 4], "does not map"),
        ([0, 1, 2, 3, 9], "not map"),
    ):
        wrong = {**right, EXPERT_MAP: {**right[EXPERT_MAP], "0": places}}
        (out / "config.json").write_text(json.dumps(wrong), encoding="utf-8")
        with pytest.raises(ModelError, match=words):
            compressor.verify(out)
    (out / "config.json").write_text(json.dumps({**right, EXPERT_MAP: {"0": [0] * 5}}), encoding="utf-8")
    with pytest.raises(ModelError, match="several rows of its router"):
        compressor.load(out)
    (out / "config.json").write_text(json.dumps(right), encoding="utf-8")
    tensors = load_file(out / "model.safetensors")
    lost = next(name for name in tensors if ".experts.4." in name)
    save_file(
        {name: value for name, value in tensors.items() if name != lost}, out / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ModelError):
        compressor.load(out)


@pytest.mark.parametrize("family", ["llama4_text", "openai_privacy_filter", "diffusion_gemma_text"])
def test_families_that_cannot_are_refused_before_anything_is_written(family: str, tmp_path: Path) -> None:
    model = saved(family, tmp_path / "source")
    with pytest.raises(PlanError, match="another form than shared"):
        compressor.apply(shared(model, GROUPS), source=tmp_path / "source", destination=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    if family == "llama4_text":
        with pytest.raises(ModelError, match="another form than shared"):
            edit(model, shared(model, GROUPS))


def test_the_edit_of_a_layer() -> None:
    model = build("deepseek_v3")
    plan = shared(model, GROUPS)
    values = LayerEdit.of(plan, plan.source.layers[0].key)
    assert values.expert_map is not None and values.expert_map.tolist() == [0, 1, 1, 2, 3, 1, 0, 4]
    assert (values.count, values.routed, values.same_router, values.same_experts) == (5, 8, True, False)
    rows = torch.randn(8, 3)
    assert torch.equal(values.rows(rows), rows) and torch.equal(values.bias(rows[:, 0]), rows[:, 0])
    other = LayerEdit.of(merging(source_of(build("olmoe")), GROUPS), (0, 0))
    assert other.expert_map is None and other.routed == other.count == 5


def test_such_a_model_is_not_profiled(tmp_path: Path) -> None:
    model = build("olmoe")
    with edited(model, shared(model, GROUPS)):
        with (
            pytest.raises(ModelError, match="several rows of their router"),
            profiler.watch(model, store=tmp_path, name="a"),
        ):
            raise AssertionError("it was watched")
        model.save_pretrained(tmp_path / "out")
    for reads in (profiler.load_model, inspection):
        with pytest.raises(ModelError, match="several rows of their router"):
            reads(tmp_path / "out")
    with profiler.watch(model, store=tmp_path, name="a") as session:
        run(model)
    assert session.path is not None
