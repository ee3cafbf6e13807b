"""Tokens that stand for images, video or audio: labelled by the processor's mask or by their ids, and kept apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import transformers
from numpy.testing import assert_allclose, assert_array_equal
from torch import Tensor

import profiler
import store
from profiler.capture.inputs import modality_tokens
from tests.profiler.capture.tiny import CONFIGS, build, recorded_calls, tokenizer

IMAGE, VIDEO, AUDIO = 101, 102, 103


def vision_model() -> Any:
    """A tiny Qwen3-VL-MoE: 4 x 4 patches of an image become 4 tokens."""
    text = CONFIGS["qwen3_vl_moe_text"]["config"]
    text = {**text, "rope_parameters": {**text["rope_parameters"], "mrope_section": [4, 2, 2]}}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "num_position_embeddings": 64}
    vision |= {"out_hidden_size": text["hidden_size"], "deepstack_visual_indexes": [0]}
    config = transformers.Qwen3VLMoeConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=104
    )
    torch.manual_seed(0)
    return transformers.Qwen3VLMoeForConditionalGeneration._from_config(config).eval()


def with_image() -> dict[str, Tensor]:
    """Two rows of text, the first padded on the left, the second with an image of 4 tokens in its middle."""
    ids = torch.tensor([[0, 0, 5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 104, IMAGE, IMAGE, IMAGE, IMAGE, 22, 23, 24]])
    patches = torch.randn(16, 3 * 2 * 16 * 16, generator=torch.Generator().manual_seed(1))
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def test_image_tokens_are_labelled_and_counted_apart(tmp_path: Path) -> None:
    model, inputs = vision_model(), with_image()
    with torch.no_grad(), recorded_calls(model) as calls:
        bare = model(**inputs).logits
    watching = profiler.watch(model, store=tmp_path, name="seen", level="activations", tokenizer=tokenizer())
    with torch.no_grad(), watching as session:
        session.label(domains=["code", "photos"])
        assert torch.equal(model(**inputs).logits, bare)
    run = store.open_run(session.path)
    assert run.badge.status == "valid", run.badge.reasons

    image = (inputs["input_ids"] == IMAGE).reshape(-1).numpy()
    row = np.repeat([0, 1], 10)
    real = inputs["attention_mask"].reshape(-1).numpy() == 1
    wanted = {"code": real & (row == 0), "photos": (row == 1) & ~image, "photos:image": image}
    load, outputs = run.table("expert_load"), run.table("expert_output")
    assert set(load["domain"]) == set(outputs["domain"]) == set(wanted)
    for entry in calls:
        norms = np.linalg.norm(entry.rows()[1], axis=2)
        ids = entry.ids[0].numpy()
        for domain, chosen in wanted.items():
            of = {"layer": entry.layer.layer, "domain": domain}
            expected = np.bincount(ids[chosen].ravel(), minlength=8)
            assert_array_equal(load.filter(**of).sort("expert")["tokens"].to_numpy(), expected)
            sums = np.bincount(ids[chosen].ravel(), norms[chosen].ravel(), minlength=8)
            found = outputs.filter(**of).sort("expert")
            assert_allclose(found["norm_sum"].to_numpy(), sums[expected > 0], rtol=1e-4)

    chunks = run.table("sequence_token").sort("sequence")
    assert chunks["modality"].to_list() == [None, ["text"] * 3 + ["image"] * 4 + ["text"] * 3]
    assert run.table("sequence").sort("sequence")["domain"].to_list() == ["code", "photos"]  # of the whole text


def test_generation_after_an_image_is_text(tmp_path: Path) -> None:
    model, inputs = vision_model(), with_image()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="said", tokenizer=tokenizer()) as session:
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
    run = store.open_run(session.path)
    assert run.badge.status == "valid", run.badge.reasons
    tokens = run.table("router_load").filter(layer=0).group_by("domain", "phase").agg(pl.col("tokens").sum())
    assert sorted(tokens.rows()) == [("text", "decode", 6), ("text", "prompt", 14), ("text:image", "prompt", 4)]


def test_ids_of_the_configuration_do_where_no_processor_marked_them(tmp_path: Path) -> None:
    model = build("olmoe")
    model.config.audio_token_id, model.config.video_token_index = AUDIO, VIDEO
    assert modality_tokens(model) == {AUDIO: "audio", VIDEO: "video"}
    ids = torch.tensor([[5, AUDIO, AUDIO, VIDEO, 6, 7, 8, 9]] * 2)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="ids", tokenizer=tokenizer()) as session:
        model(input_ids=ids, attention_mask=mask)
    run = store.open_run(session.path)
    tokens = dict(run.table("router_load").filter(layer=0).select("domain", "tokens").rows())
    assert tokens == {"text": 5 + 3, "text:audio": 4, "text:video": 2}
    assert run.table("sequence_token")["modality"].to_list()[1] == ["text", "audio", "audio", "video", "text", "text"]
    assert run.info.tokens == 14


def test_a_model_that_reads_text_alone_has_no_modalities() -> None:
    assert modality_tokens(build("olmoe")) == {}
    assert modality_tokens(vision_model()) == {IMAGE: "image", VIDEO: "video"}
