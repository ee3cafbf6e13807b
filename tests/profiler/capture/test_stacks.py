"""Models with experts in several stacks of layers: one is watched, chosen by its name, and the others are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import transformers
from numpy.testing import assert_array_equal
from torch import Tensor, nn
from transformers.models.qwen3_omni_moe import configuration_qwen3_omni_moe as omni_configs
from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as omni_models

import profiler
import store
from moescope.errors import InputError
from profiler.capture.stacks import stack_name
from profiler.collect import collect
from profiler.corpus import open_corpus
from tests.profiler.capture.tiny import CONFIGS, batch, build, output_of, recorded_calls, tokenizer


def finished(session: profiler.WatchSession) -> store.Run:
    assert session.path is not None
    run = store.open_run(session.path)
    assert run.badge.status == "valid", run.badge.reasons
    return run


def others(run: store.Run) -> list[str]:
    return run.table("check").filter(pl.col("name") == "other experts")["detail"].to_list()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("model.layers.3.mlp.experts", "decoder"),
        ("decoder.block.1.layer.2.mlp.experts", "decoder"),
        ("encoder.block.1.layer.1.mlp.experts", "encoder"),
        ("model.visual.blocks.3.mlp.experts", "vision"),
        ("model.vision_tower.blocks.3.mlp.experts", "vision"),
        ("layers.1.mlp.vision_moe.experts", "vision"),
        ("talker.model.layers.0.mlp.experts", "talker"),
        ("thinker.model.layers.0.mlp.experts", "decoder"),
        ("model.mtp.layers.0.mlp.experts", "mtp"),
    ],
)
def test_stacks_are_named_by_their_paths(path: str, name: str) -> None:
    assert stack_name(path) == name


def test_an_unknown_stack_is_answered_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"stack 'image' is none .*: encoder \(encoder\.block\), decoder \(decoder\.block\)"
    ):
        profiler.watch(build("switch_transformers"), store=tmp_path, name="tiny", stack="image")


@torch.no_grad()
def test_encoder_and_decoder_are_recorded_one_at_a_time(tmp_path: Path) -> None:
    model, inputs = build("switch_transformers"), batch()
    for stack, tokens in (("encoder", 27), ("decoder", 3 + 3 * 3)):
        with profiler.watch(model, store=tmp_path, name=stack, stack=stack) as session:
            model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        run = finished(session)
        assert run.info.tokens == tokens
        assert set(run.table("layer")["stack"]) == {stack}
        assert all(name.startswith(f"{stack}.block") for name in run.table("layer")["module"])
        (other,) = others(run)
        assert "encoder" in other if stack == "decoder" else "decoder" in other


@torch.no_grad()
def test_a_run_is_resumed_with_the_stack_that_it_was_begun_with(tmp_path: Path) -> None:
    model = build("switch_transformers")
    with pytest.raises(KeyboardInterrupt), profiler.watch(model, store=tmp_path, name="x", stack="encoder"):
        model.generate(**batch(), max_new_tokens=2)
        raise KeyboardInterrupt
    with (
        pytest.raises(InputError, match="begun with stack 'encoder'"),
        profiler.watch(model, store=tmp_path, name="x", resume=True),
    ):
        pass


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_collect_feeds_either_stack_of_an_encoder_decoder(stack: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a few words to route\n" * 8, encoding="utf-8")
    words = tokenizer()
    corpus = open_corpus(str(text), tokenizer=words, sequence_length=16, batch_size=2)
    path = collect(
        build("switch_transformers"), corpus=corpus, name=stack, tokenizer=words, store=tmp_path, stack=stack,
        headline=False,
    )  # fmt: skip
    run = store.open_run(path)
    assert run.badge.status == "valid", run.badge.reasons
    assert run.info.tokens == corpus.num_tokens
    assert set(run.table("layer")["stack"]) == {stack}


@torch.no_grad()
def test_text_and_vision_experts_of_one_layer_have_tokens_of_their_own(tmp_path: Path) -> None:
    model, inputs = build("ernie4_5_vl_moe_text"), batch(2, 8)
    image = torch.zeros(2, 8, dtype=torch.bool)
    image[0, 2:6] = image[1, :2] = True
    real = inputs["attention_mask"].bool()
    for stack, wanted, width in ((None, real & ~image, 32), ("vision", real & image, 24)):
        bare = output_of(model(**inputs, moe_mm_token_type_ids=image.int()))
        with profiler.watch(model, store=tmp_path, name=str(stack), level="activations", stack=stack) as session:
            watched = output_of(model(**inputs, moe_mm_token_type_ids=image.int()))
        assert torch.equal(bare, watched)
        run = finished(session)
        assert run.table("layer").select("stack", "step", "expert_width").unique().rows() == [
            (stack or "decoder", 0, width)
        ]
        seen = (run.selections().ids >= 0).all(-1)
        for axis in range(len(seen)):
            assert_array_equal(seen[axis], wanted.numpy())
        load = run.table("expert_load").group_by("layer").agg(pl.col("tokens").sum())
        assert set(load["tokens"]) == {2 * int(wanted.sum())}
        assert set(run.table("router_load")["logit_tokens"]) == {int(wanted.sum())}
        norms = run.table("expert_output").filter(pl.col("kind") == "routed")["tokens"].sum()
        assert norms == 2 * 3 * int(wanted.sum())


def vision_tower() -> Any:
    """Layers with 4, 6 and 8 experts behind a dense one."""
    config = transformers.Dots3NoteVisionConfig(
        hidden_size=48, intermediate_size=64, moe_intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
        patch_size=2, adapter_in_dim=48, adapter_out_dim=32, pyramid_num_routed=[-1, 4, 6, 8], num_experts_per_tok=2,
        initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Dots3NoteVisionModel._from_config(config).eval()


@torch.no_grad()
def test_patches_of_images_are_tokens_of_a_vision_tower(tmp_path: Path) -> None:
    model = vision_tower()
    patches, grid = torch.randn(24, 12), torch.tensor([[1, 4, 4], [1, 2, 4]])
    with recorded_calls(model) as calls:
        bare = model(patches, grid_thw=grid).last_hidden_state
    with profiler.watch(model, store=tmp_path, name="tower", level="activations") as session:
        assert torch.equal(model(patches, grid_thw=grid).last_hidden_state, bare)
    run = finished(session)
    layers = run.table("layer").sort("layer").select("layer", "num_experts", "top_k").rows()
    assert layers == [(1, 4, 2), (2, 6, 2), (3, 8, 2)]
    for entry in calls:
        load = run.table("expert_load").filter(pl.col("layer") == entry.layer.layer).sort("expert")
        counts = np.bincount(entry.ids[0].numpy().ravel(), minlength=entry.layer.num_experts)
        assert_array_equal(load["tokens"].to_numpy(), counts)


class Omni(nn.Module):
    """The two text models of Qwen3-Omni, one after the other, as its generation runs them."""

    def __init__(self) -> None:
        super().__init__()
        entry = CONFIGS["qwen3_omni_moe_text"]["config"]
        known = omni_configs.Qwen3OmniMoeTalkerTextConfig().to_dict()
        small = {name: value for name, value in entry.items() if name in known and name != "model_type"}
        config = omni_configs.Qwen3OmniMoeTalkerConfig(text_config=small | {"shared_expert_intermediate_size": 40})
        self.thinker = build("qwen3_omni_moe_text")
        self.talker = omni_models.Qwen3OmniMoeTalkerModel._from_config(config.text_config).eval()
        for parameter in self.talker.parameters():
            if parameter.ndim > 1:  # the class leaves some as the memory was, which may hold NaN, and routers at zero
                parameter.data.normal_(std=0.1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        thought = self.thinker(input_ids=input_ids, attention_mask=attention_mask)[0]
        output: Tensor = self.talker(inputs_embeds=thought, attention_mask=attention_mask)[0]
        return output


@torch.no_grad()
def test_a_talker_is_watched_when_it_is_asked_for(tmp_path: Path) -> None:
    model, inputs = Omni(), batch(2, 8)
    bare = model(**inputs)
    for stack, path, shared in ((None, "thinker.layers", 0), ("talker", "talker.layers", 1)):
        with profiler.watch(model, store=tmp_path, name=path, level="activations", stack=stack) as session:
            assert torch.equal(model(**inputs), bare)
        run = finished(session)
        assert run.info.tokens == int(inputs["attention_mask"].sum())
        layers = run.table("layer")
        assert all(module.startswith(path) for module in layers["module"])
        assert set(layers["num_shared"]) == {shared}
        assert len(others(run)) == 1
