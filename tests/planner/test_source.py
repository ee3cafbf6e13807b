"""What a run says of its model, family by family, and what it says without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

import planner
import profiler
import store
from moescope.errors import PlanError
from planner.source import source_of, value_bytes
from tests.profiler.capture.tiny import batch, build

EVERY = [0, 1, 2, 3]
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"groups": 1, "shared": 0, "gated": True, "bias": False, "width": 48, "size": 64, "layers": EVERY},
    "qwen2_moe": {"groups": 1, "shared": 40, "gated": True, "bias": False, "width": 32, "size": 64, "layers": EVERY},
    "deepseek_v3": {
        "groups": 2,
        "shared": 32,
        "gated": True,
        "bias": True,
        "width": 32,
        "size": 64,
        "layers": EVERY[1:],
    },
    "gpt_oss": {"groups": 1, "shared": 0, "gated": True, "bias": True, "width": 48, "size": 64, "layers": EVERY},
    "nemotron_h": {"groups": 2, "shared": 40, "gated": False, "bias": True, "width": 32, "size": 24, "layers": [1, 3]},
}
"""Softmax; shared experts with a gate; groups and a selection bias; biases everywhere; no gate, and a latent width."""


@pytest.mark.parametrize("level", ["routing", "activations"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, level: str, tmp_path: Path) -> None:
    model, expected = build(family), FAMILIES[family]
    with profiler.watch(model, store=tmp_path, name="tiny", level=level) as session, torch.no_grad():
        model(**batch())
    assert session.path is not None
    with store.open_run(session.path) as run:
        source = source_of(run)
        assert value_bytes(run) == 4
    assert [layer.layer for layer in source.layers] == expected["layers"] and source.num_layers == 4
    for layer in source.layers:
        assert (layer.num_experts, layer.top_k, layer.width) == (8, 2, expected["width"])
        assert layer.groups == expected["groups"] and layer.chosen_groups == 1
        assert layer.shared_width == expected["shared"]
    assert source.gated == expected["gated"] and source.model_type == model.config.model_type
    if level == "activations":  # without weights, only the configuration can say
        assert source.selection_bias == expected["bias"] and source.expert_size == expected["size"]


@pytest.mark.parametrize("family", ["ernie4_5_moe", "longcat_flash", "zaya"])
def test_fillers_that_would_have_a_part_of_a_softmax(family: str, tmp_path: Path) -> None:
    with profiler.watch(build(family), store=tmp_path, name="tiny", level="activations") as session, torch.no_grad():
        session.model(**batch())
    assert session.path is not None
    with store.open_run(session.path) as run:
        assert source_of(run).selection_bias
        with pytest.raises(PlanError, match=f"{family} chooses by a softmax over all experts"):
            planner.make(run, preset="frequency", share=0.25, form="padded")


def _run(tmp_path: Path, *, layer: dict[str, Any], info: dict[str, Any] | None = None, **tables: Any) -> store.Run:
    known = {
        "model": "toy",
        "model_type": "toy",
        "hidden_size": 8,
        "num_layers": 2,
        "dtype": "bfloat16",
        **(info or {}),
    }
    writer = store.RunWriter.create(tmp_path, "toy", store.RunInfo(**known))
    row = {"layer": 0, "step": 0, "num_experts": 6, "top_k": 2, "expert_width": 4, "stack": "decoder", **layer}
    writer.write_shard({"layer": pl.DataFrame([row]), **{name: pl.DataFrame(rows) for name, rows in tables.items()}})
    return store.open_run(writer.finish(seconds=1.0))


def _kinds(*kinds: str, owner: int = 0) -> list[dict[str, Any]]:
    return [
        {"layer": 0, "step": 0, "expert": place, "kind": kind, "owner_layer": owner, "owner_expert": place}
        for place, kind in enumerate(kinds)
    ]


def test_experts_without_weights_do_not_count(tmp_path: Path) -> None:
    run = _run(tmp_path, layer={}, expert=_kinds(*["routed"] * 4, "zero", "copy"))
    assert source_of(run).layers[0].num_experts == 4
    assert value_bytes(run) == 2


@pytest.mark.parametrize(
    ("config", "groups", "chosen"),
    [
        ({"n_group": 3, "topk_group": 2}, 3, 2),
        ({"num_expert_group": 2, "topk_group": 1}, 2, 1),
        ({"text_config": {"n_group": 2, "topk_group": 1}}, 2, 1),
        ({"thinker_config": {"text_config": {"n_group": 2, "topk_group": 1}}, "n_group": 3}, 2, 1),
        ({"n_group": 2}, 2, 2),
        ({"n_group": 2, "topk_group": 1, "topk_method": "greedy"}, 1, 1),
        ({"n_group": 1, "topk_group": 1}, 1, 1),
        ({"vision_config": {"n_group": 2}, "n_groups": 8}, 1, 1),
        ({}, 1, 1),
    ],
)
def test_groups_stand_in_the_configuration(tmp_path: Path, config: dict[str, Any], groups: int, chosen: int) -> None:
    layer = source_of(_run(tmp_path, layer={}, info={"model_config": config})).layers[0]
    assert (layer.groups, layer.chosen_groups) == (groups, chosen)


@pytest.mark.parametrize(
    ("layer", "tables", "sentence"),
    [
        ({"stack": "encoder"}, {}, "has MoE layers in its encoder; plans number decoder layers only"),
        ({"expert_width": 0}, {}, "does not know the width of the experts of layer 0"),
        ({"step": 1}, {}, "calls its experts several times"),
        ({}, {"expert": _kinds(*["routed"] * 6, owner=1)}, "layer 0 of toy runs the experts of layer 1"),
        (
            {},
            {"expert": _kinds("zero", *["routed"] * 5)},
            "expert 0 of layer 0 holds no weights and stands among those",
        ),
    ],
)
def test_models_that_cannot_be_cut_are_refused(
    tmp_path: Path, layer: dict[str, Any], tables: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(PlanError, match=sentence):
        source_of(_run(tmp_path, layer=layer, **tables))


@pytest.mark.parametrize(("dtype", "size"), [("float16", 2), ("torch.float32", 4), ("", None), ("mxfp4", None)])
def test_bytes_of_a_type(tmp_path: Path, dtype: str, size: int | None) -> None:
    assert value_bytes(_run(tmp_path, layer={}, info={"dtype": dtype})) == size
