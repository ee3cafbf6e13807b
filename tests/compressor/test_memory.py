"""The edit in memory against the model as it was: by masking, by zeroing, by skipping layers; and back, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from compressor.edits.moments import LayerMoments
from compressor.load import load
from compressor.memory import edit, edited
from compressor.plan import (
    DropLayer,
    DropStep,
    LayerShape,
    MergeGroup,
    MergeLayer,
    MergeStep,
    Plan,
    SlimExpert,
    SlimLayer,
    SlimStep,
    Source,
)
from moescope.errors import ModelError, PlanError
from profiler.capture.discovery import inspect_model
from tests.compressor.edit_plans import dropping, plan, selection_bias, source, unreachable
from tests.profiler.capture.tiny import batch, build, output_of

STANDARD = ("olmoe", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text", "qwen2_moe", "glm4_moe")
"""Softmax, renormalised, sigmoid with groups and bias, interleaved, weighted inputs, gated shared experts."""

OTHERS = ("dbrx", "ernie4_5_moe", "gemma4_text", "granitemoeshared", "inkling_text", "jetmoe", "longcat_flash",
          "minimax_m2", "nemotron_h", "switch_transformers", "zaya")  # fmt: skip
"""Packed tensors, a bias of shape (1, E), a scale per expert, other shared modules, experts that copy, single ones."""


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    """Logits of two short texts, one of them padded."""
    inputs = batch(2, 10)
    if "switch" in type(model).__name__.lower():
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return output_of(model(**inputs))


def near(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to rounding, by the size of the logits."""
    assert torch.isfinite(wanted).all()
    scale = float(wanted.abs().max())
    assert float((found - wanted).abs().max()) <= tolerance * scale, float((found - wanted).abs().max()) / scale


def some(shapes: tuple[LayerShape, ...], *, even: bool = False) -> dict[int, list[int]]:
    """Experts to drop: other ones in each layer, and other numbers of them; the same number in each group."""
    gone = {}
    for place, shape in enumerate(shapes):
        size = shape.num_experts // shape.groups
        number = 1 if even or shape.groups > 1 else 1 + place % 3
        inside = [(place * 3 + offset) % size for offset in range(number)]
        gone[shape.layer] = sorted(group * size + expert for group in range(shape.groups) for expert in inside)
    return gone


def slimming(model: nn.Module, form: str, *, seed: int = 0) -> Plan:
    """Every expert keeps other neurons, and not all as many; shared experts too."""
    draw = np.random.default_rng(seed)
    known = source(model)
    layers = []
    for place, shape in enumerate(known.layers):
        experts = []
        for number in range(shape.num_experts):
            kept = np.zeros(shape.width, dtype=bool)
            kept[draw.permutation(shape.width)[: shape.width - 8 * (place % 3) - 4 * (number % 2)]] = True
            experts.append(SlimExpert.of(expert=number, mask=kept))
        if shape.shared_width:
            experts.append(SlimExpert.of(expert=0, role="shared", mask=draw.random(shape.shared_width) < 0.7))
        layers.append(SlimLayer(layer=shape.layer, experts=tuple(experts)))
    return plan(known, SlimStep(method="test", form=form, layers=tuple(layers)))  # type: ignore[arg-type]


def merging(known: Source, groups: list[tuple[int, ...]], **step: Any) -> Plan:
    """The same groups in every layer, the first member in the lead, equal parts; the others stay alone."""
    layers = []
    for shape in known.layers:
        named = {expert for group in groups for expert in group}
        every = [*groups, *((expert,) for expert in range(shape.num_experts) if expert not in named)]
        entries = [
            MergeGroup(lead=group[0], members=tuple(sorted(group)), weights=(1 / len(group),) * len(group))
            for group in sorted(every, key=lambda group: group[0])
        ]
        layers.append(MergeLayer(layer=shape.layer, groups=tuple(entries)))
    return plan(known, MergeStep(**{"grouping": "test", "method": "average", "layers": tuple(layers), **step}))


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


