"""Loading what a plan leaves: the same model as the edit in memory, through files; and nothing left in the process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import compressor
from compressor.load import load
from compressor.memory import edit, edited
from compressor.plan import (
    DropLayer,
    DropStep,
    GivenUp,
    MergeGroup,
    MergeLayer,
    MergeStep,
    Plan,
    SlimExpert,
    SlimLayer,
    SlimStep,
)
from moescope.errors import ModelError
from profiler.capture.discovery import inspect_model
from tests.compressor.edit_plans import dropping, plan, source
from tests.compressor.edited_models import merging, near, run
from tests.profiler.capture.tiny import batch, build

FAMILIES = ("olmoe", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")


def ragged(model: Any, *, widths: bool) -> Plan:
    """Other counts in every layer, the same in each group of the router; and, if asked for, other widths."""
    draw, known = np.random.default_rng(0), source(model)
    drops, slims = [], []
    for place, shape in enumerate(known.layers):
        size = shape.num_experts // shape.groups
        gone = [
            group * size + expert
            for group in range(shape.groups)
            for expert in range(place % 3 if size > 4 else place % 2)
        ]
        drops.append(DropLayer(layer=shape.layer, experts=tuple(gone)))
        masks = []
        for number in range(shape.num_experts):
            kept = np.zeros(shape.width, dtype=bool)
            kept[draw.permutation(shape.width)[: shape.width - 8 * (place % 3) - 4 * (number % 2)]] = True
            masks.append(SlimExpert.of(expert=number, mask=kept))
        slims.append(SlimLayer(layer=shape.layer, experts=tuple(masks)))
    drop = DropStep(method="test", form="per_layer", layers=tuple(drops))
    slim = SlimStep(method="test", form="per_layer", layers=tuple(slims))
    return plan(known, drop, *([slim] if widths else []))


def settings(folder: Path) -> dict[str, Any]:
    """What config.json says."""
    content: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("widths", [False, True], ids=["counts", "widths"])
def test_a_checkpoint_job_and_the_edit_in_memory_leave_the_same_model(
    family: str, widths: bool, tmp_path: Path
) -> None:
    model = build(family)
    model.save_pretrained(tmp_path / "source")
    wanted = ragged(model, widths=widths)
    receipt = compressor.apply(wanted, source=tmp_path / "source", destination=tmp_path / "result")
    assert receipt.loads_with == "compressor.load" and settings(tmp_path / "result")["per_layer_config"]
    loaded = load(tmp_path / "result")
    with edited(model, wanted):
        torch.testing.assert_close(run(loaded), run(model), rtol=0, atol=1e-5)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        content = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in loaded.state_dict().items():
        if tensor.shape == shapes[name]:  # shared experts may be filled up with zeros
            assert torch.equal(tensor, content[name]), name
        else:
            assert ".shared_expert" in name and widths
    counts = [layer.num_experts for layer in inspect_model(loaded).layers]
    assert len(set(counts)) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_edited_in_memory_can_be_saved_loaded_and_saved_again(family: str, tmp_path: Path) -> None:
    model = build(family)
    edit(model, ragged(model, widths=family != "deepseek_v3"))
    model.save_pretrained(tmp_path / "once")
    once = load(tmp_path / "once")
    once.save_pretrained(tmp_path / "twice")
    twice = load(tmp_path / "twice")
    wanted = run(model)
    for loaded in (once, twice):
        assert type(loaded) is type(model) and not loaded.training
        torch.testing.assert_close(run(loaded), wanted, rtol=0, atol=1e-6)
        state = loaded.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert settings(tmp_path / "once") == settings(tmp_path / "twice")


def test_nothing_stays_behind_in_the_process(tmp_path: Path) -> None:
    model = build("olmoe")
    layer = type(inspect_model(model).stack[0])
    before, recorders = layer.__init__, dict(type(model)._can_record_outputs)
    plans = [dropping(model, gone, form="per_layer") for gone in ({1: [0]}, {1: [2], 2: [0, 1, 5]})]
    wanted = []
    for place, one in enumerate(plans):
        twin = build("olmoe")
        edit(twin, one)
        twin.save_pretrained(tmp_path / str(place))
        wanted.append(run(twin))
    loaded = [load(tmp_path / str(place)) for place in range(2)]
    assert layer.__init__ is before and dict(type(model)._can_record_outputs) == recorders
    for found, logits in zip(loaded, wanted, strict=True):
        torch.testing.assert_close(run(found), logits, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path / "stock")
    torch.testing.assert_close(run(load(tmp_path / "stock")), run(model), rtol=0, atol=1e-6)
    configs = [module.config for module in loaded[0].modules() if hasattr(module, "config")]
    assert len(configs) > 10 and all(config is loaded[0].config for config in configs)


def test_a_loaded_model_generates_and_switches_its_experts(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    edit(model, ragged(model, widths=True))
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, dtype=torch.float32, device="cpu")
    ids = batch(1, 6)["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(loaded.generate(ids, **options), model.generate(ids, **options))
    wanted = run(loaded)
    loaded.set_experts_implementation("eager")
    torch.testing.assert_close(run(loaded), wanted, rtol=0, atol=1e-4)
    assert load(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def stored(tmp_path: Path, *, per_layer: bool = True) -> Path:
    """A folder with a tiny model."""
    model = build("olmoe")
    if per_layer:
        edit(model, dropping(model, {1: [0]}, form="per_layer"))
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("per_layer", [False, True])
def test_random_weights_never_pass(per_layer: bool, tmp_path: Path) -> None:
    folder = stored(tmp_path, per_layer=per_layer)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("model.layers.2.mlp.gate.weight")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights, such as model\.layers\.2\.mlp\.gate\.weight") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    folder = stored(tmp_path)
    content = settings(folder)
    content["per_layer_config"]["1"]["num_experts"] = 6
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    from transformers import OlmoeForCausalLM
    from transformers.models.olmoe.modeling_olmoe import OlmoeDecoderLayer

    before = OlmoeDecoderLayer.__init__
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.\S+ as \[7, .* wants \[6, "):
        load(folder)
    assert OlmoeDecoderLayer.__init__ is before and OlmoeForCausalLM is not None


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        load(tmp_path)
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        load(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="damaged"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ModelError, match="no settings"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "olmoe"}), encoding="utf-8")
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_code_of_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    folder = stored(tmp_path)
    with pytest.raises(ModelError, match="code of its own"):
        load(folder, trust_remote_code=True)
    content = settings(folder)
    content["auto_map"] = {"AutoModelForCausalLM": "modeling_mine.Mine"}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "modeling_mine.py").write_text("raise SystemExit('ran')", encoding="utf-8")
    assert type(load(folder)).__module__.startswith("transformers.")  # of a family that the library knows
    content["model_type"] = "unheard_of"
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ModelError, match="code of its own is never run"):
        load(folder)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
@pytest.mark.parametrize("method", ["aligned", "nearest", "segments"])
def test_merges_are_the_same_through_files(family: str, method: str, tmp_path: Path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path / "source")
    if method == "segments":
        wanted = recombining(model)
    else:
        wanted = merging(source(model), [(3, 1, 4), (6, 7)], method=method, router="mean")
    compressor.apply(wanted, source=tmp_path / "source", destination=tmp_path / "result")
    loaded = load(tmp_path / "result")
    with edited(model, wanted):
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=1e-6, atol=1e-6)
        near(run(loaded), run(model))
        found = run(model)
    with edited(model, dropping(model, dict.fromkeys(range(4), [2, 5]))):
        assert float((run(model) - found).abs().max()) > 1e-3  # neurons moved, members counted


def recombining(model: Any) -> Plan:
    """Experts 2 and 5 of every layer are given up; some of their neurons move."""
    groups = tuple(MergeGroup(lead=number, members=(number,), weights=(1.0,)) for number in (0, 1, 3, 4, 6, 7))
    given_up = tuple(GivenUp(expert=number, weight=0.5) for number in (2, 5))
    layers = tuple(MergeLayer(layer=shape.layer, groups=groups, given_up=given_up) for shape in source(model).layers)
    return plan(source(model), MergeStep(grouping="test", method="segments", threshold=0.2, layers=layers))
