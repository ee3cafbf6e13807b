"""The edit in memory against the model as it was: by masking, by zeroing, by skipping layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from compressor.load import load
from compressor.memory import edit, edited
from compressor.plan import (
    DropLayer,
    DropStep,
    LayerShape,
    MergeStep,
    Plan,
    SlimExpert,
    SlimLayer,
    SlimStep,
)
from moescope.errors import ModelError, PlanError
from profiler.capture.discovery import inspect_model
from tests.compressor.edit_plans import dropping, plan, source, unreachable
from tests.compressor.edited_models import Snapshot, merging, near, run, slimming
from tests.profiler.capture.tiny import batch, build, output_of

STANDARD = ("olmoe", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text", "qwen2_moe", "glm4_moe")
"""Softmax, renormalised, sigmoid with groups and bias, interleaved, weighted inputs, gated shared experts."""

OTHERS = ("dbrx", "ernie4_5_moe", "gemma4_text", "granitemoeshared", "inkling_text", "jetmoe", "longcat_flash",
          "minimax_m2", "nemotron_h", "switch_transformers", "zaya")  # fmt: skip
"""Packed tensors, a bias of shape (1, E), a scale per expert, other shared modules, experts that copy, single ones."""


def some(shapes: tuple[LayerShape, ...], *, even: bool = False) -> dict[int, list[int]]:
    """Experts to drop: other ones in each layer, and other numbers of them; the same number in each group."""
    gone = {}
    for place, shape in enumerate(shapes):
        size = shape.num_experts // shape.groups
        number = 1 if even or shape.groups > 1 else 1 + place % 3
        inside = [(place * 3 + offset) % size for offset in range(number)]
        gone[shape.layer] = sorted(group * size + expert for group in range(shape.groups) for expert in inside)
    return gone


@torch.no_grad()
def zeroed(model: nn.Module, wanted: Plan) -> nn.Module:
    """A copy whose down projections are zero where a slim step takes neurons out."""
    twin = copy.deepcopy(model)
    step = wanted.steps[0]
    assert isinstance(step, SlimStep)
    for layer, slim in zip(inspect_model(twin).layers, step.layers, strict=True):
        for entry in slim.experts:
            if entry.role == "routed":
                assert layer.layout is not None
                down = layer.layout.down_weight(layer.experts, entry.expert)
            else:
                assert layer.shared is not None
                module: Any = layer.shared.down if layer.shared.down is not None else layer.shared.module
                down = module.weight if isinstance(module, nn.Linear) else module.down_proj[0]
            down[:, ~torch.from_numpy(entry.mask(down.shape[1]))] = 0
    return twin


@pytest.mark.parametrize("family", [*STANDARD, *OTHERS])
def test_dropped_experts_are_experts_that_nobody_selects(family: str) -> None:
    model = build(family)
    gone = some(source(model).layers, even=family == "zaya")
    with unreachable(model, gone) as twin:
        wanted = run(twin)
    before = run(model)
    snapshot = Snapshot(model)
    with edited(model, dropping(model, gone, form="per_layer")):
        found = run(model)
        for layer in inspect_model(model).layers:
            assert layer.layout is not None
            shape = next(shape for shape in source(build(family)).layers if shape.layer == layer.layer)
            assert layer.layout.num_weighted == shape.num_experts - len(gone[layer.layer])
    near(found, wanted)
    assert float((found - before).abs().max()) > 1e-3 * float(before.abs().max())
    snapshot.require_same(model)
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("family", [*STANDARD, *OTHERS])
def test_slimmed_experts_are_experts_with_neurons_of_zero(family: str) -> None:
    model = build(family)
    wanted = run(zeroed(model, slimming(model, "masked")))
    before, snapshot = run(model), Snapshot(model)
    for form in ("per_layer", "masked"):
        with edited(model, slimming(model, form)):
            near(run(model), wanted)
            widths = [layer.expert_width for layer in inspect_model(model).layers]
        assert (len(set(widths)) > 1) == (form == "per_layer") or len(widths) == 1
        snapshot.require_same(model)
    assert float((wanted - before).abs().max()) > 1e-3 * float(before.abs().max())
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "minimax_m2", "hy_v3"])
def test_experts_that_fill_up_are_never_selected(family: str) -> None:
    model = build(family)
    shapes = source(model).layers
    gone = some(shapes)
    if shapes[0].groups > 1:
        gone.pop(shapes[0].layer)  # one layer keeps all
    with edited(model, dropping(model, gone, form="per_layer")):
        wanted = run(model)
    with edited(model, dropping(model, gone, form="padded")):
        near(run(model), wanted)
        counts = {layer.num_experts for layer in inspect_model(model).layers}
    assert len(counts) == 1


@pytest.mark.parametrize("family", ["longcat_flash", "zaya", "ernie4_5_moe"])
def test_fillers_that_would_take_part_in_a_softmax_are_refused(family: str) -> None:
    model = build(family)
    known = source(model)
    drop = DropStep(method="test", form="padded", layers=(DropLayer(layer=known.layers[0].layer, experts=(1,)),))
    with pytest.raises(PlanError, match="softmax over all experts"):
        plan(known, drop)
    with pytest.raises(ModelError, match="softmax over all experts"):
        edit(model, plan(known.model_copy(update={"model_type": "another"}), drop))


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "jetmoe", "gpt_oss", "granitemoeshared"])
def test_a_dropped_block_puts_out_nothing(family: str) -> None:
    model = build(family)
    layer = source(model).layers[1].layer
    with edited(model, plan(source(model), DropStep(method="test", blocks=(layer,)))):
        found = next(entry for entry in inspect_model(model).layers if entry.layer == layer)
        outputs = []
        watched = [found.experts if family == "jetmoe" else found.block]
        watched += [found.shared.module] if found.shared is not None else []
        handles = [
            module.register_forward_hook(lambda _, __, output: outputs.append(output))
            for module in watched
            if module is not None
        ]
        run(model)
    for handle in handles:
        handle.remove()
    assert len(outputs) == len(watched)
    assert not any((output[0] if isinstance(output, tuple) else output).any() for output in outputs)


def test_a_block_with_experts_that_copy_cannot_be_silenced() -> None:
    model = build("longcat_flash")
    with pytest.raises(ModelError, match="cannot be silenced"):
        edit(model, plan(source(model), DropStep(method="test", blocks=(0,))))


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text", "nemotron_h"])
def test_dropped_layers_are_layers_that_do_nothing(family: str) -> None:
    model = build(family)
    count, snapshot, before = source(model).num_layers, Snapshot(model), run(model)
    twin = copy.deepcopy(model)
    skipped: Any = inspect_model(twin).stack[1]
    skipped.forward = lambda hidden, *_, **__: hidden
    wanted = run(twin)
    with edited(model, plan(source(model), DropStep(method="test", decoder_layers=(1,)))):
        assert torch.equal(run(model), wanted)
        assert len(inspect_model(model).stack) == count - 1 == model.config.num_hidden_layers
        # With a cache, which knows layers by their numbers.
        ids = batch(1, 6)["input_ids"]
        stepwise = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
        for length in range(6, 9):
            logits = output_of(model(input_ids=stepwise[:, :length], use_cache=False))
            assert int(logits[0, -1].argmax()) == int(stepwise[0, length])
    snapshot.require_same(model)
    assert torch.equal(run(model), before)


@pytest.mark.parametrize(("family", "reason"), [
    ("jamba", "works layers_block_type out by a rule"),
    ("gemma4_text", "hidden_size_per_layer_input"),
])  # fmt: skip
def test_layers_that_depend_on_their_numbers_stay(family: str, reason: str) -> None:
    model = build(family)
    snapshot = Snapshot(model)
    with pytest.raises(ModelError, match=reason):
        edit(model, plan(source(model), DropStep(method="test", decoder_layers=(1,))))
    snapshot.require_same(model)


def test_all_steps_together() -> None:
    model = build("olmoe")
    known = source(model)
    layers = (DropLayer(layer=0, experts=(1, 6)), DropLayer(layer=3, experts=(0,)))
    merge = merging(known, [(2, 5), (7, 0)], form="per_layer").steps[0]
    assert isinstance(merge, MergeStep)
    slim = slimming(model, "per_layer").steps[0]
    steps = (
        DropStep(method="test", form="per_layer", layers=layers, blocks=(3,), decoder_layers=(2,)),
        merge.model_copy(update={"layers": merge.layers[1:2]}),
        slim,
    )
    edit(model, plan(known, *steps))
    found = inspect_model(model)
    assert [layer.num_experts for layer in found.layers] == [6, 6, 7]
    assert [layer.expert_width for layer in found.layers] == [48, 40, 48]
    assert torch.isfinite(run(model)).all()
    assert [model.config.per_layer_config[place].num_experts for place in range(3)] == [6, 6, 7]
    again = plan(source(model), DropStep(method="test", layers=(DropLayer(layer=2, experts=(0,)),)))
    edit(model, again)  # counts are alike now
    assert [model.config.per_layer_config[place].num_experts for place in range(3)] == [6, 6, 6]
    assert model.config.num_experts == model.num_experts == 6
    assert torch.isfinite(run(model)).all()


def test_layers_of_their_own_stay_right_when_others_go() -> None:
    model = build("olmoe")
    edit(model, dropping(model, {1: [0], 2: [0, 1], 3: [2]}, form="per_layer"))  # 8, 7, 6 and 7 experts
    known = source(model)
    edit(
        model,
        plan(
            known,
            DropStep(
                method="test",
                layers=(DropLayer(layer=1, experts=(3,)), DropLayer(layer=3, experts=(4,))),
                decoder_layers=(0,),
            ),
        ),
    )
    assert [layer.num_experts for layer in inspect_model(model).layers] == [6, 6, 6]
    assert [model.config.per_layer_config[place].num_experts for place in range(3)] == [6, 6, 6]
    assert torch.isfinite(run(model)).all()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "dbrx", "deepseek_v3"])
def test_an_even_drop_is_written_as_one_number(family: str) -> None:
    model = build(family)
    known = source(model)
    edit(model, dropping(model, some(known.layers, even=True)))
    config = model.config.ffn_config if family == "dbrx" else model.config
    count = known.layers[0].num_experts - known.layers[0].groups
    names = ("num_local_experts", "n_routed_experts", "moe_num_experts")
    assert count in {vars(config).get(name) for name in names}
    assert not getattr(model.config, "is_heterogeneous", False)


def test_shared_experts_can_be_cut_alone() -> None:
    model = build("deepseek_v3")
    known, before = source(model), dict(model.named_parameters())
    shape = known.layers[0]
    kept = np.arange(shape.shared_width) % 3 > 0
    layer = SlimLayer(layer=shape.layer, experts=(SlimExpert.of(expert=0, role="shared", mask=kept),))
    wanted = plan(known, SlimStep(method="test", form="per_layer", layers=(layer,)))
    with edited(model, wanted):
        changed = {name for name, tensor in model.named_parameters() if tensor is not before[name]}
        assert changed == {
            f"model.layers.{shape.layer}.mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")
        }
        found: Any = inspect_model(model).layers[0].shared
        assert found.down.in_features == found.module.intermediate_size == int(kept.sum())
        assert torch.isfinite(run(model)).all()


def test_text_layers_of_a_model_that_reads_images(tmp_path: Path) -> None:
    numbers = {"vocab_size": 120, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 4}
    vision |= {"out_hidden_size": 64, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    config = Qwen3VLMoeConfig(text_config={**numbers, **experts, "rope_parameters": rope}, vision_config=vision)
    torch.manual_seed(0)
    model = Qwen3VLMoeForConditionalGeneration(config).eval()
    gone = {0: [1], 2: [3, 4]}
    with unreachable(model, gone) as twin:
        wanted = run(twin)
    edit(model, dropping(model, gone, form="per_layer"))
    near(run(model), wanted)
    model.save_pretrained(tmp_path)
    near(run(load(tmp_path)), wanted)