class Snapshot:
    """All that a model is made of, to see that it is the same again."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {name: (tensor, tensor.clone()) for name, tensor in _tensors(model).items()}
        self.modules = {name: (module, _plain(module)) for name, module in model.named_modules()}
        self.configs = {id(config): (config, dict(vars(config))) for config in _configs(model)}

    def require_same(self, model: nn.Module) -> None:
        """The same objects with the same content."""
        tensors = _tensors(model)
        assert tensors.keys() == self.tensors.keys()
        for name, (before, values) in self.tensors.items():
            assert tensors[name] is before and torch.equal(before, values), name
        modules = dict(model.named_modules())
        assert list(modules) == list(self.modules)
        for name, (module, attributes) in self.modules.items():
            assert modules[name] is module and _plain(module) == attributes, name
        for config, content in self.configs.values():
            assert vars(config) == content


def _tensors(model: nn.Module) -> Mapping[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _plain(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if isinstance(value, (int, float, str))}


def _configs(model: nn.Module) -> list[Any]:
    found = [getattr(module, "config", None) for module in model.modules()]
    return [config for config in found if hasattr(config, "to_dict")]


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
    with pytest.raises(ModelError, match="softmax over all experts"):
        edit(model, dropping(model, {source(model).layers[0].layer: [1]}, form="padded"))


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


def test_untouched_tensors_stay_the_same_objects_and_types() -> None:
    model = build("qwen2_moe", dtype=torch.bfloat16)
    model.requires_grad_(False)
    before = dict(model.named_parameters())
    with edited(model, dropping(model, {1: [0]}, form="per_layer")):
        after = dict(model.named_parameters())
        changed = {name for name in after if after[name] is not before[name]}
        assert changed == {
            f"model.layers.1.mlp.{name}" for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
        }
        assert all(after[name].dtype == before[name].dtype and not after[name].requires_grad for name in after)
        np.testing.assert_array_equal(
            after["model.layers.1.mlp.experts.down_proj"].float(),
            before["model.layers.1.mlp.experts.down_proj"][1:].float(),
        )


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


def test_the_model_is_put_back_after_an_error() -> None:
    model = build("mixtral")
    snapshot = Snapshot(model)
    with pytest.raises(RuntimeError, match="inside"), edited(model, dropping(model, {1: [0]}, form="per_layer")):
        raise RuntimeError("inside")
    snapshot.require_same(model)


def test_edits_can_be_nested() -> None:
    model = build("olmoe")
    snapshot = Snapshot(model)
    with edited(model, dropping(model, {1: [0]}, form="per_layer")):
        once = run(model)
        with edited(model, dropping(model, {1: [6]}, form="per_layer")):  # the last of the seven that are left
            twice = run(model)
        assert torch.equal(run(model), once)
    snapshot.require_same(model)
    with edited(model, dropping(model, {1: [0, 7]}, form="per_layer")):
        assert torch.equal(run(model), twice)


def test_nearest_keeps_one_member_as_it_is() -> None:
    model = build("olmoe")
    known = source(model)
    with edited(model, merging(known, [(2, 5, 6)], method="nearest")):
        found = run(model)
        kept = [layer.experts.down_proj[2].clone() for layer in inspect_model(model).layers]
    gone = {}
    for layer, down in zip(inspect_model(model).layers, kept, strict=True):
        member = next(number for number in (2, 5, 6) if torch.equal(layer.experts.down_proj[number], down))
        gone[layer.layer] = sorted({2, 5, 6} - {member})
    with edited(model, dropping(model, gone)):
        # It stands in the lead's place, which only orders the sum.
        near(run(model), found)


def test_a_subspace_of_all_directions_is_the_average() -> None:
    model = build("mixtral")
    known = source(model)
    shape = known.layers[0]
    moments = {
        entry.key: LayerMoments(torch.eye(known.expert_size), torch.ones(shape.num_experts, shape.width))
        for entry in known.layers
    }
    with edited(model, merging(known, [(1, 4)])):
        wanted = run(model)
    with edited(model, merging(known, [(1, 4)], method="subspace", rank=known.expert_size), moments=moments):
        near(run(model), wanted)
    with edited(model, merging(known, [(1, 4)], method="subspace", rank=2), moments=moments):
        assert float((run(model) - wanted).abs().max()) > 1e-3


@torch.no_grad()
def duplicate(model: nn.Module, expert: int, copied: int, *, shuffled: bool = False) -> nn.Module:
    """The model with ``copied`` a copy of ``expert`` in every layer, with the same router row; its neurons shuffled."""
    for layer in inspect_model(model).layers:
        assert layer.layout is not None and layer.router is not None
        order = torch.randperm(layer.layout.width) if shuffled else torch.arange(layer.layout.width)
        for name in ("gate_up_proj", "gate_up_proj_bias"):
            tensor = getattr(layer.experts, name, None)
            if tensor is not None:
                whole = tensor[expert].T if layer.layout.transposed and tensor.ndim == 3 else tensor[expert]
                gate, up = layer.layout.split_gate(whole.clone())
                assert gate is not None
                gate, up = gate[order], up[order]
                new = torch.stack([gate, up], 1).flatten(0, 1) if layer.layout.interleaved else torch.cat([gate, up])
                tensor[copied] = new.T if layer.layout.transposed and tensor.ndim == 3 else new
        layer.layout.down_weight(layer.experts, copied)[:] = layer.layout.down_weight(layer.experts, expert)[:, order]
        if layer.layout.biased:
            layer.experts.down_proj_bias[copied] = layer.experts.down_proj_bias[expert]
        layer.router.weight[copied] = layer.router.weight[expert]
        bias = selection_bias(layer)
        if bias is not None:
            bias[..., copied] = bias[..., expert]
    return model


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "minimax_m2"])
@pytest.mark.parametrize("method", ["average", "aligned", "nearest"])
def test_merging_a_copy_that_is_never_selected_changes_nothing(family: str, method: str) -> None:
    # One copy in each group of the router, so that the groups stay as large as each other.
    model = duplicate(duplicate(build(family), 1, 2, shuffled=method == "aligned"), 6, 5, shuffled=method == "aligned")
    with torch.no_grad():
        for layer in inspect_model(model).layers:
            bias = selection_bias(layer)
            assert bias is not None
            bias[..., [2, 5]] = -1e4
    wanted = run(model)
    with edited(model, merging(source(model), [(1, 2), (6, 5)], method=method)):
        near(run(model), wanted)


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_merging_copies_changes_nothing_where_one_expert_has_all_the_weight(family: str) -> None:
    model = duplicate(build(family, num_experts_per_tok=1), 1, 4)
    with edited(model, merging(source(model), [(1, 4)], router="mean")):
        found = run(model)
    near(found, run(model))


def test_merging_copies_changes_places_and_weights_elsewhere() -> None:
    # What average.py says of it, read off the router: 2 p becomes p / (1 - p), and a place comes free.
    model = duplicate(build("olmoe"), 1, 4)
    router: Any = inspect_model(model).layers[0].router
    tokens = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, before, chosen = router(tokens)
    both = (chosen == 1).any(1) & (chosen == 4).any(1)
    share = logits.softmax(-1)[both, 1]
    assert int(both.sum()) > 10
    torch.testing.assert_close(before[both].sum(1), 2 * share, rtol=0, atol=1e-6)
    wanted = run(model)
    with edited(model, merging(source(model), [(1, 4)])), torch.no_grad():
        _, weights, chosen = router(tokens)
        place = chosen[both] == 1
        torch.testing.assert_close(weights[both][place], share / (1 - share), rtol=1e-5, atol=1e-6)
        assert bool((place.sum(1) == 1).all())
        assert float((run(model) - wanted).abs().max()) > 1e-2 * float(wanted.abs().max())


def test_a_plan_for_another_model_is_refused() -> None:
    model = build("olmoe")
    snapshot = Snapshot(model)
    with pytest.raises(PlanError, match="8 experts of width 32 in layer 0; the model has 8 of width 48"):
        edit(model, dropping(build("olmoe", intermediate_size=32), {0: [1]}, form="per_layer"))
    with pytest.raises(PlanError, match="with 3 decoder layers"):
        edit(model, dropping(build("olmoe", num_hidden_layers=3), {0: [1]}, form="per_layer"))
    with pytest.raises(ModelError, match="no MoE layer"):
        edit(nn.Linear(2, 2), dropping(model, {0: [1]}, form="per_layer"))
    snapshot.require_same(model)


def test_experts_that_cannot_be_edited_are_refused() -> None:
    hashed = build("deepseek_v4")
    with pytest.raises(ModelError, match="table of token ids"):
        edit(hashed, dropping(hashed, {0: [1]}, form="per_layer"))
    keys = build("doge")
    shapes = tuple(LayerShape(layer=layer, num_experts=16, top_k=4, width=1) for layer in range(4))
    known = Source(model="doge", model_type="doge", hidden_size=64, expert_size=64, num_layers=4, layers=shapes)
    with pytest.raises(ModelError, match="no router with one row per expert"):
        edit(keys, plan(known, DropStep(method="test", form="per_layer", layers=(DropLayer(layer=0, experts=(1,)),))))
    away = build("olmoe")
    wanted = dropping(away, {0: [1]}, form="per_layer")
    with pytest.raises(ModelError, match="not in memory"):
        edit(away.to("meta"), wanted)
